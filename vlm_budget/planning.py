"""Budget x Layout x Methods to a Plan: exact counts per item and decoder layer, whatever unit the budget is in.

Every prompt (batch row) is planned on its own, so that a batch of prompts equals the single prompts; a budget in FLOPs,
milliseconds or bytes is what one prompt may cost the language model at prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_HALF_UP, Decimal
from typing import Protocol

from .allocate import split
from .budget import Budget, Unit, in_words
from .decoder import DecoderPruner, Step
from .errors import BudgetError, InfeasibleBudgetError, PatchError
from .layout import VisualItem, VisualLayout
from .plan import FIXED, ItemPlan, Plan
from .pruner import Pruner
from .schedules import nearest_share


class Cost(Protocol):
    """What a prompt costs the language model."""

    def amount(self, unit: Unit, text: int, visual: Sequence[int]) -> float:
        """The prompt pass in FLOPs, milliseconds or bytes of KV cache.

        Args:
            unit: ``"flops"``, ``"ms"`` or ``"bytes"``.
            text: Text tokens of the prompt.
            visual: Visual tokens at every decoder layer.

        Raises:
            BudgetError: The unit cannot be predicted (milliseconds without a calibration).
        """
        ...


@dataclass(frozen=True)
class Methods:
    """What acts where: at most one method before the language model, at most one inside.

    Attributes:
        vision: Before the language model.
        decoder: Inside it.
    """

    vision: Pruner | None = None
    decoder: DecoderPruner | None = None

    def __str__(self) -> str:
        """The methods' constructor calls, joined by ``" + "``."""
        return " + ".join(map(str, self.named))

    @property
    def named(self) -> list[Pruner]:
        """Those that there are, as :func:`vlm_budget.patch` takes them."""
        return [method for method in (self.vision, self.decoder) if method is not None]


@dataclass(frozen=True)
class Facts:
    """What planning must know beside the layout.

    Attributes:
        layers: Decoder layers.
        text: Text tokens per batch row.
        cost: The cost model, for budgets in FLOPs, milliseconds and bytes.
        first: First decoder layer at whose input tokens may be dropped: 1, or where the model has added its last visual
            features (Qwen3-VL).
    """

    layers: int
    text: Sequence[int]
    cost: Cost
    first: int = 1


