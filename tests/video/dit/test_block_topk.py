"""Block top-k: cubes or fixed blocks, by mean-pooled scores or at random."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from video_calls import (
    ODD,
    at_step,
    block_of,
    call_of,
    computed,
    dense_under,
    densest_row,
    sample_of,
    video_density,
)
from vlm_budget.errors import OptionError
from vlm_budget.video.dit.attend import pairs
from vlm_budget.video.dit.call import Grid
from vlm_budget.video.dit.methods.block_topk import BlockTopK
from vlm_budget.video.dit.methods.dense import Dense
from vlm_budget.video.dit.tiles import axis_tiles, even_parts

CLOSE = {"atol": 1e-5, "rtol": 0.0}
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"extent": (2, 3, 4)},
        {"cut": "fixed", "block_size": 16},
        {"extent": (2, 3, 4), "choose": "random"},
        {"cut": "fixed", "block_size": 13, "choose": "random"},
    ],
    ids=str,
)


@KINDS
@pytest.mark.parametrize("correction", [False, True])
def test_it_equals_dense_attention_under_its_blocks(kind: dict, correction: bool) -> None:
    call = call_of(batch=2, text=5, first=5, valid=[5, 3])
    out, blocks = computed(BlockTopK(density=0.4, correction=correction, **kind), call)
    assert torch.allclose(out.double(), dense_under(call, blocks)[0], **CLOSE)


@KINDS
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("grid", [ODD, Grid(4, 8, 8), Grid(1, 17, 13)], ids=str)
def test_no_row_computes_more_than_the_density_promises(kind: dict, correction: bool, grid: Grid) -> None:
    call = call_of(grid)
    for density in (BlockTopK(correction=correction, **kind).least_density(grid), 0.4, 0.9):
        _, blocks = computed(BlockTopK(density=density, correction=correction, **kind), call)
        assert densest_row(call, blocks) <= density + 1e-9
    assert video_density(call, blocks) > 0.8


def test_cubes_are_3d_tiles() -> None:
    call = call_of()
    blocks = BlockTopK(density=0.4, extent=(2, 3, 4)).blocks(call)
    labels = block_of(blocks.query_order, blocks.query_sizes, ODD.tokens)[0, 0].view(5, 7, 9)
    for f, r, c in product(range(5), range(7), range(9)):
        assert labels[f, r, c] == (f // 2 * 3 + r // 3) * 3 + c // 4
    assert blocks.query_sizes.shape == (1, 1, 27)


def test_the_best_blocks_are_those_of_the_largest_mean_score() -> None:
    call = call_of(Grid(1, 8, 8), heads=1)
    blocks = BlockTopK(density=0.5, cut="fixed", block_size=8).blocks(call)
    query, key = (side.view(8, 8, -1).mean(1) for side in (call.query, call.key))
    want = (query @ key.T).topk(4).indices
    assert torch.equal(blocks.kept[0, 0], torch.zeros(8, 8, dtype=torch.bool).scatter_(1, want, True))


def test_random_blocks_are_drawn_anew_and_alike_in_every_run_and_sample() -> None:
    method, call = BlockTopK(density=0.4, extent=(2, 3, 4), choose="random"), call_of(batch=2)
    first, again, later = (method.blocks(at_step(call, step)).kept for step in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert torch.equal(method.blocks(sample_of(call, 1)).kept, first)
    assert not torch.equal(BlockTopK(density=0.4, extent=(2, 3, 4), choose="random", seed=1).blocks(call).kept, first)
    counted = sum(method.blocks(at_step(call, step)).kept.double().mean((0, 1)) for step in range(60)) / 60
    assert float(counted.mean(0).min()) > 0.2 and float(counted.mean(0).max()) < 0.6  # no block is favoured


@KINDS
def test_a_density_of_one_equals_dense_attention(kind: dict) -> None:
    call = call_of(batch=2)
    dense, _ = computed(Dense(), call)
    out, blocks = computed(BlockTopK(density=1.0, correction=True, **kind), call)
    assert torch.allclose(out, dense, **CLOSE) and float(pairs(call, blocks)) == 1


def test_dense_is_all_pairs_and_nothing_else() -> None:
    call = call_of(batch=2, text=3)
    out, blocks = computed(Dense(), call)
    want = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scale)
    assert torch.allclose(out, want, **CLOSE) and float(pairs(call, blocks)) == 1
    assert Dense().settled and Dense().least_density(ODD) == 1
    with pytest.raises(OptionError, match="density must be 1 for dense attention, got 0.5"):
        Dense(density=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cut": "clusters"}, "cut must be 'cubes' or 'fixed'"),
        ({"choose": "max"}, "choose must be 'mean' or 'random'"),
        ({"extent": (4, 4)}, "extent must be three ints"),
        ({"extent": (4, 0, 4)}, "extent must be an int of at least 1"),
        ({"block_size": -1}, "block_size must be"),
        ({"correction": None}, "correction must be"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict, words: str) -> None:
    with pytest.raises(OptionError) as error:
        BlockTopK(**options)
    assert words in str(error.value)


def test_densities_and_numbers_of_blocks_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(OptionError, match="below the minimum of BlockTopK on a grid of 5x7x9"):
        BlockTopK(density=0.1).blocks(call_of())
    with pytest.raises(OptionError, match="at most 4096 blocks of keys can be chosen from, got 4100"):
        BlockTopK(density=0.5, extent=(1, 1, 1)).blocks(call_of(Grid(41, 10, 10), heads=1, width=2))


@pytest.mark.parametrize(("length", "size"), [(1, 1), (7, 3), (63, 64), (111, 10), (577, 128)])
def test_parts_of_an_axis(length: int, size: int) -> None:
    tiles, even = axis_tiles(length, size), even_parts(length, size)
    assert sum(tiles) == sum(even) == length and len(tiles) == len(even) == -(-length // size)
    assert set(tiles[:-1]) <= {size} and max(even) - min(even) <= 1 and max(even) <= size
