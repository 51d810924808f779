"""A call of the language model, from the caller's columns to the physical ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PatchError
from ..layout import Modality
from .arguments import deepstack_inputs, full_positions, past_columns, renumber_cache_position, shorten_deepstack
from .cache import CacheState, static_widths
from .clock import Interval
from .compact import Compaction, compact, packed_positions
from .masks import compact_square, is_square, new_columns_valid, padding_mask
from .prompts import Rows, text_behind
from .selection import PromptSelection


@dataclass(frozen=True, eq=False)
class LanguageCall:
    """A call of the language model in the caller's columns: L new ones behind ``past``.

    Attributes:
        kwargs: Its keyword arguments.
        earlier: What was dropped from its cache before.
        past: Cached columns, as the caller counts them.
        valid: [B, L] bool, new columns that hold a token.
        past_valid: [B, P] bool, physical cached columns that hold a token.
        columns: [B, P] int64, the caller's column of each.
        positions: [..., B, L] position ids.
        shift: [B] int64, how much they are lowered.
    """

    kwargs: Mapping[str, Any]
    earlier: CacheState | None
    past: int
    valid: torch.Tensor
    past_valid: torch.Tensor
    columns: torch.Tensor
    positions: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def read(cls, kwargs: Mapping[str, Any], outer_mask: Any, past: int, earlier: CacheState | None) -> LanguageCall:
        """Take a call apart.

        Args:
            kwargs: Of the language model.
            outer_mask: The mask that the outer model was given.
            past: Length of the cache, as the caller counts it.
            earlier: What was dropped from it before.
        """
        mask, device = kwargs.get("attention_mask"), kwargs["inputs_embeds"].device
        batch, length = kwargs["inputs_embeds"].shape[:2]
        flat = padding_mask(mask, outer_mask)
        inner, outer = (mask, outer_mask) if past == 0 else (flat, None)
        valid = new_columns_valid(inner, outer, batch, length, device)
        past_valid, columns = past_columns(earlier, flat, past, length, batch, device)
        shift = earlier.shift.to(device) if earlier is not None else torch.zeros(batch, dtype=torch.long, device=device)
        positions = full_positions(kwargs.get("position_ids"), past, batch, length, device)
        return cls(kwargs, earlier, past, valid, past_valid, columns, positions, shift)

    @property
    def embeds(self) -> torch.Tensor:
        """[B, L, D]."""
        embeds: torch.Tensor = self.kwargs["inputs_embeds"]
        return embeds

    @property
    def cache(self) -> Any:
        """The cache, or None."""
        return self.kwargs.get("past_key_values")

    @property
    def added(self) -> int:
        """How many of the P cached columns came after the last drop."""
        return self.past_valid.shape[1] - (self.earlier.physical_length if self.earlier is not None else 0)

    def continued(self, packed: bool) -> dict[str, Any]:
        """The arguments where no new token is dropped.

        Args:
            packed: Kept tokens are renumbered.
        """
        new = dict(self.kwargs)
        new["position_ids"] = self.positions - self.shift[:, None] if packed else self.positions
        new["attention_mask"] = torch.cat([self.past_valid, self.valid], 1).long()
        renumber_cache_position(new, self.past_valid.shape[1], self.valid.shape[1], self.embeds.device)
        return new

    def shortened(
        self, embeds: torch.Tensor, compaction: Compaction, tail: torch.Tensor, packed: bool, rows: Rows
    ) -> tuple[dict[str, Any], CacheState]:
        """The arguments of the kept columns, and what the cache holds behind the call.

        Args:
            embeds: [B, L, D], merged tokens put in.
            compaction: Of the new columns.
            tail: Columns since the last dropped one.
            packed: Kept tokens are renumbered.
            rows: The rows behind the drop.
        """
        new, mask = dict(self.kwargs), self.kwargs.get("attention_mask")
        visual, levels = deepstack_inputs(self.kwargs, embeds.device)
        taken = compaction.take_all(embeds, None if packed else self.positions, visual, levels, sum(rows.visual))
        # Padding slots keep a dropped token's embedding: StaticCache counts its non-zero keys up to transformers 4.x.
        new["inputs_embeds"] = taken.embeds
        new["position_ids"], shift = self._new_positions(compaction, taken.positions)
        shorten_deepstack(new, taken)
        whole = torch.cat([self.past_valid, compaction.valid], 1)
        # Never None: without a mask transformers reads gaps in position ids as packed sequences, and blocks attention.
        before = (self.past_valid, self.columns, self.past) if self.past else None
        new["attention_mask"] = (
            compact_square(mask, compaction, static_widths(self.cache), before) if is_square(mask) else whole.long()
        )
        renumber_cache_position(new, self.past_valid.shape[1], compaction.slots, embeds.device)
        columns = torch.cat([self.columns, self.past + compaction.index], 1)
        delta = self.past + self.valid.shape[1] - whole.shape[1]
        return new, CacheState(delta, whole, columns, shift, tail)

    def _new_positions(self, compaction: Compaction, kept: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Position ids, the ``kept`` ones or, without, new ones in a row; and how much they are lowered."""
        positions, valid, shift = self.positions, self.valid, self.shift
        if kept is not None:
            if kept.ndim == 3 and len(kept) == 4:  # the count on top of M-RoPE's axes tells packed sequences apart
                kept[0] = packed_positions(compaction, torch.zeros_like(shift)) * compaction.valid
            return kept, shift
        if positions.ndim != 2:
            raise PatchError("packed positions need one-dimensional RoPE; use positions='original'")
        start = torch.where(valid, positions, positions.max() + 1).amin(1) - shift
        return packed_positions(compaction, start) * compaction.valid, shift + (valid & ~compaction.keep).sum(1)

    def require_no_gaps(self, compaction: Compaction) -> None:
        """Refuse what flash attention would misread: behind a cache, gaps in a single row's original position ids.

        Raises:
            PatchError: It takes them for several sequences packed into one, and reads the wrong keys.
        """
        alone = len(self.valid) == 1 and self.positions.ndim == 2
        if alone and self.past and compaction.slots < compaction.length:
            raise PatchError(
                "with flash attention, tokens that join a cache cannot keep their original position ids: the gaps "
                "would be read as several sequences packed into one. Use positions='packed', or "
                "attn_implementation='sdpa'."
            )

    def compaction(
        self, keep: torch.Tensor, visual: torch.Tensor, extra: int, rows: Rows | None
    ) -> tuple[Compaction, torch.Tensor, Rows]:
        """The compaction, the columns since the last dropped one, and the rows as the host must know them.

        Args:
            keep: [B, L] bool, columns to keep, padding not yet left out.
            visual: [B, L] bool, all visual columns.
            extra: Columns behind the prompts.
            rows: The rows behind the drop, where they are known; None reads them off the device.
        """
        keep, valid = keep & self.valid, self.valid
        length = keep.shape[1]
        last = ((valid & ~keep) * torch.arange(1, length + 1, device=keep.device)).max()
        earlier = self.earlier
        since = self.past if earlier is None else earlier.tail.to(keep.device) + self.past - earlier.virtual_length
        tail = torch.where(last > 0, length - last, length + since)
        if rows is None:
            behind = text_behind(visual, valid)[:, : length - extra]
            totals = torch.stack([keep.sum(1), (keep & visual).sum(1), behind.sum(1)], 1)
            right, *counts = torch.cat([(~valid[:, -1].all())[None], totals.flatten()]).tolist()
            lengths, seen, texts = (counts[start::3] for start in range(3))
            # A chunk of a chunked prefill may lose all its tokens; one padding slot keeps shapes legal.
            rows = Rows(lengths, seen, texts, extra, bool(right), max(1, *lengths))
        return compact(keep, rows.slots, rows.right_padded), tail, rows


@dataclass(frozen=True, eq=False)
class Pending:
    """What the language model's post-hook needs from its pre-hook.

    Attributes:
        interval: Runs since the pre-hook.
        prompt: The call belongs to the prompt.
        length: Columns in the cache behind the call, as the caller counts them.
        state: What the cache will hold, where tokens are dropped.
        compaction: How they are.
        earlier: What was dropped from the cache before.
    """

    interval: Interval
    prompt: bool
    length: int
    state: CacheState | None = None
    compaction: Compaction | None = None
    earlier: CacheState | None = None


def kept_columns(
    selection: PromptSelection, visual: Mapping[Modality, torch.Tensor], embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] bool columns that a selection keeps, and the embeddings with merged tokens put in."""
    keep = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    for modality, mask in visual.items():
        index = selection.columns(modality, mask)
        keep &= ~mask | selection.keep[modality][index]
        if modality in selection.values:
            table, where = selection.values[modality]
            swap = (mask & where[index])[..., None]
            embeds = torch.where(swap, table[index].to(embeds.dtype), embeds)
    return keep, embeds
