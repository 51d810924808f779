"""The words users type for a budget, and what they are worth in tokens."""

import math
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_budget import Budget, BudgetError
from vlm_budget.budget import in_words

RATIO, TOKENS = ("ratio", True), ("tokens", False)


@pytest.mark.parametrize(
    ("written", "amount", "kind"),
    [
        (0.2, 0.2, RATIO),
        (1.0, 1.0, RATIO),
        (1e-3, 1e-3, RATIO),
        (np.float64(0.5), 0.5, RATIO),
        (np.float32(0.25), 0.25, RATIO),
        (np.float16(0.125), 0.125, RATIO),
        (Fraction(1, 4), 0.25, RATIO),
        (128, 128, TOKENS),
        (1, 1, TOKENS),
        (np.int64(128), 128, TOKENS),
        (np.uint8(7), 7, TOKENS),
        ("25%", 0.25, RATIO),
        ("100%", 1.0, RATIO),
        ("0.5%", 0.005, RATIO),
        (".5 %", 0.005, RATIO),
        ("  25 % ", 0.25, RATIO),
        ("+25%", 0.25, RATIO),
        ("25% tokens", 0.25, RATIO),
        ("7%", 0.07, RATIO),
        ("29%", 0.29, RATIO),
        ("0.25", 0.25, RATIO),
        (".25", 0.25, RATIO),
        ("1.0", 1.0, RATIO),
        ("1.", 1.0, RATIO),
        ("2e-1", 0.2, RATIO),
        ("2E-1", 0.2, RATIO),
        ("128", 128, TOKENS),
        ("1", 1, TOKENS),
        ("128 tokens", 128, TOKENS),
        ("128tokens", 128, TOKENS),
        ("1 token", 1, TOKENS),
        ("128 TOKENS", 128, TOKENS),
        ("1e3 tokens", 1000, TOKENS),
        ("128.0 tokens", 128, TOKENS),
        ("40% flops", 0.4, ("flops", True)),
        ("40 % FLOPs", 0.4, ("flops", True)),
        ("2 TFLOPs", 2e12, ("flops", False)),
        ("1.5 gflops", 1.5e9, ("flops", False)),
        ("3 pflops", 3e15, ("flops", False)),
        ("3 MFLOPs", 3e6, ("flops", False)),
        ("3 kFLOPs", 3e3, ("flops", False)),
        ("100 flops", 100, ("flops", False)),
        ("80 ms", 80, ("ms", False)),
        ("80ms", 80, ("ms", False)),
        ("1.5 s", 1500, ("ms", False)),
        ("50% time", 0.5, ("ms", True)),
        ("50% ms", 0.5, ("ms", True)),
        ("50%ms", 0.5, ("ms", True)),
        ("50% latency", 0.5, ("ms", True)),
        ("200 MB kv", 2e8, ("bytes", False)),
        ("200 MB kv cache", 2e8, ("bytes", False)),
        ("200 MB cache", 2e8, ("bytes", False)),
        ("200 MB", 2e8, ("bytes", False)),
        ("1 KiB kv", 1024, ("bytes", False)),
        ("1.5 GiB", 1.5 * 2**30, ("bytes", False)),
        ("2 gb", 2e9, ("bytes", False)),
        ("512 B kv", 512, ("bytes", False)),
        ("30% kv", 0.3, ("bytes", True)),
        ("30% KV cache", 0.3, ("bytes", True)),
        ("30% cache", 0.3, ("bytes", True)),
    ],
)
def test_a_budget_is_read_as_users_write_it(written: Any, amount: float, kind: tuple[str, bool]) -> None:
    budget = Budget.parse(written)
    assert (budget.amount, (budget.unit, budget.relative)) == (amount, kind)
    assert type(budget.amount) is float


