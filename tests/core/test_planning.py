"""Plans from budgets: the most that fits, in every unit, for methods before and inside the language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget import Budget, BudgetError, Pruner
from vlm_budget.budget import Unit
from vlm_budget.decoder import DecoderPruner, Step
from vlm_budget.errors import LatencyError
from vlm_budget.layout import VisualItem, VisualLayout
from vlm_budget.plan import ItemPlan, Plan
from vlm_budget.planning import Facts, Methods, make_plan
from vlm_budget.pruners.hired import HiRED

LAYERS = 6
UNITS: tuple[Unit, ...] = ("flops", "ms", "bytes")


class Prices:
    """A toy cost: FLOPs grow with the square of the length, times by a constant and a line, bytes by a line."""

    def amount(self, unit: Unit, text: int, visual: Sequence[int]) -> float:
        lengths = [text + count for count in visual]
        if unit == "flops":
            return float(sum(1000 * n + 7 * n * n for n in lengths))
        return 3.5 + sum(0.01 * n for n in lengths) if unit == "ms" else float(sum(12 * n for n in lengths))


class NoClock(Prices):
    def amount(self, unit: Unit, text: int, visual: Sequence[int]) -> float:
        raise LatencyError("not calibrated")


@dataclass(frozen=True, kw_only=True)
class Drop(DecoderPruner):
    """All tokens before ``layer``, as many as can be paid behind; with ``part`` always that part."""

    layer: int = 2
    part: float | None = None
    least: int = 1

    @property
    def fixed(self) -> bool:
        return self.part is not None

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        if self.part is not None:
            return (Step(self.layer, max(1, int(tokens * self.part))),)
        assert spend is not None
        keep = min(tokens, (spend - self.layer * tokens) // (layers - self.layer))
        if keep < self.least:
            raise BudgetError(f"cannot spend as little as {spend}")
        return (Step(self.layer, keep),)


@dataclass(frozen=True, kw_only=True)
class Stairs(DecoderPruner):
    """One level per layer, falling in equal steps as far as needed."""

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        assert spend is not None
        for slope in range(tokens + 1):
            counts = [max(1, tokens - slope * layer) for layer in range(layers)]
            if sum(counts) <= spend:
                return tuple(Step(layer, count) for layer, count in enumerate(counts) if layer)
        raise BudgetError(f"cannot spend as little as {spend}")


SMALL, LARGE = make.single(7), make.anyres(2, 1, side=4)
METHODS = {
    "vision": Methods(vision=Pruner()),
    "hired": Methods(vision=HiRED()),
    "drop": Methods(decoder=Drop()),
    "stairs": Methods(decoder=Stairs()),
    "vision and drop": Methods(Pruner(), Drop(layer=3)),
    "vision and stairs": Methods(Pruner(), Stairs()),
    "vision and a fixed drop": Methods(Pruner(), Drop(part=0.25)),
}


def plan_of(
    methods: Methods, budget: Any, rows: Sequence[Sequence[VisualItem]], text: Sequence[int] = (), cost: Any = None
) -> Plan:
    layout = VisualLayout(tuple(tuple(row) for row in rows))
    facts = Facts(LAYERS, text or [11] * len(rows), cost or Prices())
    return make_plan(methods, None if budget is None else Budget.parse(budget), layout, facts)


def price(plan: Plan, unit: Unit, row: int = 0, text: int = 11) -> float:
    return Prices().amount(unit, text, plan.row_tokens(row, LAYERS))


def full_price(unit: Unit, items: Sequence[VisualItem], text: int = 11) -> float:
    return Prices().amount(unit, text, [sum(item.size for item in items)] * LAYERS)


def every_plan(methods: Methods, items: Sequence[VisualItem]) -> list[Plan]:
    """What the methods make of every whole number of tokens per layer, and of all that lies between."""
    total = sum(item.size for item in items)
    grain = 1 if methods.decoder is not None else LAYERS
    found = []
    for spend in range(grain, total * LAYERS + 1, grain):
        try:
            found.append(plan_of(methods, Budget(spend, "bytes", False), [items], cost=Spend()))
        except BudgetError:
            continue
    return found


class Spend:
    """Charges a token once per layer, text for nothing."""

    def amount(self, unit: Unit, text: int, visual: Sequence[int]) -> float:
        return float(sum(visual))


# --- the most that fits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("items", [[SMALL], [LARGE], [SMALL, LARGE, make.single(1)]])
@pytest.mark.parametrize("method", ["vision", "hired", "drop", "stairs"])
def test_a_plan_is_the_dearest_that_fits(method: str, items: list[VisualItem], unit: Unit) -> None:
    methods = METHODS[method]
    prices = sorted(price(plan, unit) for plan in every_plan(methods, items))
    for share in (0.3, 0.51, 0.77, 0.93, 0.999):
        allowed = share * full_price(unit, items)
        if prices[0] > allowed:
            continue
        plan = plan_of(methods, Budget(share, unit), [items])
        assert price(plan, unit) == max(found for found in prices if found <= allowed)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", [name for name in METHODS if " and " in name])
def test_composed_methods_stay_within_and_come_close(method: str, unit: Unit) -> None:
    items = [make.single(15), LARGE]
    full = full_price(unit, items)
    for share in (0.5, 0.62, 0.8, 0.95):
        plan = plan_of(METHODS[method], Budget(share, unit), [items])
        assert price(plan, unit) <= share * full and all(item.steps for item in plan.items)
        # A fixed drop may leave something over that the method before it has no use for.
        used_up = "fixed" in method and plan.keep == plan.total
        assert price(plan, unit) > 0.97 * share * full or used_up


@given(st.sampled_from(sorted(METHODS)), st.sampled_from(UNITS), st.integers(0, 40), st.data())
def test_more_budget_never_buys_less(method: str, unit: Unit, text: int, data: Any) -> None:
    items = [make.single(data.draw(st.integers(2, 9))), make.single(3)]
    low, high = sorted(data.draw(st.tuples(*[st.floats(0.01, 1.0)] * 2)))

    def bought(share: float) -> float:
        try:
            return price(plan_of(METHODS[method], Budget(share, unit), [items], [text]), unit, text=text)
        except BudgetError:
            return 0.0

    assert bought(low) <= bought(high) <= full_price(unit, items, text)


@given(st.sampled_from(UNITS), st.floats(0.05, 1.0))
def test_an_absolute_budget_buys_what_the_same_share_does(unit: Unit, share: float) -> None:
    methods, items = METHODS["vision"], [SMALL, LARGE]

    def counts(budget: Budget) -> list[int] | str:
        try:
            return [item.keep for item in plan_of(methods, budget, [items]).items]
        except BudgetError:
            return "out of reach"

    absolute = Budget(share * full_price(unit, items), unit, relative=False)
    assert counts(Budget(share, unit)) == counts(absolute)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "budget", ["100% flops", "100% ms", "100% kv", "1 PFLOPs", "10 s", "1 GB kv", 1.0, "49 tokens"]
)
def test_a_budget_for_everything_keeps_everything(method: str, budget: Any) -> None:
    plan = plan_of(METHODS[method], budget, [[SMALL]])
    assert plan.items == (ItemPlan(0, "image", 49, 49),)


def test_rows_are_planned_as_if_alone() -> None:
    rows, text = [[SMALL], [], [LARGE, SMALL], [make.frames(3, 4, 4)]], [5, 70, 33, 1]
    for methods in METHODS.values():
        for budget in ("70% flops", "90% ms", "75% kv", 0.7, "12 tokens"):
            try:
                batch = plan_of(methods, budget, rows, text)
            except BudgetError:
                assert methods.vision is None  # the first layers see all tokens
                continue
            assert batch.rows == 4 and {item.row for item in batch.items} == {0, 2, 3}
            for row in (0, 2, 3):
                alone = plan_of(methods, budget, [rows[row]], [text[row]])
                assert batch.row_tokens(row, LAYERS) == alone.row_tokens(0, LAYERS)


def test_the_price_of_text_is_paid_from_the_budget() -> None:
    budget = Budget(full_price("flops", [SMALL], text=20), "flops", relative=False)
    keeps = [plan_of(METHODS["vision"], budget, [[SMALL]], [text]).keep for text in (20, 30, 40, 60)]
    assert keeps == [49, 39, 29, 9]


def test_a_ratio_base_of_a_method_does_not_touch_real_units() -> None:
    item = make.anyres(2, 2, side=6, pad=(2, 0))
    padded, plain = (plan_of(Methods(HiRED(budget_base=base)), "40% flops", [[item]]) for base in ("padded", "valid"))
    assert [entry.keep for entry in padded.items] == [entry.keep for entry in plain.items]


# --- tokens and ratios -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "tokens"), [(0.5, 25), ("29%", 14), ("7 tokens", 7), (1, 1)])
def test_tokens_and_ratios_before_the_language_model_are_the_budgets_own(budget: Any, tokens: int) -> None:
    assert plan_of(METHODS["vision"], budget, [[SMALL]]).keep == tokens


@pytest.mark.parametrize(("ratio", "behind"), [("50%", 12), ("50.4%", 12), ("51%", 13), ("90%", 41), ("99.5%", 48)])
def test_a_ratio_inside_is_the_mean_over_layers_finer_than_whole_tokens(ratio: str, behind: int) -> None:
    # 49 tokens in each of 6 layers are 294; two layers see all, what is left is shared by four: 147 - 98 = 49 -> 12.
    plan = plan_of(METHODS["drop"], ratio, [[SMALL]])
    assert plan.items == (ItemPlan(0, "image", 49, 49, ((2, behind),)),)


def test_a_ratio_inside_is_rounded_half_up_in_decimals() -> None:
    seen: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Spy(Drop):
        def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
            seen.append(spend or 0)
            return super().schedule(tokens, spend, layers)

    plan_of(Methods(decoder=Spy()), "72.5%", [[make.single(5, 2)]])  # of 60
    plan_of(
        Methods(decoder=Spy()), "57.5%", [[make.single(5, 10)]]
    )  # of 300, as a product of floats 172.49999999999997
    assert seen == [44, 173]


@pytest.mark.parametrize("method", [name for name in METHODS if "vision and" in name])
@pytest.mark.parametrize("budget", [0.2, 0.5, 0.83, "1 tokens", "30 tokens"])
def test_composed_methods_keep_the_mean_over_layers_within_the_tokens(method: str, budget: Any) -> None:
    plan = plan_of(METHODS[method], budget, [[SMALL]])
    tokens = Budget.parse(budget).tokens(49)
    assert plan.mean_tokens(LAYERS) <= tokens
    used_up = "fixed" in method and plan.keep == plan.total
    assert plan.mean_tokens(LAYERS) >= max(1, tokens - 2) or used_up


def test_composed_methods_share_one_budget_in_equal_ratios_where_both_can() -> None:
    plan = plan_of(METHODS["vision and stairs"], 0.64, [[make.single(10)]])
    assert plan.keep == 80 and plan.mean_tokens(LAYERS) == pytest.approx(64, abs=1.5)


def test_a_fixed_method_inside_leaves_the_budget_to_the_one_before() -> None:
    plan = plan_of(METHODS["vision and a fixed drop"], 0.4, [[make.single(10)]])
    # From n tokens the fixed drop makes 2 n + 4 n / 4, so that 240 buy 80.
    assert (plan.keep, plan.items[0].steps) == (80, ((2, 20),))


def test_a_fixed_method_alone_needs_no_budget() -> None:
    plan = plan_of(Methods(decoder=Drop(part=0.5)), None, [[SMALL], [LARGE]])
    assert plan.budget == "fields"
    assert [item.steps for item in plan.items] == [((2, 24),), ((2, LARGE.size // 2),)]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.floats(0.35, 1.0))
def test_steps_are_shared_among_items_exactly_and_no_item_is_wiped_out(sides: list[int], ratio: float) -> None:
    items = [make.single(side) for side in sides]
    total = sum(item.size for item in items)
    try:
        plan = plan_of(METHODS["drop"], ratio, [items])
    except BudgetError:
        return
    spend = Budget(ratio).tokens(total * LAYERS)
    behind = min(total, (spend - 2 * total) // 4) if spend < total * LAYERS else total
    assert plan.row_tokens(0, LAYERS) == [total, total, *[behind] * 4]
    if behind >= len(items):
        assert all(item.tokens_at(LAYERS - 1) >= 1 for item in plan.items)


# --- out of reach ----------------------------------------------------------------------------------------------------


def nearest(error: BudgetError) -> str:
    return str(error).split("nearest feasible budget is '")[1].split("'")[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["1% flops", "1% ms", "1% kv", "10 flops", "0.5 ms", "7 B kv", "0.00001 GFLOPs"])
def test_what_is_out_of_reach_names_the_nearest_budget_and_that_is_feasible(method: str, budget: str) -> None:
    rows, text = [[SMALL], [LARGE, SMALL], [make.single(2)]], [11, 3, 40]
    with pytest.raises(BudgetError, match=r"allows .* but the prompt costs at least .* of .* unpruned") as caught:
        plan_of(METHODS[method], budget, rows, text)
    found = Budget.parse(nearest(caught.value))
    assert (found.unit, found.relative) == (Budget.parse(budget).unit, Budget.parse(budget).relative)
    plan = plan_of(METHODS[method], found, rows, text)
    assert plan.mean_tokens(LAYERS) < plan.total
    with pytest.raises(BudgetError):  # and it is near: a hundredth less is out of reach again
        plan_of(METHODS[method], Budget(found.amount * 0.99, found.unit, found.relative), rows, text)


def test_the_message_says_what_was_got_what_it_buys_and_what_is_possible() -> None:
    with pytest.raises(BudgetError) as caught:
        plan_of(METHODS["vision"], "1% flops", [[SMALL]])
    assert str(caught.value) == (
        "budget '1% flops' allows 5.112 kFLOPs, but the prompt costs at least 78.05 kFLOPs with Pruner() (11 text "
        "tokens and as few visual tokens as it can keep), of 511.2 kFLOPs unpruned. The nearest feasible budget is "
        "'15.27% flops'."
    )


def test_a_methods_own_limits_count_towards_the_least() -> None:
    methods = Methods(decoder=Drop(least=30))
    with pytest.raises(BudgetError) as caught:
        plan_of(methods, "20% flops", [[SMALL]])
    plan = plan_of(methods, nearest(caught.value), [[SMALL]])
    assert plan.items[0].steps == ((2, 30),)


def test_milliseconds_nobody_can_predict_are_refused_with_that_reason() -> None:
    with pytest.raises(LatencyError, match="not calibrated"):
        plan_of(METHODS["vision"], "80 ms", [[SMALL]], cost=NoClock())
    assert plan_of(METHODS["vision"], 0.5, [[SMALL]], cost=NoClock()).keep == 25


def test_a_plan_says_which_methods_and_budget_it_is_for() -> None:
    plan = plan_of(METHODS["vision and drop"], "60% flops", [[SMALL]])
    assert (plan.method, plan.budget) == ("Pruner() + Drop(layer=3)", "60% flops")
    assert Plan.from_json(plan.to_json()) == plan
