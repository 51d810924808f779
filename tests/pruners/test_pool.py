"""Pool: every token in exactly one cell, exactly as many cells as the budget has tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget.layout import VisualItem
from vlm_budget.pruners.pool import Pool, cell_means, cells_of

sides = st.integers(1, 15)


def rectangle(top: int, left: int, height: int, width: int, cols: int) -> torch.Tensor:
    rows, columns = torch.arange(top, top + height)[:, None], torch.arange(left, left + width)
    return (rows * cols + columns).flatten()


@given(st.data(), sides, sides, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_cells_are_even_rectangles_in_exact_number(
    data: st.DataObject, height: int, width: int, top: int, left: int, right: int
) -> None:
    cols = left + width + right
    patch = rectangle(top, left, height, width, cols)  # unpadding leaves a rectangle
    count = data.draw(st.integers(1, len(patch)))
    cells = cells_of(patch, cols, count)
    assert cells.unique().tolist() == list(range(count))
    heights, widths = set(), {}
    for cell in range(count):
        inside = patch[cells == cell]
        rows, columns = (inside // cols).unique(), (inside % cols).unique()
        assert len(inside) == len(rows) * len(columns)
        assert rows[-1] - rows[0] == len(rows) - 1 and columns[-1] - columns[0] == len(columns) - 1
        heights.add(len(rows))
        widths.setdefault(int(rows[0]), []).append(len(columns))
    assert max(heights) - min(heights) <= 1
    assert all(max(line) - min(line) <= 1 for line in widths.values())
    lengths = [len(line) for line in widths.values()]
    assert max(lengths) - min(lengths) <= 1


@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_any_shape_is_cut_in_exact_number(data: st.DataObject, rows: int, cols: int) -> None:
    present = data.draw(st.sets(st.integers(0, rows * cols - 1), min_size=1))
    patch = torch.tensor(sorted(present))
    count = data.draw(st.integers(1, len(patch)))
    assert cells_of(patch, cols, count).unique().tolist() == list(range(count))


@pytest.mark.parametrize(
    ("rows", "cols", "count", "cells"),
    [
        (2, 2, 1, [0, 0, 0, 0]),
        (2, 2, 4, [0, 1, 2, 3]),
        (1, 7, 3, [0, 0, 0, 1, 1, 2, 2]),
        (7, 1, 3, [0, 0, 0, 1, 1, 2, 2]),
        (3, 3, 2, [0, 0, 1] * 3),
        (4, 4, 5, [0, 0, 1, 2, 0, 0, 1, 2, 3, 3, 4, 4, 3, 3, 4, 4]),
    ],
)
def test_small_grids_by_hand(rows: int, cols: int, count: int, cells: list[int]) -> None:
    assert cells_of(torch.arange(rows * cols), cols, count).tolist() == cells


@pytest.mark.parametrize(("side", "count", "factor"), [(24, 144, 2), (24, 64, 3), (24, 9, 8), (27, 81, 3)])
def test_a_square_grid_is_pooled_like_average_pooling(side: int, count: int, factor: int) -> None:
    item = make.single(side)
    ctx = make.context(item)
    selection = Pool().select(ctx, count)
    grid = ctx.features.T.reshape(1, -1, side, side)
    want = torch.nn.functional.avg_pool2d(grid, factor)[0].flatten(1).T
    torch.testing.assert_close(selection.values, want)
    if factor % 2:  # the middle of every block
        assert torch.equal(selection.keep, torch.arange(side * side).reshape(side, side)[1::3, 1::3].flatten())


@given(make.items(), st.data())
def test_every_token_counts_once_and_stands_in_its_cell(item: VisualItem, data: st.DataObject) -> None:
    ctx = make.context(item)
    k = data.draw(st.integers(1, len(item.candidates)))
    selection = Pool().select(ctx, k)
    assert selection.values is not None
    sizes = [int((item.partition == index).sum()) for index in range(len(item.partitions))]
    counts = make.per_partition(item, selection.keep)
    want = {}
    for index, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if not count:
            continue
        tokens = (item.partition == index).nonzero().flatten()
        cells, cols = cells_of(item.patch[tokens], item.partitions[index].cols, count), item.partitions[index].cols
        for cell in range(count):
            inside = tokens[cells == cell].tolist()
            places = [divmod(int(item.patch[token]), cols) for token in inside]
            middle = [sum(place[axis] for place in places) / len(places) for axis in (0, 1)]
            distance = [round((r - middle[0]) ** 2 + (c - middle[1]) ** 2, 9) for r, c in places]
            want[inside[distance.index(min(distance))]] = ctx.features[inside].mean(0)
        assert count >= size * k // sum(sizes)
    assert selection.keep.tolist() == sorted(want)
    torch.testing.assert_close(selection.values, torch.stack([want[token] for token in sorted(want)]))


def test_separators_are_averaged_into_nothing() -> None:
    item = make.anyres(2, 2, side=4)
    ctx = make.context(item)
    selection = Pool(newline="keep_all").select(ctx, 30)
    separator = item.partition[selection.keep] < 0
    assert selection.values is not None and int(separator.sum()) == 8
    assert torch.equal(selection.values[separator], ctx.features[selection.keep[separator]])
    poisoned = ctx.features.clone()
    poisoned[item.separators] = torch.nan
    means = cell_means(poisoned, item.partition)
    torch.testing.assert_close(means[0], ctx.features[item.partition == 0].mean(0))
    assert means.shape == (5, 4) and means.isfinite().all()


def test_means_keep_the_dtype_and_are_taken_in_float32() -> None:
    features = torch.full((300, 1), 1.0, dtype=torch.bfloat16)
    features[0] = 3.0
    means = cell_means(features, torch.zeros(300, dtype=torch.long))
    assert means.dtype == torch.bfloat16 and means.item() == pytest.approx(302 / 300, abs=0.01)


def test_attention_is_not_asked_for() -> None:
    assert Pool().needs(make.CLIP) == ()


@pytest.mark.gpu
def test_the_gpu_keeps_what_the_cpu_keeps() -> None:
    pruner = Pool()
    item = make.anyres(2, 2, side=12, pad=(3, 0))
    attention = make.random_attention(pruner, item)
    on_gpu = {need: [row.cuda() for row in rows] for need, rows in attention.items()}
    want = pruner.select(make.context(item, attention), 111)
    found = pruner.select(make.context(item, on_gpu, device="cuda"), 111)
    assert found.keep.is_cuda and torch.equal(found.keep.cpu(), want.keep)
    assert found.values is not None
    torch.testing.assert_close(found.values.cpu(), want.values, atol=1e-4, rtol=1e-4)
