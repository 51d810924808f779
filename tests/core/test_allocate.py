"""``split``: exact, within bounds, in proportion, and the same whoever asks."""

import math
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vlm_budget.allocate import split
from vlm_budget.errors import BudgetError

FREE = 10**9

weights = st.one_of(
    st.floats(0, 1e6),
    st.floats(0, allow_infinity=False, allow_subnormal=True),
    st.sampled_from([0.0, 5e-324, 1e-310, 1.0, 1e308, 1.7e308]),
    st.integers(0, 50).map(float),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, list[float], list[int], list[int]]:
    n = draw(st.integers(1, 8))
    floors = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    room = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    caps = [low + more for low, more in zip(floors, room, strict=True)]
    total = draw(st.integers(sum(floors), sum(caps)))
    return total, draw(st.lists(weights, min_size=n, max_size=n)), caps, floors


@given(problems())
def test_shares_sum_to_the_total_within_floors_and_caps(problem: tuple[int, list[float], list[int], list[int]]) -> None:
    total, weight, caps, floors = problem
    shares = split(total, weight, caps, floors)
    assert sum(shares) == total
    assert all(type(share) is int for share in shares)
    assert all(low <= share <= cap for low, share, cap in zip(floors, shares, caps, strict=True))


@given(st.integers(0, 5000), st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_free_shares_are_in_proportion_to_within_one(total: int, weight: list[int]) -> None:
    assume(any(weight))
    shares = split(total, weight, [FREE] * len(weight))
    assert all(abs(share - total * w / sum(weight)) < 1 for share, w in zip(shares, weight, strict=True))


@given(st.integers(0, 500), st.lists(st.integers(1, 1000), min_size=1, max_size=9))
def test_floors_that_bind_nobody_change_nothing(more: int, weight: list[int]) -> None:
    floors = [1] * len(weight)
    total = len(weight) + more
    free = split(total, weight, [FREE] * len(weight))
    assume(all(share >= 1 for share in free))
    assume(all(total * w >= sum(weight) for w in weight))
    assert split(total, weight, [FREE] * len(weight), floors) == free


def test_a_floor_is_a_least_and_not_a_gift() -> None:
    # 90 % and 10 % of ten tokens, one each at least: both have their one already.
    assert split(10, [90, 10], [90, 10], [1, 1]) == [9, 1]
    assert split(10, [98, 1, 1], [98, 98, 98], [1, 1, 1]) == [8, 1, 1]


@given(problems())
def test_every_share_is_within_one_of_the_clamped_proportion(
    problem: tuple[int, list[float], list[int], list[int]],
) -> None:
    total, weight, caps, floors = problem
    weight = [max(w, 1e-3) if w < 1e6 else 1e6 for w in weight]  # the reference below bisects in plain floats
    low, high = 0.0, 1e12
    for _ in range(300):
        level = (low + high) / 2
        fits = sum(min(max(level * w, a), b) for w, a, b in zip(weight, floors, caps, strict=True)) < total
        low, high = (level, high) if fits else (low, level)
    ideal = [min(max(high * w, a), b) for w, a, b in zip(weight, floors, caps, strict=True)]
    for share, wanted in zip(split(total, weight, caps, floors), ideal, strict=True):
        assert abs(share - wanted) < 1 + 1e-6


@pytest.mark.parametrize(
    ("total", "weight", "caps", "shares"),
    [
        (50, [0.32, 0.08, 0.58, 0.02], [576] * 4, [16, 4, 29, 1]),  # the worked example of the HiRED paper
        (10, [1, 1, 1], [FREE] * 3, [4, 3, 3]),  # equal remainders: the earlier one
        (11, [1, 1, 1], [FREE] * 3, [4, 4, 3]),
        (1, [1, 1, 1], [FREE] * 3, [1, 0, 0]),
        (0, [1, 2], [5, 5], [0, 0]),
        (7, [3], [7], [7]),
        (10, [1, 1, 8], [FREE, FREE, 2], [4, 4, 2]),  # what the cap refused goes to the others
        (12, [3, 1, 8], [FREE, FREE, 4], [6, 2, 4]),  # ... in proportion to their weights
        (9, [5, 3, 1], [2, 3, FREE], [2, 3, 4]),  # ... again and again
        (6, [1, 0, 0], [2, 9, 3], [2, 3, 1]),  # full: zero weights share in proportion to their caps
        (4, [0, 0, 0], [2, 4, 2], [1, 2, 1]),  # all zero: in proportion to the caps
        (10, [1, 4, 1], [FREE] * 3, [2, 7, 1]),  # remainders 2/3 each, which floats tell apart
        (5, [0, 1], [5, 5], [0, 5]),  # zero weight waits until the others are full
        (3, [0, 1], [0, 3], [0, 3]),
        (0, [], [], []),
        (100, [1e308, 1e308], [FREE] * 2, [50, 50]),
        (100, [5e-324, 5e-324], [FREE] * 2, [50, 50]),
        (100, [1e308, 5e-324], [60, FREE], [60, 40]),
    ],
)
def test_shares_worked_by_hand(total: int, weight: list[float], caps: list[int], shares: list[int]) -> None:
    assert split(total, weight, caps) == shares


@given(st.integers(0, 300), st.lists(st.integers(0, 9), min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_reordering_moves_only_what_equal_remainders_decide(total: int, weight: list[int], random: Random) -> None:
    assume(any(weight))
    order = list(range(len(weight)))
    random.shuffle(order)
    caps = [FREE] * len(weight)
    shares = split(total, weight, caps)
    moved = split(total, [weight[i] for i in order], caps)
    back = [moved[order.index(i)] for i in range(len(weight))]
    remainders = [total * w % sum(weight) for w in weight]
    for i, (here, there) in enumerate(zip(shares, back, strict=True)):
        assert here == there or (abs(here - there) == 1 and remainders.count(remainders[i]) > 1)


@given(st.integers(0, 300), st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_of_equal_remainders_the_earlier_gets_more(total: int, weight: list[int]) -> None:
    assume(any(weight))
    shares = split(total, weight, [FREE] * len(weight))
    parts = [divmod(total * w, sum(weight)) for w in weight]
    given = [share - whole for share, (whole, _) in zip(shares, parts, strict=True)]
    ranked = sorted(range(len(weight)), key=lambda i: (-parts[i][1], i))
    assert [given[i] for i in ranked] == sorted(given, reverse=True)


@given(st.integers(0, 400), st.lists(st.integers(1, 90), min_size=1, max_size=7), st.integers(-300, 300))
def test_only_the_proportion_of_the_weights_matters(total: int, weight: list[int], power: int) -> None:
    caps = [200] * len(weight)
    assume(total <= sum(caps))
    assert split(total, [w * 2.0**power for w in weight], caps) == split(total, weight, caps)


@given(problems())
def test_a_heavier_share_is_never_smaller(problem: tuple[int, list[float], list[int], list[int]]) -> None:
    total, weight, _, _ = problem
    shares = split(total, weight, [FREE] * len(weight))
    for w, share in zip(weight, shares, strict=True):
        assert all(other <= share for v, other in zip(weight, shares, strict=True) if v < w)


def test_numpy_numbers_are_numbers() -> None:
    shares = split(np.int64(10), np.array([1.0, 3.0]), np.array([10, 10]), np.array([1, 1]))
    assert shares == [3, 7]
    assert all(type(share) is int for share in shares)


@pytest.mark.parametrize(
    ("total", "caps", "floors", "nearest"), [(11, [5, 5], None, 10), (1, [5, 5], [1, 1], 2), (-1, [5, 5], None, 0)]
)
def test_an_impossible_total_is_refused_with_the_nearest_possible_one(
    total: int, caps: list[int], floors: list[int] | None, nearest: int
) -> None:
    with pytest.raises(BudgetError, match=f"cannot split {total} tokens.*nearest feasible total is {nearest}"):
        split(total, [1.0, 1.0], caps, floors)


@pytest.mark.parametrize(
    ("weight", "caps", "floors"),
    [
        ([1.0], [1, 2], None),
        ([1.0, 1.0], [1, 2], [0]),
        ([math.nan], [3], None),
        ([math.inf], [3], None),
        ([-1.0], [3], None),
        ([1.0], [3], [-1]),
        ([1.0], [3], [4]),
    ],
)
def test_unusable_arguments_are_refused(weight: list[float], caps: list[int], floors: list[int] | None) -> None:
    with pytest.raises(ValueError, match="must match|finite and non-negative|0 <= floor <= cap") as caught:
        split(1, weight, caps, floors)
    assert not isinstance(caught.value, BudgetError)
