"""A KV cache that is as long as the caller thinks outside the language model, and as short as it is inside.

``generate`` counts tokens by the length of its cache: position ids, mask columns, continuation slicing, assisted
decoding. After visual tokens were dropped the cache holds fewer. Rather than teach ``generate``, the cache object
answers in the caller's ("virtual") coordinates, and in its own ("physical") ones only while the language model runs.
The object changes class to a subclass of its own class; its data stay plain attributes, so it copies and pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch

from ..errors import PatchError

_STATE = "_vlm_budget_state"


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """What decoder layers hold, from one at whose input tokens were dropped up to the next such layer.

    Attributes:
        layer: The first of these layers.
        valid: [B, G] bool, columns (as of the last drop) that hold a token.
        index: [B, G] int64, the column of layer 0 that every one of them is.
        shift: [B] int64, how much position ids are lowered below those of layer 0 ("packed" positions), else 0.
        full: All of ``valid`` is True, known without asking the device.
    """

    layer: int
    valid: torch.Tensor
    index: torch.Tensor
    shift: torch.Tensor
    full: bool

    def map_rows(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> LayerGroup:
        """The group after the batch was re-ordered, repeated or selected."""
        return replace(self, valid=rows(self.valid), index=rows(self.index), shift=rows(self.shift))

    def cropped(self, columns: int) -> LayerGroup:
        """The group without its last columns."""
        return replace(self, valid=self.valid[:, :-columns], index=self.index[:, :-columns])


@dataclass(frozen=True)
class CacheState:
    """What was dropped.

    Attributes:
        delta: Virtual minus physical length, the same for all rows.
        valid: [B, P] bool, physical columns (as of the last compaction) that hold a token.
        columns: [B, P] int64, the caller's column of every physical one.
        shift: [B] int64, how much the caller's position ids are lowered ("packed" positions), else 0.
        tail: [] int64, columns since the last dropped one: how far the cache can be cropped into ``valid``.
        physical: The language model is running.
        groups: The layers that hold fewer columns than layer 0, which all of the above is about; layers ascending.
    """

    delta: int
    valid: torch.Tensor
    columns: torch.Tensor
    shift: torch.Tensor
    tail: torch.Tensor
    physical: bool = False
    groups: tuple[LayerGroup, ...] = ()

    @property
    def physical_length(self) -> int:
        """P, columns covered by ``valid``."""
        return self.valid.shape[1]

    @property
    def virtual_length(self) -> int:
        """Caller's length at the last compaction."""
        return self.physical_length + self.delta

    def group(self, layer: int) -> LayerGroup | None:
        """The group a decoder layer belongs to; None for those that hold all columns of layer 0."""
        return next((group for group in reversed(self.groups) if group.layer <= layer), None)

    def missing(self, layer: int) -> int:
        """How many columns fewer than layer 0 a decoder layer holds."""
        group = self.group(layer)
        return 0 if group is None else self.physical_length - group.valid.shape[1]

    def map_rows(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> CacheState:
        """The state after the batch was re-ordered, repeated or selected."""
        groups = tuple(group.map_rows(rows) for group in self.groups)
        return replace(self, valid=rows(self.valid), columns=rows(self.columns), shift=rows(self.shift), groups=groups)

    def cropped(self, columns: int) -> CacheState:
        """The state without its last columns, none of which may lie before the last dropped one."""
        return replace(
            self,
            valid=self.valid[:, :-columns],
            columns=self.columns[:, :-columns],
            tail=self.tail - columns,
            groups=tuple(group.cropped(columns) for group in self.groups),
        )


class VirtualLength:
    """Mixed in front of a live cache's class."""

    _vlm_budget_base: type

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Length in the caller's coordinates, or the physical one while the language model runs."""
        length = super().get_seq_length(layer_idx)  # type: ignore[misc]
        state = cache_state(self)
        return length if state is None or state.physical else length + state.delta + state.missing(layer_idx)

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """Columns and offset of the mask a layer wants; masks made outside the language model are the caller's."""
        columns, offset = super().get_mask_sizes(query, layer_idx)  # type: ignore[misc]
        state = cache_state(self)
        if state is None or state.physical:
            return columns, offset
        if not getattr(self, "is_compileable", False):
            gone = state.delta + state.missing(layer_idx)
            # What a full sliding window has let go of is counted in its offset.
            return (columns, offset + gone) if offset else (columns + gone, offset)
        layer = self.layers[layer_idx]  # type: ignore[attr-defined]
        if not layer.is_sliding:
            return columns, offset  # a static cache has its full size already
        new = query if isinstance(query, int) else len(query)  # up to transformers 4.x, cache positions
        held, window = int(layer.get_seq_length()) + state.delta, layer.max_cache_len
        return (window - 1 + new, held - window + 1) if held >= window else (max(window, held + new), 0)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to grow behind the patch's back."""
        state = cache_state(self)
        if state is not None and not state.physical:
            raise PatchError(
                "this cache was filled by a patched model, and is now used without the patch: its masks would be "
                "wrong. Patch the model again, or start from a new cache."
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> Any:
        """Follow beam search."""
        result = super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map_rows(lambda t: t[beam_idx.to(t.device)])
        return result

    def batch_repeat_interleave(self, repeats: int) -> Any:
        """Follow a repeated batch."""
        result = super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map_rows(lambda t: t.repeat_interleave(repeats, 0))
        return result

    def batch_select_indices(self, indices: torch.Tensor) -> Any:
        """Follow selected rows."""
        result = super().batch_select_indices(indices)  # type: ignore[misc]
        self._map_rows(lambda t: t[indices.to(t.device)])
        return result

    def crop(self, max_length: int) -> Any:
        """Forget the last tokens: ``-n`` drops n, a positive length (transformers 4.x) is in the caller's coordinates.

        Raises:
            PatchError: Dropped visual tokens lie among them.
        """
        state = cache_state(self)
        if state is None:
            return super().crop(max_length)  # type: ignore[misc]
        to_length = max_length > 0 or (max_length == 0 and _zero_is_a_length(self._vlm_budget_base))
        physical = int(super().get_seq_length(0))  # type: ignore[misc]
        drop = max(0, physical + state.delta - max_length) if to_length else -max_length
        into = state.physical_length - (physical - drop)
        if into > 0:
            if into > int(state.tail):
                raise PatchError(
                    f"cannot crop the last {drop} tokens of a pruned cache: dropped visual tokens lie among them. "
                    "Start from a new cache."
                )
            setattr(self, _STATE, state.cropped(into))
        return super().crop(-drop) if drop or not to_length else None  # type: ignore[misc]

    def reset(self) -> Any:
        """Forget everything."""
        setattr(self, _STATE, None)
        return super().reset()  # type: ignore[misc]

    def _map_rows(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        state = cache_state(self)
        if state is not None:
            setattr(self, _STATE, state.map_rows(rows))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (_rebuild, (type(self)._vlm_budget_base, dict(self.__dict__)))


def cache_state(cache: Any) -> CacheState | None:
    """What was dropped from a cache, or None."""
    return getattr(cache, _STATE, None)


def static_widths(cache: Any) -> dict[str, int] | None:
    """Columns per layer type of a static cache; None for a cache that grows."""
    if not getattr(cache, "is_compileable", False):
        return None
    return {
        "sliding_attention" if layer.is_sliding else "full_attention": layer.max_cache_len for layer in cache.layers
    }


def set_cache_state(cache: Any, state: CacheState) -> None:
    """Record what was dropped, and make the cache answer in the caller's coordinates."""
    _virtualise(cache)
    setattr(cache, _STATE, state)


def _zero_is_a_length(cache: Any) -> bool:
    # Since transformers 5 ``crop(0)`` drops nothing, and assisted decoding says so whenever every draft was accepted.
    return "max_length" in signature(cache.crop).parameters


_CLASSES: dict[type, type] = {}


def _virtualise(cache: Any) -> None:
    base = type(cache)
    if isinstance(cache, VirtualLength):
        return
    if base not in _CLASSES:
        name = f"Virtual{base.__name__}"
        _CLASSES[base] = type(name, (VirtualLength, base), {"_vlm_budget_base": base, "__module__": __name__})
    cache.__class__ = _CLASSES[base]


def _rebuild(base: Any, attributes: dict[str, Any]) -> Any:
    cache = base.__new__(base)
    cache.__dict__.update(attributes)
    _virtualise(cache)
    return cache
