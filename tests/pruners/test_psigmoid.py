"""P-Sigmoid: the curve, the place that a budget gives it, and the ranking."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import decoder_contexts as make
from vlm_budget.decoder import Step
from vlm_budget.errors import BudgetError, OptionError
from vlm_budget.pruners.gsearch import GSearch
from vlm_budget.pruners.psigmoid import PSigmoid

LAYERS = st.integers(3, 40)
TOKENS = st.sampled_from([1, 7, 63, 111, 577, 2880])


def naive_counts(method: PSigmoid, tokens: int, layers: int, t0: float) -> list[int]:
    """The formula, number by number."""
    counts = []
    for layer in range(layers):
        t = layer / (layers - 1)
        x = min(max(-method.beta * (t - t0), -700), 700)
        rate = method.low + (method.high - method.low) / (1 + math.exp(-x))
        counts.append(tokens if layer < method.first else min(tokens, max(1, math.ceil(rate * tokens - 1e-9))))
    return counts


def per_layer(steps: tuple[Step, ...], tokens: int, layers: int) -> list[int]:
    counts = [tokens] * layers
    for step in steps:
        counts[step.layer :] = [step.keep] * (layers - step.layer)
    return counts


@given(LAYERS, TOKENS, st.floats(0.5, 60), st.floats(-0.5, 1.5), st.floats(0, 1), st.integers(1, 4))
def test_a_given_place_gives_the_formula(
    layers: int, tokens: int, beta: float, t0: float, low: float, first: int
) -> None:
    method = PSigmoid(beta=beta, t0=t0, low=low, first=first)
    assert method.fixed
    steps = method.schedule(tokens, None, layers)
    assert per_layer(steps, tokens, layers) == naive_counts(method, tokens, layers, t0)


@given(LAYERS, TOKENS, st.sampled_from([1.0, 3.0, 10.0, 40.0, 1e4]), st.floats(0.0, 0.2), st.floats(0.05, 1))
def test_a_budget_is_met_within_one_token_per_layer(
    layers: int, tokens: int, beta: float, low: float, share: float
) -> None:
    method, spend = PSigmoid(beta=beta, low=low), round(share * tokens * layers)
    least = 2 * tokens + (layers - 2) * max(1, math.ceil(low * tokens - 1e-9))
    if spend < least:
        with pytest.raises(BudgetError, match="nearest feasible budget"):
            method.schedule(tokens, spend, layers)
        return
    steps = method.schedule(tokens, spend, layers)
    counts = per_layer(steps, tokens, layers)
    assert spend - layers <= sum(counts) <= spend
    assert counts[:2] == [tokens] * 2
    assert min(counts) >= 1
    assert all(step.keep < before for step, before in zip(steps, [tokens, *(s.keep for s in steps)], strict=False))


def test_the_nearest_budget_that_is_named_can_be_met() -> None:
    method, tokens, layers = PSigmoid(), 577, 24
    with pytest.raises(BudgetError, match=r"The nearest feasible budget is '(.+)%'") as caught:
        method.schedule(tokens, round(0.05 * tokens * layers), layers)
    share = float(str(caught.value).rsplit("'", 2)[1].removesuffix("%")) / 100
    assert method.schedule(tokens, math.floor(share * tokens * layers + 0.5), layers)


def test_a_very_steep_curve_is_a_step() -> None:
    steps = PSigmoid(beta=1e6, t0=2.5 / 11, low=0.3).schedule(100, None, 12)
    assert steps == (Step(3, 30),)
    assert steps == GSearch(rates=(1, 1, 1, *[0.3] * 9)).schedule(100, None, 12)


def test_a_larger_budget_never_takes_tokens_from_a_layer() -> None:
    before = [0] * 16
    for spend in range(16 * 63 // 4, 16 * 63 + 1, 29):
        counts = per_layer(PSigmoid().schedule(63, spend, 16), 63, 16)
        assert all(now >= then for now, then in zip(counts, before, strict=True))
        before = counts


@pytest.mark.parametrize("make_method", [PSigmoid, GSearch])
@pytest.mark.parametrize("levels", [None, 2])
def test_the_instruction_ranks(make_method: Callable[..., PSigmoid | GSearch], levels: int | None) -> None:
    ctx = make.context(["ab", 7, "c", 12, "defg"], order=0, seed=3, levels=levels)
    rows = list(range(2 + 7 + 1 + 12, 26))
    assert ctx.captured is not None
    heads = range(len(ctx.captured.query))
    scores = [
        sum(make.softmax_row(ctx.captured, head, row)[column] for head in heads for row in rows)
        for column in ctx.columns.tolist()
    ]
    for k in (1, 3, 6):
        picked = make_method().pick(ctx, k).tolist()
        expected = sorted(range(7), key=lambda index: (-round(scores[index], 9), index))[:k]
        if levels is None:
            assert picked == expected
        else:  # equal scores may differ in the last bit of float32
            assert sorted(round(scores[i], 5) for i in picked) == sorted(round(scores[i], 5) for i in expected)


@pytest.mark.parametrize("make_method", [PSigmoid, GSearch])
def test_the_last_token_ranks_where_asked(make_method: Callable[..., PSigmoid | GSearch]) -> None:
    ctx = make.context(["ab", 9, "cdef"], seed=1)
    assert ctx.captured is not None
    scores = torch.tensor([make.softmax_row(ctx.captured, head, 14) for head in range(len(ctx.captured.query))]).mean(0)
    expected = scores[ctx.columns].topk(4).indices.tolist()
    assert make_method(queries="last").pick(ctx, 4).tolist() == expected


def test_without_text_behind_the_picture_the_last_column_ranks() -> None:
    ctx = make.context(["abc", 9], seed=1)
    assert torch.equal(PSigmoid().pick(ctx, 4), PSigmoid(queries="last").pick(ctx, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be a finite number above 0"),
        ({"beta": math.inf}, "beta must be a finite number above 0"),
        ({"t0": math.nan}, "t0 must be finite"),
        ({"low": 0.5, "high": 0.4}, "low <= high"),
        ({"high": 1.5}, "high"),
        ({"high": 0.0}, "high"),
        ({"low": -0.1}, "low"),
        ({"first": 0}, "first must be a layer from 1 on"),
        ({"first": True}, "first must be a layer from 1 on"),
        ({"beta": "10"}, "beta must be a finite number"),
        ({"beta": 10**400}, "beta must be a finite number"),
        ({"beta": None}, "beta must be a finite number"),
        ({"beta": True}, "beta must be a finite number"),
        ({"t0": "x"}, "t0 must be finite"),
        ({"t0": [0.5]}, "t0 must be finite"),
        ({"low": "a"}, "low='a'"),
        ({"high": None}, "high=None"),
        ({"low": math.nan}, "low"),
        ({"first": "2"}, "first must be a layer"),
        ({"queries": ["last"]}, "queries must be"),
        ({"queries": "all"}, "queries must be 'instruction' or 'last'"),
    ],
)
def test_fields_that_make_no_curve_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PSigmoid(**options)  # type: ignore[arg-type]
