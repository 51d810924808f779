"""SVG: every head attends either in space or in time.

Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity, arXiv:2502.01776 (ICML 2025),
written from the paper. Spatial heads get a band around the diagonal with tokens frame by frame; temporal heads the same
band with tokens place by place. Which of the two a head is, a few sampled rows tell: the one with the smaller error.

Where this differs: rows are sampled from the whole video (the released code draws them from the first 10,000 tokens),
the band is as wide as the density allows, in whole blocks, and the first frame is no sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vlm_budget.video.dit.call import Blocks, Call, Grid
from vlm_budget.video.dit.method import SparseAttention, require_count
from vlm_budget.video.dit.selection import all_pairs
from vlm_budget.video.dit.tiles import Cut, axis_tiles, drawn, fixed_blocks, per_grid, token_major

ENTRIES = 2**23
"""Logits held at a time when rows are sampled."""


@dataclass(frozen=True, kw_only=True)
class SVG1(SparseAttention):
    """A band in frame-major or in token-major order, chosen for every head.

    Attributes:
        block_size: Tokens of a block.
        rows: Sampled rows by which a head's order is chosen.
        reuse: Steps for which a choice is kept.
        seed: Of the sampled rows.
    """

    block_size: int = 128
    rows: int = 64
    reuse: int = 1
    seed: int = 0

    title = "spatial and temporal heads"
    paper = "arXiv 2502.01776"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require_count("block_size", self.block_size)
        require_count("rows", self.rows)
        require_count("reuse", self.reuse)
        require_count("seed", self.seed, least=0)

    def blocks(self, call: Call) -> Blocks:
        """Fixed blocks of either order, and one band for both."""
        grid, device, density = call.grid, call.query.device, self.promised(call.grid)
        cut: Cut = per_grid(fixed_blocks, device, grid.tokens, self.block_size)
        if density >= 1:
            return all_pairs(cut, cut)
        band = band_within(grid.tokens, self.block_size, density)
        temporal = self._temporal(call, band)[..., None]
        places = per_grid(token_major, device, grid)
        as_they_come = torch.arange(grid.tokens, dtype=torch.int32, device=device)
        order = torch.where(temporal, places, as_they_come)
        kept = per_grid(band_map, device, grid.tokens, self.block_size, band)
        return Blocks(order, cut.sizes, order, cut.sizes, kept, tile=cut.tile)

    def least_density(self, grid: Grid) -> float:
        """A block's own tokens."""
        return _pairs(grid.tokens, self.block_size, 0) / grid.tokens**2

    def overhead(self, grid: Grid, width: int, calls: int) -> float:
        """Logits of the sampled rows, and three outputs."""
        rows = min(self.rows, grid.tokens)
        return float(-(-calls // self.reuse) * rows * grid.tokens * width * 2 * (1 + 3))

    def _temporal(self, call: Call, band: int) -> torch.Tensor:
        """[B, H] bool, which heads are temporal; those of an earlier step while they are to be reused."""
        kept = call.state.get("svg1")
        step, shape = call.moment.step, call.query.shape[:2]
        if kept is not None and 0 <= step - kept[0] < self.reuse and kept[1].shape == shape:
            choice: torch.Tensor = kept[1]
            return choice
        seen: tuple[torch.Tensor, ...] = per_grid(
            sampled_masks, call.query.device, call.grid, self.block_size, band, self.rows, self.seed
        )
        choice = _errors(call, *seen).argmin(0) == 1
        call.state["svg1"] = (step, choice)
        return choice


def band_map(tokens: int, block_size: int, band: int) -> torch.Tensor:
    """[1, 1, C, C] bool on the host: blocks at most ``band`` apart."""
    block = torch.arange(-(-tokens // block_size), device="cpu")
    return ((block[:, None] - block).abs() <= band)[None, None]


@lru_cache(maxsize=256)
def band_within(tokens: int, block_size: int, density: float) -> int:
    """The widest band, in blocks to each side, that is within a density."""
    low, high = 0, -(-tokens // block_size)
    while high - low > 1:
        middle = (low + high) // 2
        fits = _pairs(tokens, block_size, middle) <= density * tokens**2
        low, high = (middle, high) if fits else (low, middle)
    return low


def _pairs(tokens: int, block_size: int, band: int) -> int:
    sizes = torch.tensor(axis_tiles(tokens, block_size), device="cpu")
    ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    block = torch.arange(len(sizes), device="cpu")
    seen = ends[(block + band + 1).clamp(max=len(sizes))] - ends[(block - band).clamp(min=0)]
    return int(sizes @ seen)


def sampled_masks(
    grid: Grid, block_size: int, band: int, rows: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On the host: [R] int64 sampled rows, and [R, N] bool which tokens each sees in a spatial and a temporal head."""
    sampled = drawn(grid.tokens, min(rows, grid.tokens), seed)
    spatial = torch.arange(grid.tokens, device="cpu")
    temporal = torch.empty_like(spatial).scatter_(0, token_major(grid).flatten().long(), spatial)
    near = [(place[sampled, None] // block_size - place // block_size).abs() <= band for place in (spatial, temporal)]
    return sampled, near[0], near[1]


def _errors(call: Call, rows: torch.Tensor, spatial: torch.Tensor, temporal: torch.Tensor) -> torch.Tensor:
    """[2, B, H] float32, squared errors of the sampled rows as a spatial and as a temporal head."""
    batch, heads = call.query.shape[:2]
    errors = torch.empty(2, batch, heads, device=call.query.device)
    query = call.queries.index_select(2, rows)
    step = max(1, ENTRIES // spatial.numel())
    for sample in range(batch):
        for first in range(0, heads, step):
            at = (sample, slice(first, first + step))
            value = call.values[at]
            logits = ((query[at] * call.scale) @ call.keys[at].mT).float()
            dense = logits.softmax(-1).to(value.dtype) @ value
            for kind, seen in enumerate((spatial, temporal)):
                out = logits.masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype) @ value
                errors[kind, sample, at[1]] = (out - dense).float().square().mean((-1, -2))
    return errors
