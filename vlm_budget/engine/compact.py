"""Index arithmetic between the caller's columns and the kept ones. No loops over rows, no host sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ops import Compacted, compaction_index, take_columns
from ..ops import compact as compact_all


@dataclass(frozen=True)
class Compaction:
    """A batch of ragged keeps, padded to a common length.

    Attributes:
        index: [B, K] int64, the original column of every slot (arbitrary where ``valid`` is False).
        valid: [B, K] bool, slots that hold a token; the others are padding.
        keep: [B, L] bool, original columns that survive.
        source: [B, L] int64, the slot that every original column is grown from.
        length: L, the original length.
    """

    index: torch.Tensor
    valid: torch.Tensor
    keep: torch.Tensor
    source: torch.Tensor
    length: int

    @property
    def slots(self) -> int:
        """K, the compacted length."""
        return self.index.shape[1]

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather [B, L, ...] to [B, K, ...]."""
        return take_columns(tensor, self.index.to(tensor.device))

    def take_all(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor | None = None,
        visual: torch.Tensor | None = None,
        deepstack: Sequence[torch.Tensor] = (),
        rows: int = 0,
    ) -> Compacted:
        """Gather what a language model is given, in one launch.

        Args:
            embeds: [B, L, D].
            positions: [..., B, L] position ids; 0 in padding slots.
            visual: [B, L] bool, visual columns.
            deepstack: Per level, one row for every one of them in the batch.
            rows: How many of them survive.
        """
        return compact_all(embeds, self.index, self.valid, self.keep, positions, visual, deepstack, rows)

    def to(self, device: torch.device) -> Compaction:
        """The same on another device."""
        if self.index.device == device:
            return self
        index, valid, keep, source = (each.to(device) for each in (self.index, self.valid, self.keep, self.source))
        return Compaction(index, valid, keep, source, self.length)

    def then(self, later: Compaction) -> Compaction:
        """Both in one: this compaction, then ``later`` of its slots."""
        index = self.index.gather(1, later.index)
        keep = torch.zeros_like(self.keep).scatter(1, index, later.valid)
        return Compaction(index, later.valid, keep, later.source.gather(1, self.source), self.length)

    def grow(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring [B, K, D] back to [B, L, D]; a dropped column repeats the last kept column before it.

        So logits keep their shape, and the token after a dropped one is still predicted from the right state. Columns
        before the first kept one repeat that one.
        """
        return take_columns(tensor, self.source.to(tensor.device))


def untouched(valid: torch.Tensor) -> Compaction:
    """The compaction of [B, L] columns that leaves them as they are; ``valid`` says which hold a token."""
    index = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1)
    source = (valid.cumsum(1) - 1).clamp_min(0) + valid.long().argmax(1, keepdim=True)
    return Compaction(index, valid, valid, source, valid.shape[1])


def compact(keep: torch.Tensor, slots: int, right_padded: bool) -> Compaction:
    """Plan the compaction.

    Args:
        keep: [B, L] bool, columns that survive; padding columns are False.
        slots: The largest number of survivors in any row.
        right_padded: Rows shorter than ``slots`` are padded on the right, else on the left.
    """
    index, valid, source = compaction_index(keep, slots, right_padded)
    return Compaction(index, valid, keep, source, keep.shape[1])


def packed_positions(compaction: Compaction, start: torch.Tensor) -> torch.Tensor:
    """[B, K] positions without gaps, each row counting from ``start`` [B]."""
    rank = compaction.keep.long().cumsum(1) - 1
    return rank.gather(1, compaction.index) + start[:, None]
