"""The language model's arguments and outputs, one by one, between the caller's coordinates and the physical ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ops import Compacted
from .cache import CacheState
from .compact import Compaction


def full_positions(given: Any, past: int, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """[..., B, L] position ids, made up where the caller gave none."""
    if given is None:
        return torch.arange(past, past + length, device=device)[None].expand(batch, length)
    return given.expand(*given.shape[:-2], batch, length)


def past_columns(
    earlier: CacheState | None, flat: torch.Tensor | None, past: int, length: int, batch: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cache's physical columns: [B, P] bool, which hold a token, and [B, P] int64, the caller's column of each."""
    known = earlier.virtual_length if earlier is not None else 0
    columns = torch.arange(known, past, device=device).expand(batch, -1)
    if flat is not None and flat.shape[1] >= past + length:
        valid = flat[:, known:past].bool().to(device).expand(batch, -1)
    else:
        valid = torch.ones_like(columns, dtype=torch.bool)
    if earlier is None:
        return valid, columns
    # What was appended since the last compaction stands behind what that left.
    return torch.cat([earlier.valid.to(device), valid], 1), torch.cat([earlier.columns.to(device), columns], 1)


def renumber_cache_position(kwargs: dict[str, Any], start: int, count: int, device: torch.device) -> None:
    """Count cache slots physically, where transformers 4.x passes them."""
    if isinstance(kwargs.get("cache_position"), torch.Tensor):
        kwargs["cache_position"] = torch.arange(start, start + count, device=device)


def deepstack_inputs(kwargs: Mapping[str, Any], device: torch.device) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """What Qwen3-VL adds to the first layers: [B, L] bool visual columns, and per layer a feature for each of them."""
    mask, levels = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if not isinstance(mask, torch.Tensor):
        return None, []
    return mask.to(device), [] if levels is None else [level.to(device) for level in levels]


def shorten_deepstack(kwargs: dict[str, Any], taken: Compacted) -> None:
    """Put in the visual slots and the features of kept tokens, where there are any."""
    if taken.visual is not None:
        kwargs["visual_pos_masks"] = taken.visual
    if taken.deepstack:
        kwargs["deepstack_visual_embeds"] = taken.deepstack


def grow_output(output: Any, compaction: Compaction) -> None:
    """Bring hidden states back to the caller's columns, in place."""
    output.last_hidden_state = compaction.grow(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(
            compaction.grow(h) if h.shape[1] == compaction.slots else h for h in output.hidden_states
        )
