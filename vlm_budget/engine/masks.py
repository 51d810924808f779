"""Attention masks in every form transformers hands to a language model: none, 2-D, 4-D, or a dict of 4-D ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import PatchError
from .compact import Compaction


def new_columns_valid(mask: Any, outer: Any, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Which of the new columns hold a token.

    Args:
        mask: What the language model was given.
        outer: What the outer model was given: the 2-D mask, where the inner one is of another kind or missing.
        batch: B.
        length: L, number of new columns.
        device: Of the result.

    Returns:
        [B, L] bool.
    """
    flat = padding_mask(mask, outer)
    if flat is not None:
        return flat[:, -length:].bool().to(device).expand(batch, -1)
    square = next((m for m in (first_of(mask), first_of(outer)) if _is_4d(m)), None)
    if square is None or square.shape[-1] < length:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    # A token that may see itself is not padding.
    own = square[:, 0, :, : square.shape[2]].diagonal(dim1=-2, dim2=-1)[:, -length:]
    return (own if own.dtype == torch.bool else own == 0).to(device).expand(batch, -1)


def padding_mask(mask: Any, outer: Any) -> torch.Tensor | None:
    """The 2-D mask among what the inner and the outer model were given, or None."""
    return next((m for m in (mask, outer) if isinstance(m, torch.Tensor) and m.ndim == 2), None)


def first_of(mask: Any) -> Any:
    """The mask of the full-attention layers, where there is one per layer type."""
    if isinstance(mask, dict):
        return mask.get("full_attention", next(iter(mask.values()), None))
    return mask


Past = tuple[torch.Tensor, torch.Tensor, int]


def compact_square(
    mask: Any, compaction: Compaction, widths: Mapping[str, int] | None = None, past: Past | None = None
) -> Any:
    """Gather rows and columns of a ready-made 4-D mask, or of each mask in a dict.

    A static cache has room for more columns than it holds; these stay, blocked.

    Args:
        mask: [B, 1, L, P + L] in the caller's columns; the first ones are missing where a sliding window is full.
        compaction: Of the new columns.
        widths: Of a static cache: columns per layer type.
        past: Of the cached columns: [B, p] which hold a token, [B, p] the caller's column of each, and P.

    Raises:
        PatchError: A mask that cannot be gathered: flex attention's block mask, or a full static sliding window.
    """
    if isinstance(mask, dict):
        only = {kind: None if widths is None else {kind: widths.get(kind, 0)} for kind in mask}
        return {kind: compact_square(each, compaction, only[kind], past) for kind, each in mask.items()}
    valid, kept, start = compaction.valid, compaction.index, 0
    if past is not None:
        past_valid, past_columns, start = past
        if _is_4d(mask) and widths is None and (gone := start + compaction.length - mask.shape[3]) > 0:
            start -= gone
            past_columns = past_columns[:, past_columns.shape[1] - start :] - gone
            past_valid = past_valid[:, past_valid.shape[1] - start :] & (past_columns >= 0)
        valid, kept = torch.cat([past_valid, valid], 1), torch.cat([past_columns.clamp_min(0), kept + start], 1)
    if mask is None:
        causal = torch.ones(compaction.slots, valid.shape[1], dtype=torch.bool, device=valid.device)
        return causal.tril(valid.shape[1] - compaction.slots)[None, None] & valid[:, None, None, :]
    if not _is_4d(mask):
        raise PatchError(
            f"this model hands its language model a ready-made {type(mask).__name__}, which cannot be shortened. "
            "Load it with attn_implementation='sdpa' or 'eager'."
        )
    if mask.shape[3] < start + compaction.length:
        raise PatchError(
            f"a static sliding-window cache of {mask.shape[3]} columns is shorter than the prompt of "
            f"{start + compaction.length}, and cannot be pruned. Use the default dynamic cache."
        )
    square = _gathered(mask, compaction.index.to(mask.device), kept.to(mask.device), valid.to(mask.device))
    spare = 0 if widths is None else max(*widths.values(), kept.shape[1]) - kept.shape[1]
    return torch.nn.functional.pad(square, (0, spare), value=_blocked(square))


def layer_mask(
    given: Any,
    rows: torch.Tensor,
    columns: torch.Tensor,
    valid: torch.Tensor,
    full: bool,
    implementation: str,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """The mask of a decoder layer that holds fewer columns than layer 0, in the form its attention backend expects.

    Args:
        given: What the language model made for layer 0: 4-D, 2-D (flash), or None.
        rows: [B, n] int64, the query of layer 0 that each query of the layer is.
        columns: [B, m] int64, the column of layer 0 that each of the layer's columns is, the new ones last.
        valid: [B, m] bool, those that hold a token.
        full: All of ``valid`` is True if ``given`` is None.
        implementation: Name of the attention backend.
        dtype: Of the hidden states.
    """
    if isinstance(given, torch.Tensor) and given.ndim == 4:
        return _gathered(given, rows, columns, valid)
    slots, width, flash = rows.shape[1], columns.shape[1], "flash" in implementation
    # SDPA without a mask is causal where queries and columns are as many, eager attention nowhere.
    if given is None and full and (flash or slots == 1 or (slots == width and implementation != "eager")):
        return None
    if flash:
        return valid
    seen = torch.ones(slots, width, dtype=torch.bool, device=valid.device).tril(width - slots)
    square = seen[None, None] & valid[:, None, None, :]
    if implementation != "eager":
        return square
    return torch.zeros(square.shape, dtype=dtype, device=valid.device).masked_fill(~square, torch.finfo(dtype).min)


def _gathered(square: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a 4-D mask; columns that hold no token are blocked."""
    heads = square.shape[1]
    square = square.expand(len(columns), -1, -1, -1)
    square = square.gather(2, rows[:, None, :, None].expand(-1, heads, -1, square.shape[3]))
    square = square.gather(3, columns[:, None, None, :].expand(-1, heads, square.shape[2], -1))
    return square.masked_fill(~valid[:, None, None, :], _blocked(square))


def _blocked(square: torch.Tensor) -> bool | float:
    """What hides a column in a mask of this kind."""
    return False if square.dtype == torch.bool else torch.finfo(square.dtype).min


def is_square(mask: Any) -> bool:
    """Whether the outer model built the mask itself (4-D or a block mask, alone or for some layer type).

    Flash attention's 2-D masks need no gathering, also one per layer type: the language model makes them anew.
    """
    masks = mask.values() if isinstance(mask, dict) else [mask]
    return any(m is not None and not (isinstance(m, torch.Tensor) and m.ndim == 2) for m in masks)


def _is_4d(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 4
