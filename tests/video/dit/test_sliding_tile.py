"""Sliding tile attention: the same window for every tile, shifted inside at the borders."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from video_calls import ODD, call_of, computed, dense_under, video_density, video_mask
from vlm_budget.errors import OptionError
from vlm_budget.video.dit.call import Grid
from vlm_budget.video.dit.methods.sliding_tile import SlidingTile, window_density, window_within
from vlm_budget.video.dit.tiles import cube_counts

EXTENT = (2, 3, 4)


def window_by_hand(grid: Grid, extent: tuple, window: tuple) -> torch.Tensor:
    """[N, N] bool, with loops over the tokens."""
    counts = cube_counts(grid, extent)
    places = list(product(range(grid.frames), range(grid.rows), range(grid.cols)))
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            inside = True
            for at in range(3):
                first = min(max(query[at] // extent[at] - window[at] // 2, 0), max(counts[at] - window[at], 0))
                inside &= first <= key[at] // extent[at] < first + window[at]
            mask[i, j] = inside
    return mask


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 2, 1), (2, 3, 2), (5, 5, 5)], ids=str)
def test_the_window_by_hand(window: tuple) -> None:
    grid = Grid(3, 7, 5)
    call = call_of(grid, batch=2, text=3)
    out, blocks = computed(SlidingTile(extent=EXTENT, window=window), call)
    want = window_by_hand(grid, EXTENT, window)
    assert torch.equal(video_mask(call, blocks)[1, 1], want)
    assert float(window_density(grid, EXTENT, window)) == pytest.approx(float(want.double().mean()), rel=1e-12)
    assert torch.allclose(out.double(), dense_under(call, blocks)[0], atol=1e-5)


def test_every_inner_tile_has_a_window_of_the_same_size() -> None:
    grid = Grid(6, 12, 16)
    call = call_of(grid, heads=1, width=4)
    seen = video_mask(call, SlidingTile(extent=EXTENT, window=(1, 3, 3)).blocks(call)).sum(-1)
    assert (seen == 2 * 9 * 12).all()


@pytest.mark.parametrize("grid", [ODD, Grid(21, 30, 52), Grid(1, 9, 40)], ids=str)
def test_a_density_is_kept_and_no_axis_could_grow_further(grid: Grid) -> None:
    method = SlidingTile(extent=EXTENT)
    for density in (method.least_density(grid), 0.15, 0.3, 0.7):
        if density < method.least_density(grid):
            continue
        window = window_within(grid, EXTENT, density)
        assert window_density(grid, EXTENT, window) <= density + 1e-12
        for axis, count in enumerate(cube_counts(grid, EXTENT)):
            larger = tuple(width + (at == axis) for at, width in enumerate(window))
            assert larger[axis] > count or window_density(grid, EXTENT, larger) > density
    assert window_within(grid, EXTENT, 1.0) == cube_counts(grid, EXTENT)


def test_blocks_keep_the_density() -> None:
    call = call_of()
    for density in (0.12, 0.5):
        blocks = SlidingTile(extent=EXTENT, density=density).blocks(call)
        assert 0.5 * density < video_density(call, blocks) <= density
        assert blocks.kept.shape[:2] == (1, 1)


def test_a_window_settles_the_density_and_excludes_one() -> None:
    assert SlidingTile(window=(3, 3, 3)).settled and not SlidingTile().settled
    with pytest.raises(OptionError, match="give a window or a density"):
        SlidingTile(window=(3, 3, 3), density=0.2)
    with pytest.raises(OptionError, match="window must be three ints"):
        SlidingTile(window=3)
    with pytest.raises(OptionError, match="below the minimum of SlidingTile"):
        SlidingTile(density=0.01).blocks(call_of())
