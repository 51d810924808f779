"""Sliding tile attention: a window of 3-D tiles around every tile.

Fast Video Generation with Sliding Tile Attention, arXiv:2502.04507, written from the paper. Tiles slide as a whole, so
that no block is computed in part; at the video's borders the window is shifted inside, and keeps its size.

Where this differs: grids need not be multiples of the tile (the last tiles are smaller, and counted as such), the
window may be chosen by a density, and it is the same for all heads (the paper searches one for every head).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from vlm_budget.errors import OptionError
from vlm_budget.video.dit.call import Blocks, Call, Grid
from vlm_budget.video.dit.method import SparseAttention, require_extent
from vlm_budget.video.dit.selection import of
from vlm_budget.video.dit.tiles import Cut, Extent, axis_tiles, cube_counts, cubes, per_grid, sides


@dataclass(frozen=True, kw_only=True)
class SlidingTile(SparseAttention):
    """Every tile attends to a window of tiles around it.

    Attributes:
        extent: Of a tile, in frames, rows and columns.
        window: Tiles along each axis; one that is longer than the video covers it. None: as large as the density
            allows, growing along the axis of which it covers the smallest share.
    """

    extent: Extent = (3, 4, 4)
    window: Extent | None = None

    title = "window of 3-D tiles"
    paper = "arXiv 2502.04507"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        require_extent("extent", self.extent)
        if self.window is not None:
            require_extent("window", self.window)
            if self.density is not None:
                raise OptionError(f"give a window or a density, got window={self.window} and density={self.density}")

    @property
    def settled(self) -> bool:
        """Whether there is a window or a density."""
        return self.density is not None or self.window is not None

    def blocks(self, call: Call) -> Blocks:
        """Tiles as blocks, and the same map for all."""
        grid, device = call.grid, call.query.device
        window = self.window or window_within(grid, self.extent, self.promised(grid))
        cut: Cut = per_grid(cubes, device, grid, self.extent)
        return of(cut, cut, per_grid(window_map, device, grid, self.extent, window))

    def least_density(self, grid: Grid) -> float:
        """Its own tile for every tile."""
        return float(window_density(grid, self.extent, (1, 1, 1)))


def along(count: int, window: int) -> torch.Tensor:
    """[count, count] bool on the host: the window of each tile along one axis, shifted inside at both ends."""
    first = (torch.arange(count, device="cpu") - window // 2).clamp(0, max(count - window, 0))[:, None]
    tile = torch.arange(count, device="cpu")
    return (tile >= first) & (tile < first + window)


def window_map(grid: Grid, extent: Extent, window: Extent) -> torch.Tensor:
    """[1, 1, C, C] bool on the host, tiles in raster order."""
    counts = cube_counts(grid, extent)
    frames, rows, cols = (along(count, width) for count, width in zip(counts, window, strict=True))
    kept = torch.kron(torch.kron(frames.byte(), rows.byte()), cols.byte())
    return kept.bool()[None, None]


def window_density(grid: Grid, extent: Extent, window: Extent) -> Fraction:
    """Share of the pairs of tokens in a window: the product of those along the axes."""
    share = Fraction(1)
    for length, part, width in zip(sides(grid), extent, window, strict=True):
        tiles = torch.tensor(axis_tiles(length, part), device="cpu")
        share *= Fraction(int(tiles @ along(len(tiles), width).long() @ tiles), length * length)
    return share


@lru_cache(maxsize=256)
def window_within(grid: Grid, extent: Extent, density: float) -> Extent:
    """The window that grew as far as a density allows, evenly in shares of the axes."""
    counts, window = cube_counts(grid, extent), [1, 1, 1]
    growing = {0, 1, 2}
    while growing:
        axis = min(growing, key=lambda at: (Fraction(window[at], counts[at]), at))
        larger = [width + (at == axis) for at, width in enumerate(window)]
        fits = larger[axis] <= counts[axis]
        if fits and float(window_density(grid, extent, (larger[0], larger[1], larger[2]))) <= density:
            window = larger
        else:
            growing.remove(axis)
    return window[0], window[1], window[2]
