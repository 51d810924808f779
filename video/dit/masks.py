"""Attention masks of video models, read as what they say about padding."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vlm_budget.errors import PatchError, VideoAttentionError

_LOWEST = -1e4  # what is added to a logit to hide a key is this or less
_ROWS = 1024  # rows of a mask of pairs that are compared at once
_FORMS = (
    "Known masks are [B, 1, 1, L] and [B, 1, L, L], bool or 0 and -inf to be added, which say nothing but which tokens "
    "are padding."
)


class KeyMask:
    """A mask of keys that stands in for the mask of pairs which a processor would build from it.

    It answers what ``HunyuanVideo15AttnProcessor2_0`` asks of a [B, T] tensor of text masks on the way to its [B, 1, L,
    L] mask (pad, bool, view, repeat, transpose, and), so that 15 GB of mask are never made at 720p.

    Attributes:
        keys: [B, T] or, once padded, [B, L] bool.
        shape: What the tensor's shape would be.
        axis: Which axis of ``shape`` the keys lie along; None once pairs are meant.
    """

    def __init__(self, keys: torch.Tensor, shape: Sequence[int], axis: int | None) -> None:
        self.keys = keys
        self.shape = torch.Size(shape)
        self.axis = axis

    @classmethod
    def of_text(cls, mask: torch.Tensor) -> KeyMask:
        """From a [B, T] mask of text tokens."""
        return cls(mask.bool(), mask.shape, 1)

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def bool(self) -> KeyMask:
        """Itself: it holds bools."""
        return self

    def view(self, *shape: int) -> KeyMask:
        """[B, L] as [B, 1, 1, L]."""
        if self.ndim != 2 or tuple(shape) != (self.shape[0], 1, 1, self.shape[1]):
            raise _foreign(f"view{shape}")
        return KeyMask(self.keys, shape, 3)

    def repeat(self, *repeats: int) -> KeyMask:
        """[B, 1, 1, L] as [B, 1, L, L], all rows alike."""
        if self.axis != 3 or self.shape[2] != 1 or tuple(repeats) != (1, 1, self.shape[3], 1):
            raise _foreign(f"repeat{repeats}")
        return KeyMask(self.keys, (self.shape[0], 1, self.shape[3], self.shape[3]), 3)

    def transpose(self, first: int, second: int) -> KeyMask:
        """[B, 1, L, L] with rows and columns exchanged."""
        if self.axis not in (2, 3) or self.shape[2] != self.shape[3] or {first % 4, second % 4} != {2, 3}:
            raise _foreign(f"transpose({first}, {second})")
        return KeyMask(self.keys, self.shape, 5 - self.axis)

    def __and__(self, other: Any) -> KeyMask:
        same = isinstance(other, KeyMask) and other.keys is self.keys and other.shape == self.shape
        if not same or {self.axis, other.axis} != {2, 3}:
            raise _foreign("&")
        return KeyMask(self.keys, self.shape, None)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> KeyMask:
        if func is not F.pad:
            raise _foreign(getattr(func, "__name__", str(func)))
        return args[0]._padded(*args[1:], **(kwargs or {}))

    def _padded(self, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> KeyMask:
        if self.ndim != 2 or len(pad) != 2 or pad[1] != 0 or mode != "constant" or not value:
            raise _foreign(f"pad({pad}, {mode!r}, {value})")
        keys = F.pad(self.keys, tuple(pad), value=True)
        return KeyMask(keys, keys.shape, 1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _foreign(name)


def _foreign(what: str) -> PatchError:
    return PatchError(
        f"this version of diffusers makes HunyuanVideo-1.5's attention mask in a way that is not known here ({what}). "
        "Undo the patch, or use diffusers 0.42, with which it was tried."
    )


class MaskReader:
    """Reads masks, and remembers the last one: layers share theirs."""

    def __init__(self) -> None:
        self._last: weakref.ref[torch.Tensor] | None = None
        self._version: int | None = None
        self._read: tuple[torch.Tensor, bool] | None = None

    def read(self, mask: Any, batch: int, length: int, video: slice) -> tuple[torch.Tensor | None, bool]:
        """Which tokens are valid, and whether padding attends to nothing.

        A bool mask of keys is not looked into on CUDA devices, which would wait for them. Masks that are added, and
        masks of pairs, are: once each.

        Args:
            mask: None, [B, 1, 1, L] or [B, 1, L, L] (batch may be 1), bool or 0 and -inf, or a :class:`KeyMask`.
            batch: B.
            length: L.
            video: The video's tokens, which all must be valid.

        Returns:
            [B, L] bool or None where all are valid; and True where rows of padding are empty too.

        Raises:
            VideoAttentionError: The mask says more than which tokens are padding, hides tokens of the video, or has
                another shape.
        """
        if mask is None:
            return None, False
        if isinstance(mask, KeyMask):
            if mask.axis is not None or mask.keys.shape != (batch, length):
                raise _foreign(f"a mask of shape {list(mask.shape)} for {length} tokens")
            return mask.keys, True
        last = None if self._last is None else self._last()
        same = last is mask and _version(mask) == self._version
        if same and self._read is not None and self._read[0].shape == (batch, length):
            return self._read
        self._read = _read(mask, batch, length, video)
        self._last, self._version = weakref.ref(mask), _version(mask)
        return self._read

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: what was read last is read again."""
        return {"_last": None, "_version": None, "_read": None}


