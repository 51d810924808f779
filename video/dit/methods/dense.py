"""All pairs: what every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_budget.errors import OptionError
from vlm_budget.video.dit.call import Blocks, Call, Grid
from vlm_budget.video.dit.method import SparseAttention
from vlm_budget.video.dit.selection import all_pairs
from vlm_budget.video.dit.tiles import Cut, fixed_blocks, per_grid


@dataclass(frozen=True, kw_only=True)
class Dense(SparseAttention):
    """Everything is computed, in one block; a pipeline that is patched with it runs as it did.

    Attributes:
        density: 1, which None stands for.
    """

    title = "all pairs"
    paper = ""

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.density not in (None, 1):
            raise OptionError(f"density must be 1 for dense attention, got {self.density!r}. Name a sparse method.")

    @property
    def settled(self) -> bool:
        """Always."""
        return True

    def promised(self, grid: Grid) -> float:
        """1."""
        return 1.0

    def least_density(self, grid: Grid) -> float:
        """1."""
        return 1.0

    def blocks(self, call: Call) -> Blocks:
        """One block of queries, one of keys."""
        cut: Cut = per_grid(fixed_blocks, call.query.device, call.grid.tokens, call.grid.tokens)
        return all_pairs(cut, cut)
