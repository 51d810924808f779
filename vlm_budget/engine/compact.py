"""Index arithmetic between the caller's columns and the kept ones. No loops over rows, one host sync per prefill."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Compaction:
    """A batch of ragged keeps, padded to a common length.

    Attributes:
        index: [B, K] int64, the original column of every slot (arbitrary where ``valid`` is False).
        valid: [B, K] bool, slots that hold a token; the others are padding.
        keep: [B, L] bool, original columns that survive.
        length: L, the original length.
    """

    index: torch.Tensor
    valid: torch.Tensor
    keep: torch.Tensor
    length: int

    @property
    def slots(self) -> int:
        """K, the compacted length."""
        return self.index.shape[1]

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather [B, L, ...] to [B, K, ...]."""
        index = self.index.to(tensor.device)
        return tensor.gather(1, index.reshape(*index.shape, *[1] * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:]))

    def take_last(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather [..., B, L] to [..., B, K]."""
        index = self.index.to(tensor.device)
        return tensor.gather(-1, index.expand(*tensor.shape[:-1], -1))

    def to(self, device: torch.device) -> Compaction:
        """The same on another device."""
        if self.index.device == device:
            return self
        return Compaction(self.index.to(device), self.valid.to(device), self.keep.to(device), self.length)

    def then(self, later: Compaction) -> Compaction:
        """Both in one: this compaction, then ``later`` of its slots."""
        index = self.index.gather(1, later.index)
        return Compaction(index, later.valid, torch.zeros_like(self.keep).scatter(1, index, later.valid), self.length)

    def grow(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring [B, K, D] back to [B, L, D]; a dropped column repeats the last kept column before it.

        So logits keep their shape, and the token after a dropped one is still predicted from the right state. Columns
        before the first kept one repeat that one.
        """
        before = (self.keep.cumsum(1) - 1).clamp_min(0)
        source = (before + self.valid.long().argmax(1, keepdim=True)).to(tensor.device)
        return tensor.gather(1, source[..., None].expand(-1, -1, tensor.shape[-1]))


def untouched(valid: torch.Tensor) -> Compaction:
    """The compaction of [B, L] columns that leaves them as they are; ``valid`` says which hold a token."""
    index = torch.arange(valid.shape[1], device=valid.device).expand(len(valid), -1)
    return Compaction(index, valid, valid, valid.shape[1])


def compact(keep: torch.Tensor, slots: int, right_padded: bool) -> Compaction:
    """Plan the compaction.

    Args:
        keep: [B, L] bool, columns that survive; padding columns are False.
        slots: The largest number of survivors in any row.
        right_padded: Rows shorter than ``slots`` are padded on the right, else on the left.
    """
    # A stable sort of the flags lists survivors in order, at the end that the padding leaves free.
    order = keep.to(torch.uint8).argsort(dim=1, stable=True, descending=right_padded)
    index = order[:, :slots] if right_padded else order[:, order.shape[1] - slots :]
    return Compaction(index, keep.gather(1, index), keep, keep.shape[1])


def packed_positions(compaction: Compaction, start: torch.Tensor) -> torch.Tensor:
    """[B, K] positions without gaps, each row counting from ``start`` [B]."""
    rank = compaction.keep.long().cumsum(1) - 1
    return rank.gather(1, compaction.index) + start[:, None]
