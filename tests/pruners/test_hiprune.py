"""HiPrune: anchors with their neighbours, then deep attention, in exact numbers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Attention, Context
from vlm_budget.pruners.hiprune import HiPrune, grid_neighbours

OBJECTS, DEEP = Attention(9, "received"), Attention(22, "received")


def scene(item: VisualItem, seed: int = 0, levels: int | None = None) -> Context:
    return make.context(item, make.random_attention(HiPrune(), item, seed, levels=levels))


def naive_grid(ctx: Context, index: int, share: int, alpha: float) -> set[int]:
    """Kept tokens of one partition, token by token."""
    item = ctx.item
    tokens = (item.partition == index).nonzero().flatten().tolist()
    grid = item.partitions[index]
    at = {divmod(int(item.patch[token]), grid.cols): token for token in tokens}
    objects, deep = ctx.token_scores(OBJECTS).tolist(), ctx.token_scores(DEEP).tolist()
    anchors = sorted(tokens, key=lambda token: -objects[token])[: round(alpha * share / 5)]
    around = set()
    for (row, col), token in at.items():
        if token in anchors:
            around |= {at[p] for p in ((row, col - 1), (row, col + 1), (row - 1, col), (row + 1, col)) if p in at}
    neighbours = sorted(around - set(anchors), key=lambda token: -deep[token])
    first = [*anchors, *neighbours]
    rest = sorted(set(tokens) - set(first), key=lambda token: -deep[token])
    return set([*first, *rest][:share])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "cols"), [(24, 24), (7, 9), (1, 7), (7, 1), (1, 1)])
def test_a_grid_is_pruned_by_the_formula(rows: int, cols: int, alpha: float, seed: int) -> None:
    ctx, size = scene(make.single(rows, cols), seed), rows * cols
    for k in {1, max(size // 9, 1), max(size // 2, 1), max(size - 1, 1), size}:
        assert set(HiPrune(alpha=alpha).select(ctx, k).keep.tolist()) == naive_grid(ctx, 0, k, alpha)


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_partitions_split_the_budget_equally(alpha: float) -> None:
    for item, k, shares in [
        (make.frames(3, 4, 5), 39, [13, 13, 13]),
        (make.anyres(1, 3, side=4, pad=(0, 3)), 28, [10, 4, 10, 4]),  # the outer crops show one column
        (make.anyres(1, 3, side=4, pad=(0, 4)), 13, [7, 0, 6, 0]),
    ]:
        ctx = scene(item)
        want = set().union(*(naive_grid(ctx, index, share, alpha) for index, share in enumerate(shares)))
        assert set(HiPrune(alpha=alpha).select(ctx, k).keep.tolist()) == want


def test_an_anchor_brings_its_cross() -> None:
    objects, deep = torch.zeros(25), torch.zeros(25)
    objects[12] = 1.0
    deep[0] = 1.0
    ctx = make.context(make.single(5), {OBJECTS: [objects], DEEP: [deep]})
    assert HiPrune(alpha=0.8).select(ctx, 6).keep.tolist() == [0, 7, 11, 12, 13, 17]
    # Five do not fit: the anchor first, then neighbours by deep attention, ties to the earlier.
    assert HiPrune(alpha=1.0).select(ctx, 3).keep.tolist() == [7, 11, 12]


def test_an_anchor_at_the_end_of_a_row_does_not_wrap() -> None:
    objects, deep = torch.zeros(16), torch.arange(16.0)
    objects[7] = 1.0
    ctx = make.context(make.single(4), {OBJECTS: [objects], DEEP: [deep]})
    assert HiPrune(alpha=1.0).select(ctx, 5).keep.tolist() == [3, 6, 7, 11, 15]


def test_neighbours_stay_in_their_grid_and_padding_is_none() -> None:
    item = make.anyres(1, 2, side=2, pad=(0, 1))
    assert item.patch.tolist() == [0, 1, 2, 3, 1, 0, -1, 3, 2, -1]
    found = grid_neighbours(item).tolist()
    assert found[:4] == [[-1, 1, -1, 2], [0, -1, -1, 3], [-1, 3, 0, -1], [2, -1, 1, -1]]
    assert found[4:] == [
        [-1, -1, -1, 7],
        [-1, -1, -1, 8],
        [-1] * 4,
        [-1, -1, 4, -1],
        [-1, -1, 5, -1],
        [-1] * 4,
    ]


@given(make.items(), st.data(), st.floats(0, 1), st.integers(0, 3))
def test_ties_and_odd_shapes_keep_counts(item: VisualItem, data: st.DataObject, alpha: float, seed: int) -> None:
    k = data.draw(st.integers(1, item.size))
    assert len(HiPrune(alpha=alpha).select(scene(item, seed, levels=1), k).keep) == k


def test_layers_lie_where_they_were_published_in_the_depth() -> None:
    assert HiPrune().needs(make.CLIP) == (OBJECTS, DEEP)
    assert HiPrune().needs(make.SIGLIP) == (Attention(10, "received"), Attention(25, "received"))
    assert HiPrune(object_layer=1, deep_layer=2).needs(make.CLIP) == (
        Attention(1, "received"),
        Attention(2, "received"),
    )


def test_one_layer_may_serve_both_purposes() -> None:
    pruner = HiPrune(object_layer=22)
    item = make.single(6)
    ctx = make.context(item, make.random_attention(pruner, item))
    assert len(ctx.attention) == 1
    best = ctx.attention[DEEP][0].topk(9).indices
    assert set(HiPrune(object_layer=22, alpha=0).select(ctx, 9).keep.tolist()) == set(best.tolist())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.1}, r"alpha must lie in \[0, 1\], got 1.1"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": "a"}, "alpha must be a number"),
        ({"object_layer": 1.5}, "object_layer must be an int or None, got 1.5"),
        ({"deep_layer": "last"}, "deep_layer must be an int or None, got 'last'"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HiPrune(**fields)


@pytest.mark.gpu
def test_the_gpu_keeps_what_the_cpu_keeps() -> None:
    pruner = HiPrune(alpha=0.5)
    item = make.anyres(2, 2, side=12, pad=(3, 0))
    attention = make.random_attention(pruner, item)
    on_gpu = {need: [row.cuda() for row in rows] for need, rows in attention.items()}
    want = pruner.select(make.context(item, attention), 111)
    found = pruner.select(make.context(item, on_gpu, device="cuda"), 111)
    assert found.keep.is_cuda and torch.equal(found.keep.cpu(), want.keep)
