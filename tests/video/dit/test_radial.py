"""Radial attention: a band whose width halves with every doubling of the distance in time."""

from __future__ import annotations

import pytest
import torch

from video_calls import ODD, call_of, computed, dense_under, video_density, video_mask
from vlm_budget.errors import OptionError
from vlm_budget.video.dit.call import Grid
from vlm_budget.video.dit.methods.radial import Radial


def frames_seen(call, blocks) -> torch.Tensor:
    """[F, F] how many pairs of tokens of two frames are computed."""
    grid = call.grid
    mask = video_mask(call, blocks)[0, 0].view(grid.frames, grid.frame, grid.frames, grid.frame)
    return mask.sum((1, 3))


@pytest.mark.parametrize("first_frame", [True, False])
@pytest.mark.parametrize("grid", [ODD, Grid(8, 6, 7), Grid(1, 9, 9), Grid(12, 4, 11)], ids=str)
def test_a_density_is_kept_and_nearly_spent(grid: Grid, first_frame: bool) -> None:
    method = Radial(block_size=8, first_frame=first_frame)
    call = call_of(grid)
    for density in (method.least_density(grid), 0.4, 0.6, 0.9):
        if density < method.least_density(grid):
            continue
        out, blocks = computed(Radial(block_size=8, first_frame=first_frame, density=density), call)
        spent = video_density(call, blocks)
        assert spent <= density + 1e-12 and (spent > 0.6 * density or density == method.least_density(grid))
        assert torch.allclose(out.double(), dense_under(call, blocks)[0], atol=1e-5)


def test_the_band_narrows_with_the_distance_in_time_only() -> None:
    grid = Grid(17, 6, 8)
    call = call_of(grid, heads=1, width=4)
    blocks = Radial(block_size=4, first_frame=False, density=0.3).blocks(call)
    seen = frames_seen(call, blocks)
    for distance in range(17):
        pairs = seen.diagonal(distance)
        assert (pairs == pairs[0]).all() and torch.equal(pairs, seen.diagonal(-distance))
    widths = [int(seen[0, distance]) for distance in (1, 2, 4, 8, 16)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 1.5 * widths[1] > 2 * widths[2]
    assert int(seen[0, 2]) == int(seen[0, 3])


def test_pairs_within_a_frame_are_near_each_other() -> None:
    grid = Grid(4, 4, 10)
    call = call_of(grid, heads=1, width=4)
    mask = video_mask(call, Radial(block_size=5, first_frame=False, density=0.3).blocks(call))[0, 0]
    mask = mask.view(4, 40, 4, 40)
    place = torch.arange(40)
    apart = (place[:, None] // 5 - place // 5).abs()
    for one in range(4):
        for other in range(4):
            near, far = apart[mask[one, :, other]], apart[~mask[one, :, other]]
            assert not len(near) or not len(far) or int(near.max()) < int(far.min())


def test_every_token_sees_its_own_block_and_the_first_frame() -> None:
    call = call_of(Grid(6, 4, 6), heads=1)
    least = Radial(block_size=6).least_density(call.grid)
    mask = video_mask(call, Radial(block_size=6, density=least).blocks(call))[0, 0]
    assert mask.diagonal().all() and mask[:, :24].all()
    assert least == pytest.approx(float(mask.double().mean()), rel=1e-12)
    bare = video_mask(call, Radial(block_size=6, density=least, first_frame=False).blocks(call))[0, 0]
    assert not bare[100, :24].all()


def test_far_frames_are_left_out_by_halves_where_the_band_is_narrower_than_a_block() -> None:
    call = call_of(Grid(17, 4, 8), heads=1, width=4)
    seen = frames_seen(call, Radial(block_size=16, first_frame=False, density=0.25).blocks(call))
    there = [distance for distance in range(17) if seen[0, distance]]
    assert there == [0, 1, 2, 4, 8, 16]


def test_no_block_crosses_frames_and_the_map_is_one_for_all() -> None:
    blocks = Radial(block_size=10, density=0.6).blocks(call_of(batch=2))
    sizes = blocks.key_sizes[0, 0].view(ODD.frames, -1)
    assert (sizes.sum(1) == ODD.frame).all() and int(sizes.max()) <= 10
    assert blocks.kept.shape[:2] == (1, 1) and blocks.query_order is None


def test_everything_is_dense_and_too_little_is_refused() -> None:
    call = call_of()
    assert Radial(density=1.0).blocks(call).kept.all()
    with pytest.raises(OptionError, match="below the minimum of Radial on a grid of 5x7x9"):
        Radial(density=0.1).blocks(call)
    with pytest.raises(OptionError, match="first_frame must be True or False"):
        Radial(first_frame=2)
    with pytest.raises(OptionError, match="block_size must be"):
        Radial(block_size=0)
