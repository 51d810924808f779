"""Random: the baseline every method must beat.

A seeded random subset of the patch tokens. The seed is combined with the item's place in its prompt, so that a prompt
gives the same tokens alone and in a batch, and two images of one prompt get different draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_budget.errors import OptionError
from vlm_budget.pruner import Context, Pruner


@dataclass(frozen=True, kw_only=True)
class Random(Pruner):
    """Keep a uniformly random subset.

    Attributes:
        seed: Seed of the draw, any int.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the seed."""
        super().__post_init__()
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise OptionError(f"seed must be an int, got {self.seed!r}")

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Draw ``k`` candidates without replacement, on the CPU so that every device gives the same draw."""
        generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + ctx.order) % 2**63)
        candidates = ctx.item.candidates
        return ctx.there(candidates[torch.randperm(len(candidates), generator=generator, device="cpu")[:k]])
