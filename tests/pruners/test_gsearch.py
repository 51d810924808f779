"""G-Search's rates: counts, nesting, and what is no schedule. Its ranking is tested with P-Sigmoid's."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_budget.decoder import Step
from vlm_budget.errors import BudgetError, OptionError
from vlm_budget.pruners.gsearch import GSearch
from vlm_budget.pruners.psigmoid import PSigmoid

rates = st.lists(st.integers(0, 32), min_size=1, max_size=20).map(
    lambda deep: (1.0, 1.0, *(k / 32 for k in sorted(deep, reverse=True)))
)


@given(rates, st.sampled_from([1, 7, 63, 577]))
def test_every_layer_keeps_its_rate_rounded_up(found: tuple[float, ...], tokens: int) -> None:
    steps = GSearch(rates=found).schedule(tokens, None, len(found))
    counts = [tokens] * len(found)
    for step in steps:
        assert step.keep < counts[step.layer]
        counts[step.layer :] = [step.keep] * (len(found) - step.layer)
    assert counts == [math.ceil(rate * tokens) for rate in found]


def test_decimal_rates_mean_what_they_say() -> None:
    assert GSearch(rates=(1, 1, 0.3, 0.1)).schedule(10, None, 4) == (Step(2, 3), Step(3, 1))
    assert GSearch(rates=(1, 1, 0.07)).schedule(100, None, 3) == (Step(2, 7),)


def test_rates_of_one_keep_everything() -> None:
    assert GSearch(rates=(1,) * 5).schedule(63, None, 5) == ()


def test_a_list_as_json_gives_it_is_the_same_method() -> None:
    assert GSearch(rates=[1, 1, 0.5]) == GSearch(rates=(1.0, 1.0, 0.5))  # type: ignore[arg-type]
    assert hash(GSearch(rates=[1, 1, 0.5]))  # type: ignore[arg-type]


def test_rates_fix_the_schedule_and_none_leave_it_to_the_budget() -> None:
    assert GSearch(rates=(1, 1, 0.5)).fixed
    assert not GSearch().fixed
    assert GSearch().schedule(577, 577 * 6, 24) == PSigmoid().schedule(577, 577 * 6, 24)
    with pytest.raises(BudgetError, match=r"^GSearch\(\) cannot keep to .* nearest feasible"):
        GSearch().schedule(577, 577, 24)


def test_rates_of_another_model_are_refused() -> None:
    with pytest.raises(OptionError, match="for 3 decoder layers, the model has 24"):
        GSearch(rates=(1, 1, 0.5)).schedule(577, None, 24)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((1, 1, 0.5, 0.6), "never rise"),
        ((1, 0.9, 0.5), "first two layers"),
        ((0.5,), "first two layers"),
        ((1, 1, 1.5), r"\[0, 1\]"),
        ((1, 1, -0.1), r"\[0, 1\]"),
        ((1, 1, math.nan), r"\[0, 1\]"),
        ((1, 1, "half"), "one number per decoder layer"),
        (0.5, "one number per decoder layer"),
        ("111", "one number per decoder layer"),
        (b"111", "one number per decoder layer"),
        ((1, 1, "0.5"), "one number per decoder layer"),
        ((1, True, 0.5), "one number per decoder layer"),
        ((1, 1, None), "one number per decoder layer"),
        (None, "one number per decoder layer"),
    ],
)
def test_what_is_no_schedule_is_refused(found: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GSearch(rates=found)  # type: ignore[arg-type]


def test_unknown_queries_are_refused() -> None:
    with pytest.raises(OptionError, match="queries must be 'instruction' or 'last', got 'first'"):
        GSearch(queries="first")  # type: ignore[arg-type]
