"""Runs of a patched model, told in the reference's words."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers

from tiny_parts import IMAGE, VIDEO
from vlm_budget import PatchHandle

from .reference import Row, kept_columns, language_model, physical_rows, recorded

# Random weights may well sample a placeholder's id, which transformers refuses to read again without its picture.
SAMPLE = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
# float32 sums in another order (other lengths, other masks); logits are of the order of 10.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# The same over several decode steps, each of which reads what the last one rounded.
DECODED = {"atol": 5e-5, "rtol": 1e-5}


@dataclass(frozen=True)
class Prefill:
    """One forward of a patched model over a whole prompt.

    Attributes:
        rows: The unpruned prompts; behind merging methods with the embeddings that the kept columns were given.
        columns: Per prompt, the columns (padding left out) that the language model saw.
        logits: Per prompt, [n, V] logits in the caller's columns, padding left out.
    """

    rows: list[Row]
    columns: list[list[int]]
    logits: list[torch.Tensor]


def forward(handle: PatchHandle, inputs: dict[str, Any], full: list[Row], **options: Any) -> Prefill:
    """Run a patched model and find out which columns its language model saw."""
    model = handle.model
    valid = inputs["attention_mask"].bool()
    with recorded(language_model(model)) as calls, torch.no_grad():
        logits = model(**inputs, **options).logits
    kept = kept_per_row(handle, len(full))
    lengths = [row.length - int(row.visual.sum()) + keep for row, keep in zip(full, kept, strict=True)]
    shortened = calls[0]["inputs_embeds"]
    assert shortened.shape[1] == max(lengths), "the compacted length is not text plus promised tokens"
    seen = physical_rows(calls[0], lengths, right=not bool(valid[:, -1].all()))
    if merges(handle):
        columns = told_columns(handle, full)
        full = [merged_row(*parts) for parts in zip(full, columns, seen, strict=True)]
    else:
        columns = [kept_columns(row, embeds) for row, embeds in zip(full, seen, strict=True)]
    return Prefill(full, columns, [part[mask] for part, mask in zip(logits, valid, strict=True)])


def merges(handle: PatchHandle) -> bool:
    """Kept tokens get embeddings of their own, so that a column cannot be told by its embedding."""
    return handle.method.merges or handle.method.merge is not None


def told_columns(handle: PatchHandle, full: list[Row]) -> list[list[int]]:
    """Per prompt, the columns that the handle says were kept, text included."""
    found = []
    for index, row in enumerate(full):
        visual, start = row.visual.nonzero().flatten(), 0
        columns = (~row.visual).nonzero().flatten().tolist()
        for item in (item for item in handle.kept() if item.row == index):
            columns += visual[torch.tensor(item.positions, dtype=torch.long) + start].tolist()
            start += item.item.size
        found.append(sorted(columns))
    return found


def merged_row(row: Row, columns: list[int], embeds: torch.Tensor) -> Row:
    """The unpruned row with merged embeddings in the kept columns; its text must be what it was."""
    text = ~row.visual[columns]
    assert torch.equal(embeds[text], row.embeds[columns][text]), "a text token was changed"
    return replace(row, embeds=row.embeds.index_copy(0, torch.tensor(columns), embeds))


def kept_per_row(handle: PatchHandle, count: int) -> list[int]:
    """Promised visual tokens of every prompt, from the report."""
    items = handle.report().plan.items
    return [sum(item.keep for item in items if item.row == row) for row in range(count)]


def compacted(prefill: Prefill, packed: bool) -> list[Row]:
    """The prompts as the reference compacts them."""
    return [row.compact(columns, packed) for row, columns in zip(prefill.rows, prefill.columns, strict=True)]


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    """New tokens per prompt."""
    with torch.no_grad():
        output = model.generate(**inputs, **{**SAMPLE, **options})
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return sequences[:, start:].tolist()


def encode(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Encoder outputs by modality, from the model's public methods."""
    encoded = {}
    for modality, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            method = getattr(model.model, f"get_{modality}_features")
            names = inspect.signature(method).parameters
            given = {name: value.clone() for name, value in inputs.items() if name in names}
            with torch.no_grad():
                encoded[modality] = method(**given, return_dict=True)
    return encoded


def unpatched_or_skip(run: Callable[[], Any], expected: Any, what: str) -> None:
    """Skip where the model itself, not patched, cannot do what is asked of the patched one.

    Args:
        run: Runs the unpatched model.
        expected: What it must give; None where running is enough.
        what: The feature, for the reason.
    """
    itself = f"{what}: the unpatched model of transformers {transformers.__version__} itself"
    try:
        found = run()
    except AssertionError as error:
        pytest.skip(f"{itself} differs from the reference: {first_line(error)}")
    except Exception as error:
        pytest.skip(f"{itself} raises {type(error).__name__}: {first_line(error)}")
    if expected is not None and found != expected:
        pytest.skip(f"{itself} gives other tokens with it")


def first_line(error: Exception) -> str:
    """The first line of a message."""
    return str(error).strip().split("\n")[0]
