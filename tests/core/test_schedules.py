"""Schedules of drops: within what may be spent, as near as whole tokens allow, and the nearest budget otherwise."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import decoder_contexts as make
from synthetic_items import anyres, single
from vlm_budget import BudgetError
from vlm_budget.budget import Budget
from vlm_budget.decoder import DecoderPruner, Step
from vlm_budget.errors import InfeasibleBudgetError, OptionError, PatchError
from vlm_budget.layout import VisualLayout
from vlm_budget.plan import Plan
from vlm_budget.planning import Facts, Methods, make_plan
from vlm_budget.pruner import Pruner
from vlm_budget.pruners.dart import DART
from vlm_budget.pruners.fastv import FastV
from vlm_budget.pruners.gsearch import GSearch
from vlm_budget.pruners.psigmoid import PSigmoid
from vlm_budget.pruners.pyramiddrop import PyramidDrop
from vlm_budget.pruners.sparsevlm import SparseVLM
from vlm_budget.pruners.vtw import VTW
from vlm_budget.schedules import check_stages, one_drop, out_of_reach, stage_layers

METHODS: list[DecoderPruner] = [
    FastV(),
    FastV(k=1),
    PyramidDrop(),
    PyramidDrop(at=(0.1, 0.2, 0.3, 0.9)),
    SparseVLM(),
    SparseVLM(version=2),
    DART(),
    VTW(),
]
DEPTHS = [3, 4, 6, 28, 32]


class NoCost:
    """Ratios and tokens cost nothing to plan."""

    def amount(self, *_: object) -> float:
        raise AssertionError("a ratio needs no cost model")


def least_spend(method: DecoderPruner, tokens: int, layers: int) -> int:
    """Found by trying."""
    low, high = 0, tokens * layers
    while low < high:
        middle = (low + high) // 2
        try:
            method.schedule(tokens, middle, layers)
            high = middle
        except BudgetError:
            low = middle + 1
    return low


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 31])
def test_every_budget_is_met_or_named_unreachable(method: DecoderPruner, layers: int, tokens: int) -> None:
    least = least_spend(method, tokens, layers)
    before: tuple[Step, ...] = ()
    for spend in range(1, tokens * layers + 1):
        if spend < least:
            with pytest.raises(BudgetError, match="nearest feasible budget is"):
                method.schedule(tokens, spend, layers)
            continue
        steps = method.schedule(tokens, spend, layers)
        starts, keep = [step.layer for step in steps], [tokens, *(step.keep for step in steps)]
        assert starts == sorted(set(starts)) and all(1 <= start < layers for start in starts)
        assert keep == sorted(keep, reverse=True) and (isinstance(method, VTW) or keep[-1] >= 1)
        unspent = spend - make.spent(steps, tokens, layers)
        assert 0 <= unspent < (tokens if isinstance(method, VTW) else layers - min(starts, default=0))
        for layer in range(layers):  # more to spend never means fewer tokens anywhere
            assert seen(steps, layer, tokens) >= (seen(before, layer, tokens) if spend > least else 0)
        before = steps
    assert steps == ()


def seen(steps: tuple[Step, ...], layer: int, tokens: int) -> int:
    return min([tokens, *(step.keep for step in steps if step.layer <= layer)])


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("layers", "tokens"), [(3, 7), (6, 577), (28, 1000), (32, 576), (32, 2881)])
def test_the_nearest_feasible_budget_is_feasible_and_near(method: DecoderPruner, layers: int, tokens: int) -> None:
    with pytest.raises(BudgetError) as error:
        method.schedule(tokens, 1, layers)
    named = re.search(r"nearest feasible budget is '([0-9.]+%)'", str(error.value))
    assert named and str(method) in str(error.value)
    share = Budget.parse(named[1]).amount
    least = least_spend(method, tokens, layers)
    assert least <= round(share * tokens * layers) <= least + 1e-4 * tokens * layers + 1


@given(st.integers(1, 3000), st.integers(2, 40), st.data())
def test_one_drop_spends_all_but_the_part_that_is_no_token_per_layer(
    tokens: int, layers: int, data: st.DataObject
) -> None:
    layer = data.draw(st.integers(1, layers - 1))
    spend = data.draw(st.integers(layer * tokens + layers - layer, tokens * layers))
    steps = one_drop("x", layer, tokens, spend, layers)
    assert spend - (layers - layer) < make.spent(steps, tokens, layers) <= spend


@pytest.mark.parametrize("method", [FastV(k=6), FastV(k=6, r=0.5), DART(layer=7), VTW(layer=6)], ids=str)
def test_a_layer_the_model_does_not_have_is_refused(method: DecoderPruner) -> None:
    with pytest.raises(OptionError, match="the model has only 6.*between 1 and 5"):
        method.schedule(10, None if method.fixed else 50, 6)


def test_a_model_of_one_layer_has_nowhere_to_drop() -> None:
    for method in (PyramidDrop(), SparseVLM(), PyramidDrop(ratios=(0.5, 0.4, 0.3))):
        with pytest.raises(OptionError, match="the model has only 1"):
            method.schedule(10, None if method.fixed else 5, 1)


@pytest.mark.parametrize(
    ("at", "layers", "stages"),
    [
        ((0.25, 0.5, 0.75), 32, ((8, 0), (16, 1), (24, 2))),
        ((0.25, 0.5, 0.75), 6, ((2, 0), (3, 1), (5, 2))),
        ((0.25, 0.5, 0.75), 4, ((1, 0), (2, 1), (3, 2))),
        ((0.25, 0.5, 0.75), 3, ((1, 0), (2, 2))),  # two meet: the later, which keeps less
        ((2 / 32, 6 / 32, 15 / 32), 32, ((2, 0), (6, 1), (15, 2))),
        ((2 / 32, 6 / 32, 15 / 32), 6, ((1, 1), (3, 2))),
        ((2 / 32, 6 / 32, 15 / 32), 3, ((1, 2),)),
        ((0.01, 0.99), 5, ((1, 0), (4, 1))),
    ],
)
def test_stages_begin_at_the_nearest_layer(at: tuple[float, ...], layers: int, stages: object) -> None:
    assert stage_layers("x", at, layers) == stages


@pytest.mark.parametrize(
    "at", [(), (0.0, 0.5), (0.5, 1.0), (0.5, 0.25), (0.5, 0.5), ("0.5",), (True,), 0.5, (float("nan"),), None]
)
def test_depths_must_ascend_within_the_model(at: object) -> None:
    with pytest.raises(OptionError, match="at must be ascending shares"):
        check_stages(at, None)


@pytest.mark.parametrize("ratios", [(), (0.5,), (0.25, 0.5), (1.5, 0.5), (0.5, 0.0), (0.5, None), "ab", 0.5])
def test_shares_must_be_one_per_stage_and_never_grow(ratios: object) -> None:
    with pytest.raises(OptionError, match="ratios must"):
        check_stages((0.25, 0.5), ratios)


def test_depths_and_shares_may_come_as_lists() -> None:
    assert check_stages([0.25, 0.5], [1, 0.5]) == ((0.25, 0.5), (1.0, 0.5))


def test_the_message_says_what_was_asked_and_what_is_possible() -> None:
    text = str(out_of_reach("FastV()", spend=100, least=216, tokens=144, layers=4))
    assert "FastV() cannot keep to 25 of 144 visual tokens, mean over 4 decoder layers" in text
    assert "'37.5%'" in text


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("layers", [4, 32])
def test_a_prompt_of_several_images_shares_every_step_in_proportion(method: DecoderPruner, layers: int) -> None:
    items = (anyres(2, 2, side=5), single(7), single(1), single(12))
    total = sum(item.size for item in items)
    facts = Facts(layers, [20], NoCost())
    plan = make_plan(Methods(decoder=method), Budget(0.6), VisualLayout((items,)), facts)
    spend = round(0.6 * total * layers)
    steps = method.schedule(total, spend, layers)
    assert steps and [layer for layer, _ in plan.items[0].steps] == [step.layer for step in steps]
    for index, step in enumerate(steps):
        counts = [item.steps[index][1] for item in plan.items]
        assert sum(counts) == step.keep
        for item, count in zip(items, counts, strict=True):
            assert abs(count - step.keep * item.size / total) < index + 2  # each step rounds anew
    assert plan.keep == total
    unspent = spend - round(plan.mean_tokens(layers) * layers)
    assert 0 <= unspent < (total if isinstance(method, VTW) else layers)


def test_a_fixed_method_is_planned_without_a_budget() -> None:
    layout = VisualLayout(((single(4), single(3)),))
    plan = make_plan(Methods(decoder=FastV(k=1, r=0.75)), None, layout, Facts(4, [5], NoCost()))
    assert [item.steps for item in plan.items] == [((1, 4),), ((1, 2),)]  # round(25 / 4) = 6 of 25


# --- models whose first layers must see everything (Qwen3-VL) --------------------------------------------------------

LATE = [PyramidDrop(), SparseVLM(), SparseVLM(version=2), VTW(), PSigmoid(), GSearch(), FastV(k=3), DART(layer=3)]
LATE_FIXED = [
    PyramidDrop(ratios=(0.5, 0.4, 0.3)),
    SparseVLM(ratios=(0.5, 0.4, 0.3)),
    PSigmoid(t0=0.1),
    FastV(k=3, r=0.5),
]


def late_plan(method: DecoderPruner, budget: Any, first: int = 3, sides: Sequence[int] = (7,), layers: int = 8) -> Plan:
    rows = VisualLayout(tuple((single(side),) for side in sides))
    facts = Facts(layers, [20] * len(sides), Tokens(), first)
    return make_plan(Methods(decoder=method), None if budget is None else Budget.parse(budget), rows, facts)


class Tokens:
    """A price of one per token and layer."""

    def amount(self, unit: str, text: int, visual: Sequence[int]) -> float:
        return float(sum(text + count for count in visual))


@pytest.mark.parametrize("method", [*LATE, *LATE_FIXED], ids=str)
@pytest.mark.parametrize("budget", [0.6, "70% flops", "30 tokens"])
def test_nothing_is_dropped_before_the_first_layer_that_may(method: DecoderPruner, budget: Any) -> None:
    plan = late_plan(method, None if method.fixed else budget)
    assert plan.drop_layers and min(plan.drop_layers) >= 3
    if budget == 0.6 and not method.fixed:
        assert plan.mean_tokens(8) <= 0.6 * 49 + 1 / 8


@pytest.mark.parametrize("method", LATE, ids=str)
@pytest.mark.parametrize("budget", ["1%", 0.01, "1 token", "5 tokens", "1% flops", "2% kv", "100 flops", 0.2])
@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("sides", [(7,), (12, 3, 7)])
def test_the_budget_that_is_named_is_accepted(
    method: DecoderPruner, budget: Any, first: int, sides: tuple[int, ...]
) -> None:
    try:
        late_plan(method, budget, first, sides)
    except BudgetError as error:
        named = str(error).split("nearest feasible budget is '")[1].split("'")[0]
        assert late_plan(method, named, first, sides).drop_layers
        assert str(method) in str(error) or "less than one each" in str(error)
    else:
        assert budget in ("5 tokens", 0.2, "2% kv", "1% flops", "1%", 0.01)


@pytest.mark.parametrize(
    ("sides", "budget", "words"),
    [
        ((7, 5, 9), 60, "25 tokens (or 1.0)"),
        ((9, 5, 7), "26 tokens", "25 tokens (or 1.0)"),
        ((20, 3, 7), 0.001, "1 token (or 0.1111)"),
    ],
)
def test_a_batch_is_told_what_all_its_prompts_can_meet(sides: tuple[int, ...], budget: Any, words: str) -> None:
    rows = VisualLayout(tuple((single(side),) for side in sides))
    facts = Facts(8, [20] * len(sides), NoCost())
    with pytest.raises(InfeasibleBudgetError, match=re.escape(f"nearest feasible budget is {words}.")) as caught:
        make_plan(Methods(Pruner()), Budget.parse(budget), rows, facts)
    for near in caught.value.nearest:
        make_plan(Methods(Pruner()), near, rows, facts)


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        (FastV(), "Pass k=3, or more."),
        (FastV(r=0.5), "Pass k=3, or more."),
        (DART(), "Pass layer=3, or more."),
        (VTW(layer=1), "Pass layer=3, or more."),
        (GSearch(rates=(1, 1, *[0.5] * 6)), "Pass rates that are 1 for the first 3 layers."),
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [0.6, 0.01, "1% flops", "60% flops"])
def test_a_numbered_layer_that_is_too_early_is_named_with_the_field(
    method: DecoderPruner, advice: str, budget: Any
) -> None:
    with pytest.raises(PatchError, match="adds visual features behind each of its first 3 layers") as caught:
        late_plan(method, None if method.fixed else budget)
    assert str(method) in str(caught.value) and str(caught.value).endswith(advice)


def test_a_model_that_adds_features_behind_all_layers_drops_nowhere() -> None:
    for method in (PSigmoid(), FastV(), VTW()):
        assert late_plan(method, 1.0, first=3, layers=3).drop_layers == []
        with pytest.raises(PatchError, match="first 3 layers, and has 3. Drop before the language model"):
            late_plan(method, 0.5, first=3, layers=3)
