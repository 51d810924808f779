"""Uniform: even rows, even gaps within them, exact counts on any shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget.pruners.uniform import Uniform, lattice

sides = st.integers(1, 27)


def rectangle(top: int, left: int, height: int, width: int, cols: int) -> torch.Tensor:
    rows, columns = torch.arange(top, top + height)[:, None], torch.arange(left, left + width)
    return (rows * cols + columns).flatten()


@given(st.data(), sides, sides, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_kept_tokens_lie_on_even_rows_at_even_gaps(
    data: st.DataObject, height: int, width: int, top: int, left: int, right: int
) -> None:
    cols = left + width + right
    patch = rectangle(top, left, height, width, cols)  # unpadding leaves a rectangle
    count = data.draw(st.integers(1, len(patch)))
    kept = patch[lattice(patch, cols, count)]
    assert len(kept.unique()) == count
    lines: dict[int, list[int]] = {}
    for token in sorted(kept.tolist()):
        lines.setdefault(token // cols - top, []).append(token % cols - left)
    lengths = [len(line) for line in lines.values()]
    assert max(lengths) - min(lengths) <= 1
    for places, extent in [(list(lines), height), *((line, width) for line in lines.values())]:
        gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        # The margins are half a gap, so that no side is favoured by more than rounding.
        assert abs(places[0] - (extent - 1 - places[-1])) <= 1


@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_any_shape_gives_distinct_tokens_in_exact_number(data: st.DataObject, rows: int, cols: int) -> None:
    present = data.draw(st.sets(st.integers(0, rows * cols - 1), min_size=1))
    patch = torch.tensor(sorted(present))
    count = data.draw(st.integers(1, len(patch)))
    kept = lattice(patch, cols, count)
    assert len(kept.unique()) == count and kept.min() >= 0 and kept.max() < len(patch)


@pytest.mark.parametrize(("tokens", "count"), [(1_001, 1_000), (100_003, 99_991)])
def test_large_shapes_stay_distinct(tokens: int, count: int) -> None:
    line = lattice(torch.arange(tokens), tokens, count)
    assert len(line.unique()) == count and line[-1] < tokens
    ragged = torch.cat([torch.arange(tokens - 1), torch.tensor([tokens + 5])])  # one long line and a single token
    assert len(lattice(ragged, tokens, count).unique()) == count


@pytest.mark.parametrize(
    ("rows", "cols", "count", "kept"),
    [
        (3, 3, 1, [4]),  # the middle
        (1, 7, 1, [3]),
        (7, 1, 1, [3]),
        (4, 4, 4, [5, 7, 13, 15]),
        (4, 4, 16, list(range(16))),
        (1, 7, 3, [1, 3, 5]),
        (2, 8, 2, [10, 14]),
        (7, 2, 3, [3, 7, 11]),
    ],
)
def test_small_grids_by_hand(rows: int, cols: int, count: int, kept: list[int]) -> None:
    assert lattice(torch.arange(rows * cols), cols, count).tolist() == kept


@pytest.mark.parametrize(("side", "count"), [(24, 144), (24, 64), (27, 81)])
def test_a_square_grid_keeps_a_square_lattice(side: int, count: int) -> None:
    kept = lattice(torch.arange(side * side), side, count)
    lines, columns = (kept // side).unique(), (kept % side).unique()
    assert len(lines) == len(columns) == count**0.5


def test_partitions_share_in_proportion_to_their_tokens() -> None:
    item = make.anyres(2, 2, side=6, pad=(3, 0))  # 36 in the thumbnail, 18 in each crop
    keep = Uniform().select(make.context(item), 36).keep
    assert make.per_partition(item, keep) == [12, 6, 6, 6, 6]
    video = make.frames(4, 3, 3)
    assert make.per_partition(video, Uniform().select(make.context(video), 10).keep) == [3, 3, 2, 2]


def test_attention_and_features_are_not_asked_for() -> None:
    assert Uniform().needs(make.CLIP) == ()


@pytest.mark.gpu
def test_the_gpu_keeps_what_the_cpu_keeps() -> None:
    item = make.anyres(2, 2, side=6)
    keep = Uniform().select(make.context(item, device="cuda"), 33).keep
    assert keep.is_cuda and torch.equal(keep.cpu(), Uniform().select(make.context(item), 33).keep)
