"""Radial attention: a static band that narrows with temporal distance.

Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation, arXiv:2506.19852, written
from the paper's description. Between frames a distance d apart, a token attends to those whose place in the frame is
near its own; the band halves whenever d doubles. Where it would be narrower than a block, fewer frames are attended to
instead. The first frame is seen by all.

Where this differs: frames are cut into blocks of their own (no block crosses two frames), and the width of the band is
solved for a density instead of being a decay factor tuned for a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from vlm_budget.errors import OptionError
from vlm_budget.video.dit.call import Blocks, Call, Grid
from vlm_budget.video.dit.method import SparseAttention, require_count
from vlm_budget.video.dit.selection import all_pairs, of
from vlm_budget.video.dit.tiles import Cut, even_parts, per_grid

HALVINGS = 40
"""Steps of the bisection for the width."""


@dataclass(frozen=True, kw_only=True)
class Radial(SparseAttention):
    """A band in space whose width halves with every doubling of the distance in time.

    Attributes:
        block_size: Tokens of a block, at most: a frame is cut into even parts.
        first_frame: Whether all tokens attend to the first frame.
    """

    block_size: int = 128
    first_frame: bool = True

    title = "band that narrows with temporal distance"
    paper = "arXiv 2506.19852"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require_count("block_size", self.block_size)
        if not isinstance(self.first_frame, bool):
            raise OptionError(f"first_frame must be True or False, got {self.first_frame!r}")

    def blocks(self, call: Call) -> Blocks:
        """Parts of frames as blocks, and the same map for all."""
        grid, device, density = call.grid, call.query.device, self.promised(call.grid)
        cut: Cut = per_grid(frame_parts, device, grid, self.block_size)
        if density >= 1:
            return all_pairs(cut, cut)
        return of(cut, cut, per_grid(radial_map, device, grid, self.block_size, self.first_frame, density))

    def least_density(self, grid: Grid) -> float:
        """A block's own tokens, and the first frame."""
        parts = _bands(grid, self.block_size, 0.0)
        return _pairs(grid, self.block_size, self.first_frame, parts) / grid.tokens**2


def frame_parts(grid: Grid, block_size: int) -> Cut:
    """Every frame cut into even parts, on the host."""
    parts = even_parts(grid.frame, block_size)
    return Cut(None, torch.tensor(parts * grid.frames, dtype=torch.int32, device="cpu")[None, None])


def radial_map(grid: Grid, block_size: int, first_frame: bool, density: float) -> torch.Tensor:
    """[1, 1, C, C] bool on the host: the widest band that is within a density."""
    bands = _bands(grid, block_size, _widest(grid, block_size, first_frame, density))
    frame = torch.arange(grid.frames, device="cpu")
    kept = bands[(frame[:, None] - frame).abs()]  # [F, F, P, P]
    if first_frame:
        kept[:, 0] = True
    count = grid.frames * bands.shape[1]
    return kept.transpose(1, 2).reshape(1, 1, count, count).contiguous()


@lru_cache(maxsize=256)
def _widest(grid: Grid, block_size: int, first_frame: bool, density: float) -> float:
    """Width of the band, in frames, that is the largest within a density."""
    low, high = 0.0, 2.0 * grid.frames
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        pairs = _pairs(grid, block_size, first_frame, _bands(grid, block_size, middle))
        low, high = (middle, high) if pairs <= density * grid.tokens**2 else (low, middle)
    return low


def _bands(grid: Grid, block_size: int, width: float) -> torch.Tensor:
    """[F, P, P] bool on the host: which parts of two frames attend to each other, by the frames' distance.

    Args:
        grid: Tokens of the video.
        block_size: Tokens of a part, at most.
        width: Half of the band between neighbouring frames, in frames' tokens.
    """
    sizes = torch.tensor(even_parts(grid.frame, block_size), dtype=torch.float64, device="cpu")
    middle = sizes.cumsum(0) - sizes / 2
    apart = (middle[:, None] - middle).abs()
    own, smallest = apart == 0, grid.frame / len(sizes) / 2
    bands = torch.zeros(grid.frames, len(sizes), len(sizes), dtype=torch.bool, device="cpu")
    for distance in range(grid.frames):
        half = width * grid.frame / 2 ** math.floor(math.log2(max(distance, 1)))
        if half >= smallest:
            bands[distance] = apart <= half
        elif half > 0:  # half a block is the narrowest band: every second frame, every fourth, …
            bands[distance] = own & (distance % 2 ** math.ceil(math.log2(smallest / half)) == 0)
    bands[0] |= own
    return bands


def _pairs(grid: Grid, block_size: int, first_frame: bool, bands: torch.Tensor) -> int:
    """Pairs of tokens within the bands."""
    sizes = torch.tensor(even_parts(grid.frame, block_size), dtype=torch.float64, device="cpu")
    pairs = (bands.double() @ sizes) @ sizes  # whole numbers far below 2^53
    distance = torch.arange(grid.frames, device="cpu")
    frames = torch.where(distance > 0, 2.0 * (grid.frames - distance), float(grid.frames))
    total = (pairs * frames).sum()
    if first_frame:
        total += (grid.frame**2 - pairs).sum()
    return int(total)
