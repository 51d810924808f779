"""``allocate_frames``: the whole budget, in proportion to a power of the scores, within grids and floors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vlm_budget.errors import BudgetError, FrameScoreError, OptionError
from vlm_budget.frames import allocate_frames, frame_weights

GRID = 729
whole = st.lists(st.integers(0, 1000), min_size=1, max_size=12)
powers = st.sampled_from([0, 0.5, 1, 2.0, 3])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, dict[str, Any]]:
    scores = draw(st.lists(st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1e300)), min_size=1, max_size=12))
    caps = draw(st.lists(st.integers(0, 60), min_size=len(scores), max_size=len(scores)))
    floor, separators = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    budget = separators + draw(st.integers(sum(min(floor, cap) for cap in caps), sum(caps)))
    return scores, budget, {"caps": caps, "power": draw(powers), "floor": floor, "separators": separators}


@given(problems())
def test_the_sum_is_the_budget_and_bounds_hold(problem: tuple[list[float], int, dict[str, Any]]) -> None:
    scores, budget, options = problem
    shares = allocate_frames(scores, budget, **options)
    assert sum(shares) + options["separators"] == budget
    for share, cap in zip(shares, options["caps"], strict=True):
        assert min(options["floor"], cap) <= share <= cap
    assert allocate_frames(scores, budget, **options) == shares


@given(whole, st.integers(0, 3000), powers.filter(bool))
def test_a_frame_that_scores_higher_never_has_less(scores: list[int], budget: int, power: float) -> None:
    assume(budget <= GRID * len(scores))
    shares = allocate_frames(scores, budget, caps=GRID, power=power)
    for score, share in zip(scores, shares, strict=True):
        assert all(other <= share for lower, other in zip(scores, shares, strict=True) if lower < score)


@given(whole, st.data())
def test_a_frame_that_rises_never_loses(scores: list[int], data: st.DataObject) -> None:
    caps = data.draw(st.lists(st.integers(1, 40), min_size=len(scores), max_size=len(scores)))
    budget, index = data.draw(st.integers(0, sum(caps))), data.draw(st.integers(0, len(scores) - 1))
    raised = [score + (place == index) * 7 for place, score in enumerate(scores)]
    before, after = (allocate_frames(these, budget, caps=caps, power=1)[index] for these in (scores, raised))
    assert after >= before


@given(whole, st.integers(0, 3000), st.sampled_from([100, 0.25, 2.0**-30, 1e6]))
def test_only_proportions_matter(scores: list[int], budget: int, scale: float) -> None:
    """The release multiplies by 100 before it squares, which cancels."""
    assume(budget <= GRID * len(scores))
    scaled = [scale * score for score in scores]
    assert allocate_frames(scaled, budget, caps=GRID) == allocate_frames(scores, budget, caps=GRID)


@given(whole, st.integers(0, 300))
def test_free_shares_are_the_squares_to_within_one(scores: list[int], budget: int) -> None:
    assume(any(scores))
    total = sum(score**2 for score in scores)
    for score, share in zip(scores, allocate_frames(scores, budget, caps=10**9), strict=True):
        assert abs(share - budget * score**2 / total) < 1 + 1e-9


@pytest.mark.parametrize(
    ("scores", "budget", "options", "shares"),
    [
        ([1, 2, 3], 14, {}, [1, 4, 9]),
        ([1, 2, 3], 12, {"power": 1}, [2, 4, 6]),
        ([1, 2, 3], 12, {"power": 0}, [4, 4, 4]),
        ([0, 0, 0], 7, {}, [3, 2, 2]),  # all equal, the earlier first
        ([0.1, 0.9], 10, {}, [0, 10]),  # 0.12 tokens: dropped
        ([0.1, 0.9], 10, {"floor": 2}, [2, 8]),
        ([1, 9, 1, 1], 30, {"caps": [20] * 4}, [4, 20, 3, 3]),  # what the cap refuses goes to the others
        ([1, 9, 8, 1], 40, {"caps": [5, 20, 12, 9]}, [4, 20, 12, 4]),  # ... again, until all fit
        ([0, 1], 25, {"caps": [20, 20]}, [5, 20]),
        ([0, 1, 0], 26, {"caps": [20, 20, 20]}, [3, 20, 3]),
        ([1, 1], 11, {"separators": 1}, [5, 5]),
        ([1, 1], 8, {"caps": [2, 20], "floor": 4}, [2, 6]),  # a grid smaller than the floor
        ([1, 0, 0], 20, {"floor": [0, 1, 5]}, [14, 1, 5]),
        ([1e200, 1e200], 10, {}, [5, 5]),
        ([1e-200, 1e-200], 10, {}, [5, 5]),
        ([1], 0, {}, [0]),
        ([], 0, {}, []),
    ],
)
def test_shares_worked_by_hand(scores: list[float], budget: int, options: dict[str, Any], shares: list[int]) -> None:
    assert allocate_frames(scores, budget, **{"caps": GRID, **options}) == shares


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, lambda scores: np.array(scores, np.float32)])
def test_scores_may_be_arrays_and_tensors(kind: Any) -> None:
    shares = allocate_frames(kind([0.5, 0.25, 0.0]), 10, caps=np.array([GRID] * 3))
    assert shares == [8, 2, 0] and all(type(share) is int for share in shares)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1e-9])
def test_scores_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(FrameScoreError, match=f"frame 1 is {bad}"):
        allocate_frames([1.0, bad], 10, caps=GRID)


@pytest.mark.parametrize("bad", ["high", ["high"], [[1.0]], None, 3.0, [None]])
def test_what_is_no_list_of_numbers_is_refused(bad: Any) -> None:
    with pytest.raises(FrameScoreError, match="must be numbers, one per frame"):
        allocate_frames(bad, 10, caps=GRID)


def test_every_frame_has_one_score() -> None:
    with pytest.raises(FrameScoreError, match="3 scores for 2 frames"):
        allocate_frames([1, 2, 3], 10, caps=[9, 9])


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (61, {}, "cannot spend 61 tokens on 3 frames: they take between 0 and 60. The nearest .* is 60 tokens"),
        (8, {"floor": 3}, "between 9 and 60. The nearest feasible budget is 9 tokens"),
        (10, {"floor": 3, "separators": 2}, "between 11 and 62, 2 separators included. .* 11 tokens"),
        (-1, {}, "The nearest feasible budget is 0 tokens"),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_the_nearest_one(
    budget: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        allocate_frames([3, 2, 1], budget, caps=20, **options)


@pytest.mark.parametrize("option", [{"power": -1}, {"power": math.nan}, {"power": "2"}, {"floor": -1}, {"caps": [-1]}])
def test_unusable_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(option))}.* must be"):
        allocate_frames([1.0], 1, **{"caps": GRID, **option})


def test_weights_are_relative_to_the_highest() -> None:
    assert frame_weights([2.0, 1.0, 0.0]) == [1.0, 0.25, 0.0]
    assert frame_weights([0.0, 0.0]) == [1.0, 1.0]
    assert frame_weights([]) == []
