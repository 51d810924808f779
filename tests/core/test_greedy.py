"""Greedy selection, against loops that take their time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_budget.greedy import CosineRows, map_dpp, max_coverage, max_min, unit_rows

Rows = list[list[float]]


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_max_min(distance: Rows, k: int) -> list[int]:
    """The first token has the farthest nearest neighbour; each next one is farthest from its nearest chosen one."""
    tokens = range(len(distance))
    chosen: list[int] = []
    while len(chosen) < k:
        best, best_token = -1.0, -1
        for token in tokens:
            others = chosen or [other for other in tokens if other != token]
            nearest = min((distance[token][other] for other in others), default=0.0)
            if token not in chosen and nearest > best:
                best, best_token = nearest, token
        chosen.append(best_token)
    return chosen


def slow_dpp(kernel: torch.Tensor, k: int) -> list[int]:
    """Each next token is the one with which the determinant of the chosen ones' kernel is highest."""
    chosen: list[int] = []
    while len(chosen) < k:
        best, best_token = -float("inf"), -1
        for token in range(len(kernel)):
            if token not in chosen:
                among = torch.tensor([*chosen, token])
                determinant = float(torch.linalg.det(kernel[among][:, among]))
                if determinant > best:
                    best, best_token = determinant, token
        chosen.append(best_token)
    return chosen


def slow_coverage(rows: Rows, k: int) -> list[int]:
    """Each next column raises the sum of row maxima over the chosen columns most."""
    chosen: list[int] = []
    while len(chosen) < k:
        best, best_column = -1.0, -1
        for column in range(len(rows[0])):
            if column not in chosen:
                covered = sum(max(row[each] for each in [*chosen, column]) for row in rows)
                if covered > best:
                    best, best_column = covered, column
        chosen.append(best_column)
    return chosen


def distances(features: torch.Tensor) -> Rows:
    return [[float(1 - torch.cosine_similarity(a, b, dim=0)) for b in features] for a in features]