@dataclass(frozen=True)
class _Prompt:
    """One prompt to plan."""

    methods: Methods
    items: Sequence[VisualItem]
    layers: int
    first: int = 1

    @property
    def sizes(self) -> list[int]:
        return [item.size for item in self.items]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def all_kept(self) -> list[ItemPlan]:
        return self._plans(self.sizes, ())

    def within(self, budget: Budget) -> list[ItemPlan]:
        """Plans within a ratio or a number of tokens (mean per decoder layer where a method acts inside)."""
        vision, decoder = self.methods.vision, self.methods.decoder
        if decoder is None:
            assert vision is not None
            return self._plans(vision.shares(budget, self.items), ())
        spend = self._spend_inside(budget) if vision is None else vision.tokens(budget, self.items) * self.layers
        return self.all_kept() if spend == self.total * self.layers else self.spending(spend)

    def _spend_inside(self, budget: Budget) -> int:
        """Visual tokens summed over the layers, where nothing is dropped before them."""
        try:
            tokens = budget.tokens(self.total, len(self.items))
        except InfeasibleBudgetError as error:
            if budget.unit == "tokens" and budget.amount > self.total:
                raise
            # What one token per item costs is no answer where the first layers see all of them.
            least = max(_least(self, 1), len(self.items) * self.layers)
            raise InfeasibleBudgetError(error.reason, [nearest_share(least, self.total * self.layers)]) from error
        if budget.unit == "tokens":
            return tokens * self.layers
        # Finer than whole tokens per layer, and rounded like them.
        exact = Decimal(repr(budget.amount)) * self.total * self.layers
        return int(exact.to_integral_value(ROUND_HALF_UP))

    def spending(self, spend: int) -> list[ItemPlan]:
        """Plans with so many visual tokens summed over the decoder's layers."""
        vision, decoder = self.methods.vision, self.methods.decoder
        if vision is None:
            assert decoder is not None
            return self._plans(self.sizes, self._steps(self.total, spend))
        least = max(len(self.items), spend // self.layers)
        if decoder is None:
            return self._plans(self._shares(least), ())
        # Equal ratios for both stages where the method inside can reach its part, else less for the one before.
        even = round((self.total * spend / self.layers) ** 0.5)
        most = self.total if decoder.fixed else min(max(even, least), self.total)
        entering = _largest(least, most, lambda tokens: self._spent(tokens, spend) <= spend)
        return self._plans(self._shares(entering), self._steps(entering, spend))

    def reached(self, spend: int) -> list[ItemPlan] | None:
        """:meth:`spending`, or None where the methods cannot get down to it."""
        try:
            return self.spending(spend)
        except BudgetError:
            return None

    def _spent(self, tokens: int, spend: int) -> float:
        try:
            steps = self._steps(tokens, spend)
        except BudgetError:
            return float("inf")
        return sum(_at(steps, layer, tokens) for layer in range(self.layers))

    def _steps(self, tokens: int, spend: int | None) -> tuple[Step, ...]:
        decoder = self.methods.decoder
        assert decoder is not None
        if not decoder.fixed and spend is not None and spend >= tokens * self.layers:
            return ()
        given = None if decoder.fixed else spend
        if self.first > 1 and self.first >= self.layers:
            raise PatchError(
                f"{decoder} cannot drop tokens in this model: it adds visual features behind each of its first "
                f"{self.first} layers, and has {self.layers}. Drop before the language model, with a method such as "
                "'hired'."
            )
        return decoder.schedule_behind(self.first, tokens, given, self.layers)

    def _shares(self, tokens: int) -> list[int]:
        assert self.methods.vision is not None
        return self.methods.vision.shares(Budget(tokens, "tokens", relative=False), self.items)

    def _plans(self, keep: Sequence[int], steps: Sequence[Step]) -> list[ItemPlan]:
        """Item plans; every step is shared out in proportion to what each item still has."""
        counts = list(keep)
        taken: list[list[tuple[int, int]]] = [[] for _ in keep]
        for step in steps:
            floors = [1] * len(counts) if step.keep >= len(counts) and min(counts) else [0] * len(counts)
            counts = split(step.keep, counts, counts, floors)
            for found, count in zip(taken, counts, strict=True):
                found.append((step.layer, count))
        return [
            ItemPlan(0, item.modality, item.size, count, tuple(found))
            for item, count, found in zip(self.items, keep, taken, strict=True)
        ]


def make_plan(methods: Methods, budget: Budget | None, layout: VisualLayout, facts: Facts) -> Plan:
    """Exact counts for every item of every prompt.

    Args:
        methods: What acts where.
        budget: What a prompt may spend; None where the method inside is ``fixed``.
        layout: Where the visual tokens are.
        facts: Of the model and the prompts.

    Raises:
        BudgetError: The budget cannot be met by some prompt; the message names the nearest one that all of them can.
        PatchError: The method inside would drop before ``facts.first``.
    """
    plans, faults = _plan_rows(methods, budget, layout, facts)
    if faults:
        raise _for_all(faults, budget, lambda near: _plan_rows(methods, near, layout, facts)[1])
    joint = methods.vision is not None and methods.vision.joint
    return Plan(str(methods), FIXED if budget is None else str(budget), tuple(plans), len(layout.rows), joint)


_Faults = list[InfeasibleBudgetError]


def _plan_rows(
    methods: Methods, budget: Budget | None, layout: VisualLayout, facts: Facts
) -> tuple[list[ItemPlan], _Faults]:
    plans: list[ItemPlan] = []
    faults: _Faults = []
    for row, (items, text) in enumerate(zip(layout.rows, facts.text, strict=True)):
        if not items:
            continue
        try:
            found = _row_plan(_Prompt(methods, items, facts.layers, facts.first), budget, text, facts.cost)
        except InfeasibleBudgetError as fault:
            faults.append(fault)
            continue
        plans += [ItemPlan(row, plan.modality, plan.total, plan.keep, plan.steps) for plan in found]
    return plans, faults


def _for_all(faults: _Faults, budget: Budget | None, faults_of: Callable[[Budget], _Faults]) -> InfeasibleBudgetError:
    """The error of the worst prompt, naming budgets that all prompts can meet, the others too."""
    nearest = _worst(faults, budget)
    fault = next(f for f in faults if not nearest or nearest[0] in f.nearest)
    met = (_met_by_all(near, faults_of) for near in nearest)
    return InfeasibleBudgetError(fault.reason, [near for near in met if near is not None])


def _worst(faults: _Faults, budget: Budget | None) -> list[Budget]:
    """Per unit that every fault names a budget in, the one that suits the most demanding prompt."""
    known = [{near.unit: near for near in fault.nearest} for fault in faults]
    too_many = budget is not None and all(near.amount < budget.amount for fault in faults for near in fault.nearest)
    worst = min if too_many else max
    return [worst((of[unit] for of in known), key=_amount) for unit in known[0] if all(unit in of for of in known)]


def _met_by_all(near: Budget, faults_of: Callable[[Budget], _Faults]) -> Budget | None:
    for _ in range(_TRIES):
        try:
            again = faults_of(near)
        except BudgetError:  # of a method that names no budget
            return None
        if not again:
            return near
        named = [other for other in _worst(again, near) if other.unit == near.unit]
        if not named:
            return None
        near = named[0]
    return None


_TRIES = 8  # a share that the worst prompt can meet is met by all at the first or second


def _amount(budget: Budget) -> float:
    return budget.amount


def _row_plan(prompt: _Prompt, budget: Budget | None, text: int, cost: Cost) -> list[ItemPlan]:
    if budget is None:
        return prompt._plans(prompt.sizes, prompt._steps(prompt.total, None))
    if budget.unit in ("ratio", "tokens"):
        return prompt.within(budget)
    unit = budget.unit

    def price(plans: Sequence[ItemPlan]) -> float:
        visual = [sum(plan.tokens_at(layer) for plan in plans) for layer in range(prompt.layers)]
        return cost.amount(unit, text, visual)

    full = price(prompt.all_kept())
    allowed = budget.amount * full if budget.relative else budget.amount
    if allowed >= full:
        return prompt.all_kept()
    # Whole tokens where nothing is dropped inside, else the finest that a schedule can be given.
    grain = 1 if prompt.methods.decoder is not None else prompt.layers
    low, high = len(prompt.items), prompt.total * prompt.layers // grain
    best: list[ItemPlan] | None = None
    while low <= high:
        middle = (low + high) // 2
        plans = prompt.reached(middle * grain)
        if plans is None or price(plans) <= allowed:
            best, low = plans or best, middle + 1
        else:
            high = middle - 1
    if best is not None:
        return best
    least = prompt.spending(_least(prompt, grain) * grain)
    cheapest = price(least)
    if cheapest <= allowed:  # a schedule that gets cheaper somewhere as it gets longer
        return least
    raise InfeasibleBudgetError(
        f"budget '{budget}' allows {in_words(allowed, unit)}, but the prompt costs at least "
        f"{in_words(cheapest, unit)} with {prompt.methods} ({text} text tokens and as few visual tokens as it can "
        f"keep), of {in_words(full, unit)} unpruned.",
        [_nearest(cheapest, full, budget)],
    )


def _least(prompt: _Prompt, grain: int) -> int:
    """The smallest spending, in multiples of ``grain``, that the methods can reach."""
    low, high = len(prompt.items), prompt.total * prompt.layers // grain
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if prompt.reached(middle * grain) is not None else (middle + 1, high)
    return low


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in [low, high] that fits, where all smaller ones do; ``low`` is taken to fit.

    Where they do not (a schedule that gets cheaper somewhere as it gets longer), the answer still fits.
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _at(steps: Sequence[Step], layer: int, tokens: int) -> int:
    return next((step.keep for step in reversed(steps) if step.layer <= layer), tokens)


def _nearest(cheapest: float, full: float, budget: Budget) -> Budget:
    """The budget of four digits just above the cheapest, in the unit and the kind the user spoke."""
    digits = 4
    wanted = Decimal(cheapest) / Decimal(full) if budget.relative else Decimal(cheapest)
    while True:
        step = Decimal(1).scaleb(wanted.adjusted() - digits + 1)
        rounded = (wanted / step).to_integral_value(ROUND_CEILING) * step
        amount = float(min(rounded, Decimal(1))) if budget.relative else float(rounded)
        if (amount * full if budget.relative else amount) >= cheapest:
            return Budget(amount, budget.unit, budget.relative)
        wanted = rounded + step  # a product of floats may fall short by a hair