def _version(mask: Any) -> int | None:
    """Counts what was written into a tensor; None where nobody counts."""
    return mask._version if isinstance(mask, torch.Tensor) and not mask.is_inference() else None


def _read(mask: Any, batch: int, length: int, video: slice) -> tuple[torch.Tensor, bool]:
    known = isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    if not known or mask.shape[3] != length or mask.shape[2] not in (1, length):
        got = f"shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
        raise VideoAttentionError(
            f"attention over {batch} x {length} tokens has a mask of unknown form: {got}. {_FORMS}"
        )
    shown = mask[:, 0] if mask.dtype == torch.bool else _shown(mask[:, 0])
    if shown.shape[1] == 1:
        keys, empty_rows = shown[:, 0], False
    else:
        # A token that may see itself is no padding.
        keys, empty_rows = shown.diagonal(dim1=1, dim2=2), _has_empty_rows(shown)
    looks = mask.device.type == "cpu" or mask.dtype != torch.bool or mask.shape[2] != 1
    if looks and not bool(keys[:, video].all()):
        raise VideoAttentionError(f"the attention mask hides tokens of the video, and not only padding. {_FORMS}")
    return keys.expand(batch, length), empty_rows


def _shown(mask: torch.Tensor) -> torch.Tensor:
    """Which pairs a mask that is added to logits shows."""
    if not mask.is_floating_point():
        raise VideoAttentionError(f"an attention mask of {mask.dtype} has an unknown form. {_FORMS}")
    shown = mask == 0
    if not bool((shown | (mask <= _LOWEST)).all()):
        raise VideoAttentionError(f"the attention mask adds other numbers than 0 and -inf to logits. {_FORMS}")
    return shown


def _has_empty_rows(shown: torch.Tensor) -> bool:
    """Whether rows of padding are empty in a [B, L, L] mask of pairs; else they are like all others.

    Raises:
        VideoAttentionError: It is a mask of another kind.
    """
    keys = shown.diagonal(dim1=1, dim2=2)
    alike, empty = True, True
    for start in range(0, shown.shape[1], _ROWS):
        rows = shown[:, start : start + _ROWS]
        pairs = keys[:, start : start + _ROWS, None] & keys[:, None]
        alike = alike and bool((rows == keys[:, None]).all())
        empty = empty and bool((rows == pairs).all())
    if not (alike or empty):
        raise VideoAttentionError(f"the attention mask hides single pairs of tokens. {_FORMS}")
    return empty