def kernel(features: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    unit = features / features.norm(dim=1, keepdim=True)
    return quality[:, None] * (unit @ unit.T) * quality


# --- max-min --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [0, 10**9])  # rows made one by one, and kept
@pytest.mark.parametrize(("count", "width"), [(1, 3), (2, 3), (7, 2), (33, 5), (63, 40)])
def test_max_min_equals_the_slow_loop(count: int, width: int, whole: int) -> None:
    for seed in range(3):
        features = vectors(count, width, seed)
        slow = slow_max_min(distances(features), count)
        for k in {1, count // 2 or 1, count - 1 or 1, count}:
            assert max_min(CosineRows(features, whole), k).tolist() == slow[:k]


def test_equally_far_tokens_are_chosen_in_order() -> None:
    axes = torch.eye(6)
    assert max_min(CosineRows(axes), 6).tolist() == [0, 1, 2, 3, 4, 5]
    doubled = torch.cat([axes, axes])  # every token has a twin at distance 0: all seeds tie
    assert max_min(CosineRows(doubled), 12).tolist() == list(range(12))


@given(st.data(), st.integers(1, 12), st.sampled_from([0, 10**9]))
def test_max_min_is_exact_on_a_lattice_full_of_ties(data: st.DataObject, count: int, whole: int) -> None:
    # Multiples of unit axes have cosines of exactly -1, 0 and 1.
    axis = st.tuples(st.integers(0, 2), st.sampled_from([-2.0, -1.0, 1.0, 4.0]))
    features = torch.zeros(count, 3)
    for row, (place, value) in enumerate(data.draw(st.lists(axis, min_size=count, max_size=count))):
        features[row, place] = value
    k = data.draw(st.integers(1, count))
    assert max_min(CosineRows(features, whole), k).tolist() == slow_max_min(distances(features), k)


def test_scale_changes_nothing_and_neither_do_tokens_without_a_finite_direction() -> None:
    features = vectors(20, 8)
    scaled = features * torch.linspace(0.1, 900, 20)[:, None]
    assert torch.equal(max_min(CosineRows(features), 9), max_min(CosineRows(scaled), 9))
    features[3], features[4], features[5, 0] = 0.0, float("nan"), float("inf")
    assert unit_rows(features)[3:6].eq(0).all()
    for k in (1, 9, 20):
        for chosen in (
            max_min(CosineRows(features), k),
            map_dpp(CosineRows(features), torch.zeros(20), k),
        ):
            assert len(chosen.unique()) == k


def test_half_precision_is_compared_in_float32() -> None:
    features = vectors(30, 16).bfloat16()
    assert CosineRows(features).unit.dtype == torch.float32
    assert torch.equal(max_min(CosineRows(features), 11), max_min(CosineRows(features.float()), 11))


# --- determinantal point process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [0, 10**9])
@pytest.mark.parametrize(("count", "width"), [(1, 1), (2, 3), (7, 7), (12, 20)])
def test_dpp_equals_recomputing_every_determinant(count: int, width: int, whole: int) -> None:
    for seed in range(4):
        features = vectors(count, width, seed)
        quality = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() + 0.01
        slow = slow_dpp(kernel(features, quality), count)
        for k in {1, count // 2 or 1, count}:
            assert map_dpp(CosineRows(features, whole), quality.log(), k).tolist() == slow[:k]


def test_a_larger_set_in_double_precision_too() -> None:
    features, quality = vectors(60, 48, 5), torch.linspace(1, 0.2, 60).double()
    slow = slow_dpp(kernel(features, quality), 20)
    assert map_dpp(CosineRows(features), quality.log(), 20).tolist() == slow
    assert map_dpp(CosineRows(features.float()), quality.log().float(), 20).tolist() == slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_the_rank_the_best_quality_follows_and_the_count_is_exact(dtype: torch.dtype) -> None:
    features = vectors(40, 3, 2).to(dtype)
    quality = torch.rand(40, generator=torch.Generator().manual_seed(1)).to(dtype)
    chosen = map_dpp(CosineRows(features), quality.log(), 40).tolist()
    assert chosen[:3] == slow_dpp(kernel(features.double(), quality.double()), 3)
    rest = [token for token in range(40) if token not in chosen[:3]]
    assert chosen[3:] == sorted(rest, key=lambda token: (-float(quality[token]), token))


def test_duplicates_and_tokens_without_quality_come_last() -> None:
    features = torch.cat([torch.eye(4), torch.eye(4)])
    quality = torch.tensor([0.5, 0.5, 0.0, 0.25, 0.5, 0.75, 0.5, 0.0])
    # One of each axis by quality (6 before 3, which is worth less; 7 and 2 are worth nothing), then the doubles.
    assert map_dpp(CosineRows(features), quality.log(), 8).tolist() == [5, 0, 6, 3, 1, 4, 2, 7]
    for even in (0.0, -torch.inf):
        assert map_dpp(CosineRows(features), torch.full((8,), even), 8).tolist() == list(range(8))


def test_quality_of_any_range_fits() -> None:
    features, order = vectors(9, 16), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    chosen = map_dpp(CosineRows(features.float()), order * 3000.0, 9)  # e to the 24000th
    assert chosen.tolist() == order.argsort(descending=True).tolist()


# --- maximum coverage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (7, 12), (40, 33)])
def test_coverage_equals_the_slow_loop(height: int, width: int) -> None:
    for seed in range(3):
        rows = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
        slow = slow_coverage(rows.double().tolist(), width)
        # A single row is covered by its highest entry: all other columns tie at no gain.
        assert max_coverage(rows, width).tolist() == slow


@given(st.data(), st.integers(1, 8), st.integers(1, 8))
def test_coverage_is_exact_where_columns_tie(data: st.DataObject, height: int, width: int) -> None:
    entries = st.lists(st.integers(0, 3).map(float), min_size=height * width, max_size=height * width)
    rows = torch.tensor(data.draw(entries)).reshape(height, width)
    k = data.draw(st.integers(1, width))
    chosen = max_coverage(rows, k)
    assert chosen.tolist() == slow_coverage(rows.tolist(), k)
    assert torch.equal(max_coverage(rows * 2.0**-40, k), chosen)
    assert torch.equal(max_coverage(rows.half(), k), chosen)


def test_coverage_takes_the_greedy_column_not_the_best_pair() -> None:
    # The middle column covers most at first; with it, no second one completes what the outer two would cover.
    rows = torch.tensor([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0], [0.0, 2.0, 3.0], [0.0, 2.0, 3.0]])
    assert max_coverage(rows, 2).tolist() == [1, 0]


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_gpu_chooses_what_the_cpu_chooses() -> None:
    features, quality = vectors(700, 64), torch.linspace(1, 0, 700).double()
    rows = torch.rand(300, 700)
    for whole in (0, 10**9):
        here, there = CosineRows(features, whole), CosineRows(features.cuda(), whole)
        assert torch.equal(max_min(there, 150).cpu(), max_min(here, 150))
        assert torch.equal(map_dpp(there, quality.log().cuda(), 150).cpu(), map_dpp(here, quality.log(), 150))
    assert torch.equal(max_coverage(rows.cuda(), 150).cpu(), max_coverage(rows, 150))


@pytest.mark.gpu
def test_max_min_and_dpp_never_make_the_host_wait() -> None:
    rows, quality = CosineRows(vectors(200, 16).cuda()), torch.rand(200).cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        max_min(rows, 30), map_dpp(rows, quality.log(), 30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
