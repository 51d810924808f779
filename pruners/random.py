"""Random: the baseline every method must beat.

A seeded random subset of the patch tokens. The seed is combined with the item's place in its prompt, so that a prompt
gives the same tokens alone and in a batch, and two images of one prompt get different draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_budget.pruner import Context, Pruner


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Keep a uniformly random subset.

    Attributes:
        seed: Seed of the draw.
    """

    seed: int = 0

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Draw ``k`` candidates without replacement, on the CPU so that every device gives the same draw."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + ctx.order)
        candidates = ctx.item.candidates
        return candidates[torch.randperm(len(candidates), generator=generator)[:k]].to(ctx.device)