def test_a_budget_parses_to_itself() -> None:
    budget = Budget(0.3)
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (0, "above 0, got 0 tokens"),
        (0.0, "above 0, got 0 ratio"),
        (-1, "above 0, got -1 tokens"),
        (-0.2, "above 0, got -0.2"),
        (np.int64(-3), "above 0, got -3"),
        ("0", "above 0"),
        ("0%", "above 0"),
        ("0 tokens", "above 0"),
        ("-5 tokens", "above 0, got -5 tokens"),
        ("-25%", "above 0"),
        ("0 ms", "above 0, got 0 ms"),
        (math.nan, "finite number, got nan"),
        (math.inf, "finite number, got inf"),
        (-math.inf, "finite number, got -inf"),
        (np.float32("nan"), "finite number, got nan"),
        ("nan", "finite number, got nan"),
        ("inf", "finite number, got inf"),
        ("inf%", "finite number, got inf"),
        ("inf ms", "finite number, got inf"),
        ("1e400", "finite number, got inf"),
        (10**400, "finite number"),
        (1.5, r"\(0, 1\].*got 1.5 \(= 150%\).*pass an int, such as 2"),
        (128.0, "pass an int, such as 128,"),
        ("101%", r"got 1.01 \(= 101%\)"),
        ("1e3", "pass an int, such as 1000,"),
        ("110% flops", "relative budget"),
        (True, r"cannot read a budget from True \(bool\)"),
        (False, r"False \(bool\)"),
        (np.True_, "bool"),
        (None, r"None \(NoneType\)"),
        ([0.2], r"\[0.2\] \(list\)"),
        (b"25%", "bytes"),
        (0.2j, "complex"),
        ("", "cannot read a budget from ''"),
        ("   ", "cannot read a budget"),
        ("abc", "cannot read a budget from 'abc'"),
        ("%", "cannot read a budget from '%'"),
        ("% 25", "cannot read a budget"),
        ("tokens", "cannot read a budget from 'tokens'"),
        ("1,000 tokens", "cannot read a budget"),
        ("1_000", "cannot read a budget"),
        ("0x10", "unknown unit|cannot read"),
        ("25%%", "cannot read a budget"),
        ("20% 30%", "cannot read a budget"),
        ("5 bananas", "unknown unit in budget '5 bananas'"),
        ("25% bananas", "unknown unit"),
        ("25% s", "unknown unit"),
        ("128 kv", "unknown unit"),
        ("128 tokens kv", "unknown unit"),
        ("80 ms cache", "unknown unit"),
        ("40% flops kv", "unknown unit"),
        ("40 flops flops", "unknown unit"),
        ("5e", "unknown unit"),
        ("1.5 tokens", "tokens are whole, got 1.5 tokens. Did you mean '1.5'"),
        ("0.2 tokens", "Did you mean '0.2'"),
    ],
)
def test_what_is_no_budget_is_refused_with_what_was_got_and_what_would_do(written: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        Budget.parse(written)
    assert any(hint in str(caught.value) for hint in ("Try one of 0.2, '25%', 128", "pass an int", "Did you mean"))


@pytest.mark.parametrize(
    ("amount", "unit", "relative", "message"),
    [
        (0.5, "bananas", True, "unit"),
        (0.5, "tokens", True, "tokens"),
        (5.0, "ratio", False, "ratio"),
        (1.5, "tokens", False, "whole"),
        ("abc", "ratio", True, "cannot read a budget from 'abc'"),
        ("80 ms", "ms", True, "leave out unit and relative"),
        ("80 ms", "ms", False, "leave out unit and relative"),
        (True, "ratio", True, "number"),
        (None, "ratio", True, "number"),
    ],
)
def test_a_budget_built_by_hand_is_checked_too(amount: Any, unit: Any, relative: bool, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(amount, unit, relative)


@pytest.mark.parametrize("written", ["50% ms", "80 ms", "40% flops", "200 MB kv", "20%", "0.2", "128", "1 token"])
def test_a_budget_may_be_built_from_text(written: str) -> None:
    budget = Budget(written)
    assert budget == Budget.parse(written) and hash(budget) == hash(Budget.parse(written))
    assert type(budget.amount) is float and replace(budget, amount=budget.amount) == budget


shares = st.floats(0, 1, exclude_min=True, allow_subnormal=True)
amounts = st.floats(1e-6, 1e18)
budgets = st.one_of(
    st.builds(Budget, shares, st.sampled_from(["ratio", "flops", "ms", "bytes"])),
    st.builds(Budget, amounts, st.sampled_from(["flops", "ms", "bytes"]), st.just(False)),
    st.builds(Budget, st.integers(1, 2**53).map(float), st.just("tokens"), st.just(False)),
)


@given(budgets)
def test_the_text_of_a_budget_reads_back_to_an_equal_one(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (0.2, "20%"),
        (1.0, "100%"),
        ("7%", "7%"),
        (0.005, "0.5%"),
        (128, "128 tokens"),
        ("40% flops", "40% flops"),
        ("30% cache", "30% kv"),
        (1, "1 token"),
        ("50% latency", "50% ms"),
        ("50% ms", "50% ms"),
        ("50% time", "50% ms"),
        ("1.5 s", "1500 ms"),
        ("200 MB", "200 MB kv"),
        ("2 MB kv", "2 MB kv"),
        ("1500 B", "1.5 kB kv"),
        ("1 KiB", "1.024 kB kv"),
        ("512 B kv", "512 B kv"),
        ("2 tflops", "2 TFLOPs"),
        ("100 flops", "100 flops"),
    ],
)
def test_the_text_of_a_budget_is_short(written: Any, text: str) -> None:
    assert str(Budget.parse(written)) == text


@pytest.mark.parametrize(
    ("amount", "unit", "words"),
    [
        (12, "flops", "12 FLOPs"),
        (999.4, "flops", "999.4 FLOPs"),
        (1000, "flops", "1 kFLOPs"),
        (1.23456e12, "flops", "1.235 TFLOPs"),
        (5e18, "flops", "5000 PFLOPs"),
        (0.5, "ms", "0.5 ms"),
        (12345.6, "ms", "12346 ms"),
        (512, "bytes", "512 B kv"),
        (2e8, "bytes", "200 MB kv"),
    ],
)
def test_an_amount_in_words_reads_back(amount: float, unit: Any, words: str) -> None:
    assert in_words(amount, unit) == words
    assert Budget.parse(words).amount == pytest.approx(amount, rel=1e-3) and Budget.parse(words).unit == unit


@pytest.mark.parametrize(
    ("written", "total", "tokens"),
    [
        (0.2, 2880, 576),
        (1.0, 577, 577),
        (0.5, 7, 4),  # 3.5
        (0.5, 5, 3),  # 2.5: up, not to even
        (0.25, 10, 3),  # 2.5
        (0.25, 9, 2),  # 2.25
        (0.3, 9, 3),  # 2.7
        ("29%", 50, 15),  # 14.5; as a product of floats 14.499999999999998
        ("57.5%", 100, 58),  # 57.5; as a product of floats 57.49999999999999
        ("10%", 63, 6),
        (128, 577, 128),
        (577, 577, 577),
        ("1 token", 1, 1),
    ],
)
def test_a_budget_in_tokens_rounds_half_up(written: Any, total: int, tokens: int) -> None:
    assert Budget.parse(written).tokens(total) == tokens


@given(st.integers(1, 10_000), st.integers(1, 100_000))
def test_a_ratio_is_rounded_in_the_decimals_it_was_written_in(total: int, ratio: int) -> None:
    exact = (Decimal(ratio) / 100_000 * total).to_integral_value(ROUND_HALF_UP)
    budget = Budget.parse(f"{ratio / 1000}%")
    if exact >= 1:
        assert budget.tokens(total) == exact
    else:
        with pytest.raises(BudgetError):
            budget.tokens(total)


@given(st.integers(1, 5_000), shares, shares)
def test_more_ratio_is_never_fewer_tokens(total: int, one: float, other: float) -> None:
    def tokens(ratio: float) -> int:
        try:
            return Budget(ratio).tokens(total)
        except BudgetError:
            return 0

    low, high = sorted((one, other))
    assert 0 <= tokens(low) <= tokens(high) <= total


@pytest.mark.parametrize("wanted", [577, 600])
def test_more_tokens_than_the_prompt_has_are_refused_with_the_most_there_is(wanted: int) -> None:
    message = f"'{wanted} tokens' asks for {wanted} .* only 576.*nearest feasible budget is 576 tokens"
    with pytest.raises(BudgetError, match=message):
        Budget.parse(wanted).tokens(576)


@pytest.mark.parametrize(("budget", "total", "items"), [("0.1%", 63, 1), (2, 577, 3), (1, 577, 2), ("1%", 111, 2)])
def test_less_than_one_token_per_item_is_refused_with_a_feasible_budget(budget: Any, total: int, items: int) -> None:
    with pytest.raises(BudgetError, match="less than one each") as caught:
        Budget.parse(budget).tokens(total, items)
    suggestion = str(caught.value).split("nearest feasible budget is ")[1]
    assert suggestion.startswith("1 token (" if items == 1 else f"{items} tokens (")
    ratio = suggestion.split("(or ")[1].split(")")[0]
    assert Budget.parse(ratio).tokens(total, items) == items


@pytest.mark.parametrize("budget", ["40% flops", "2 TFLOPs", "80 ms", "1.5 s", "200 MB kv", "30% kv", "50% ms"])
def test_a_budget_in_real_units_is_no_number_of_tokens_by_itself(budget: str) -> None:
    parsed = Budget.parse(budget)
    for use in (parsed.require_token_unit, lambda: parsed.tokens(576)):
        with pytest.raises(BudgetError, match=r"no number of tokens by itself.*handle\.plan.*a ratio \(0.2, '20%'\)"):
            use()


@pytest.mark.parametrize("budget", [0.2, "20%", 128, "128 tokens"])
def test_ratios_and_tokens_need_no_cost_model(budget: Any) -> None:
    Budget.parse(budget).require_token_unit()
