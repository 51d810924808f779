"""What the host must know of a call, read off the device in one go at its start.

A copy to the host waits for all the work that the device was given before. What decides shapes depends on a call's
inputs alone: tokens and padding of every row, and the sizes of pictures. So it is read as a whole before any layer
runs, when there is little to wait for, and the host does not ask again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..families.base import Family
from ..layout import Modality

Known = Sequence[tuple[str, torch.Tensor, int | None, torch.Tensor]]
"""What was read of a call's inputs: the name that the family's layout has for it, the input, its version, the numbers.
"""


@dataclass(frozen=True)
class RowCounts:
    """The tokens of every prompt, as the host knows them.

    Attributes:
        visual: Per modality, its placeholders.
        given: The modalities that the call brings features of.
        text: Tokens that are neither padding nor placeholders.
        instruction: Of these, the ones behind the last placeholder; all of them where none is behind.
        behind: Text behind the last placeholder of what is given; 0 where none is.
        tokens: All that is no padding; None where the call does not show what is.
        right_padded: On which side rows are padded.
    """

    visual: Mapping[Modality, list[int]]
    given: frozenset[Modality]
    text: list[int]
    instruction: list[int]
    behind: list[int]
    tokens: list[int] | None
    right_padded: bool


def read_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors of whole numbers on the host; for all that live on one device, it waits once."""
    found = list(tensors)
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        there = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[index].reshape(-1).long() for index in there]).cpu()
        parts = flat.split([tensors[index].numel() for index in there])
        for index, part in zip(there, parts, strict=True):
            found[index] = part.reshape(tensors[index].shape)
    return found


def read_call(
    rows: Mapping[str, torch.Tensor] | None, family: Family, modalities: Iterable[Modality], inputs: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], Known]:
    """Read counts of the prompts, and the numbers that decide the layout of pictures, in one go.

    Args:
        rows: Counts by name; None where there are none to read.
        family: Of the model.
        modalities: What the call brings.
        inputs: Its arguments by name.

    Returns:
        The counts on the host, and what is now known of the inputs.
    """
    rows = rows or {}
    sources = [found for modality in modalities for found in _sources(family, modality, inputs)]
    numbers = read_together([*rows.values(), *(family.measure(name, given) for name, given in sources)])
    counts = dict(zip(rows, numbers, strict=False))
    hosts = zip(sources, numbers[len(rows) :], strict=True)
    return counts, [(name, given, _version(given), host) for (name, given), host in hosts]


def on_host(family: Family, modality: Modality, inputs: Mapping[str, Any], known: Known) -> dict[str, Any]:
    """An encoder's arguments, with what decides the layout of its pictures on the host.

    Args:
        family: Of the model.
        modality: Which encoder.
        inputs: Its arguments by name.
        known: What was read before; the rest is read now.
    """
    found: dict[str, Any] = dict(inputs)
    missing = []
    for name, given in _sources(family, modality, inputs):
        host = _recall(name, given, known)
        if host is None:
            missing.append((name, family.measure(name, given)))
        found[name] = host
    numbers = read_together([tensor for _, tensor in missing])
    return {**found, **{name: host for (name, _), host in zip(missing, numbers, strict=True)}}


def _sources(family: Family, modality: Modality, inputs: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    named = [(name, inputs.get(source)) for name, source in family.sizes.get(modality, {}).items()]
    return [(name, given) for name, given in named if isinstance(given, torch.Tensor)]


def _recall(name: str, given: torch.Tensor, known: Known) -> torch.Tensor | None:
    """The numbers that were read of an input, unless it was written to since (an interrupted call forgets nothing)."""
    same = (host for what, it, version, host in known if what == name and it is given and version == _version(given))
    return next(same, None)


def _version(tensor: torch.Tensor) -> int | None:
    """Counts the writes to a tensor; None in inference mode, where torch does not."""
    return None if tensor.is_inference() else tensor._version
