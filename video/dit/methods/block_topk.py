"""Block top-k: blocks that do not depend on what they hold, chosen by the means of their tokens.

Mean-pooled scores choose the blocks in several published methods (SpargeAttn, arXiv:2502.18137; DraftAttention,
arXiv:2505.14708; VSA's coarse stage, arXiv:2505.13389, whose cubes are ours too). Written from their descriptions: no
gate, no quantisation, no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlm_budget.errors import OptionError
from vlm_budget.ops import block_means
from vlm_budget.video.dit.call import Blocks, Call, Grid, Moment
from vlm_budget.video.dit.method import (
    SparseAttention,
    require_count,
    require_extent,
    require_one_of,
)
from vlm_budget.video.dit.selection import (
    Rule,
    all_pairs,
    corrected,
    estimated,
    most_probable,
    require_blocks,
    tokens_within,
)
from vlm_budget.video.dit.tiles import Cut, Extent, cube_counts, cubes, fixed_blocks, per_grid, sides


@dataclass(frozen=True, kw_only=True)
class BlockTopK(SparseAttention):
    """Every block of queries takes the key blocks of the highest estimated mass, up to the density.

    Attributes:
        cut: ``"cubes"``: 3-D tiles of neighbouring tokens; ``"fixed"``: ``block_size`` tokens as they come.
        extent: Of a cube, in frames, rows and columns.
        block_size: Tokens of a fixed block.
        choose: ``"mean"``, or ``"random"``: other blocks in every call, a control that shows what choosing is worth.
        correction: Dropped blocks count by their mean key and value (SVG-EAR, arXiv:2603.08982).
        seed: Of random blocks.
    """

    cut: Literal["cubes", "fixed"] = "cubes"
    extent: Extent = (4, 4, 4)
    block_size: int = 128
    choose: Literal["mean", "random"] = "mean"
    correction: bool = False
    seed: int = 0

    title = "cubes or fixed blocks, by mean-pooled scores"
    paper = "arXiv 2502.18137"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require_one_of("cut", self.cut, ("cubes", "fixed"))
        require_one_of("choose", self.choose, ("mean", "random"))
        require_extent("extent", self.extent)
        require_count("block_size", self.block_size)
        require_count("seed", self.seed, least=0)
        if not isinstance(self.correction, bool):
            raise OptionError(f"correction must be True or False, got {self.correction!r}")

    def blocks(self, call: Call) -> Blocks:
        """Blocks of queries and keys alike."""
        grid, density = call.grid, self.promised(call.grid)
        count, _ = self._blocks(grid)
        require_blocks(count)
        cut: Cut = (
            per_grid(cubes, call.query.device, grid, self.extent)
            if self.cut == "cubes"
            else per_grid(fixed_blocks, call.query.device, grid.tokens, self.block_size)
        )
        if density >= 1:
            return all_pairs(cut, cut)
        rule = Rule(tokens=tokens_within(density, grid.tokens) - (count if self.correction else 0))
        if self.choose == "mean":
            return estimated(call, cut, cut, rule, self.correction)
        heads = call.query.shape[1]
        mass = _random(call.moment, self.seed, heads, count, call.query.device)
        kept = most_probable(mass, cut.sizes, rule)
        means = block_means(call.keys, cut.order, cut.sizes) if self.correction else None
        return corrected(call, cut, cut, kept, means)

    def least_density(self, grid: Grid) -> float:
        """One block, and one column for each block where dropped ones are corrected."""
        count, largest = self._blocks(grid)
        return min((largest + (count if self.correction else 0)) / grid.tokens, 1.0)

    def overhead(self, grid: Grid, width: int, calls: int) -> float:
        """Means, and their products."""
        count, _ = self._blocks(grid)
        means = grid.tokens * width * (2 if self.choose == "mean" else 0)
        means += grid.tokens * width * (1 if self.choose == "mean" else 2) if self.correction else 0
        return float(calls * (means + (2 * count * count * width if self.choose == "mean" else 0)))

    def _blocks(self, grid: Grid) -> tuple[int, int]:
        """How many there are, and the tokens of the largest."""
        if self.cut == "fixed":
            return -(-grid.tokens // self.block_size), min(self.block_size, grid.tokens)
        frames, rows, cols = cube_counts(grid, self.extent)
        largest = 1
        for length, part in zip(sides(grid), self.extent, strict=True):
            largest *= min(length, part)
        return frames * rows * cols, largest


def _random(moment: Moment, seed: int, heads: int, count: int, device: torch.device) -> torch.Tensor:
    """[1, H, C, C] float32, drawn anew for every step, layer, branch and part, and alike for all samples."""
    drawn = hash((seed, moment.step, moment.layer, moment.branch, moment.part)) & (2**63 - 1)
    generator = torch.Generator(device).manual_seed(drawn)
    return torch.rand(1, heads, count, count, generator=generator, device=device)
