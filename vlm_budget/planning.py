"""Budget x Layout x Methods to a Plan: exact counts per item and decoder layer, whatever unit the budget is in.

Every prompt (batch row) is planned on its own, so that a batch of prompts equals the single prompts; a budget in FLOPs,
milliseconds or bytes is what one prompt may cost the language model at prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .allocate import split
from .budget import Budget, Unit
from .decoder import DecoderPruner, Step
from .errors import BudgetError
from .layout import VisualItem, VisualLayout
from .plan import ItemPlan, Plan
from .pruner import Pruner


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
        return " + ".join(str(method) for method in (self.vision, self.decoder) if method is not None)


@dataclass(frozen=True)
class Facts:
    """What planning must know beside the layout.

    Attributes:
        layers: Decoder layers.
        text: Text tokens per batch row.
        cost: The cost model, for budgets in FLOPs, milliseconds and bytes.
    """

    layers: int
    text: Sequence[int]
    cost: Cost


@dataclass(frozen=True)
class _Prompt:
    """One prompt to plan."""

    methods: Methods
    items: Sequence[VisualItem]
    layers: int

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
        sharer = vision or Pruner()
        tokens = sharer.tokens(budget, self.items)
        if tokens == self.total:
            return self.all_kept()
        spend = tokens * self.layers
        if budget.unit == "ratio" and vision is None:
            spend = round(budget.amount * self.total * self.layers)  # finer than whole tokens per layer
        return self.spending(spend)

    def spending(self, spend: int) -> list[ItemPlan]:
        """Plans with so many visual tokens summed over the decoder's layers."""
        vision, decoder = self.methods.vision, self.methods.decoder
        if vision is None:
            assert decoder is not None
            return self._plans(self.sizes, self._steps(self.total, spend))
        if decoder is None:
            return self._plans(self._shares(max(spend // self.layers, len(self.items))), ())
        # Equal ratios for both stages where the method inside can reach its part, else less for the one before.
        least = max(len(self.items), spend // self.layers)
        even = round((self.total * spend / self.layers) ** 0.5)
        entering = least if decoder.fixed else min(max(even, least), self.total)
        if decoder.fixed:
            entering = _largest(least, self.total, lambda tokens: self._spent(tokens, None) <= spend)
        else:
            entering = _largest(least, entering, lambda tokens: self._spent(tokens, spend) <= spend)
        return self._plans(self._shares(entering), self._steps(entering, spend))

    def _spent(self, tokens: int, spend: int | None) -> float:
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
        return decoder.schedule(tokens, None if decoder.fixed else spend, self.layers)

    def _shares(self, tokens: int) -> list[int]:
        assert self.methods.vision is not None
        return self.methods.vision.shares(Budget(tokens, "tokens", relative=False), self.items)

    def _plans(self, keep: Sequence[int], steps: Sequence[Step]) -> list[ItemPlan]:
        """Item plans; every step is shared out in proportion to what each item still has."""
        counts, taken = list(keep), [[] for _ in keep]
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
        BudgetError: The budget cannot be met by some prompt; the message names the nearest one that can.
    """
    plans: list[ItemPlan] = []
    for row, (items, text) in enumerate(zip(layout.rows, facts.text, strict=True)):
        if items:
            found = _row_plan(_Prompt(methods, items, facts.layers), budget, text, facts.cost)
            plans += [ItemPlan(row, plan.modality, plan.total, plan.keep, plan.steps) for plan in found]
    return Plan(str(methods), "fields" if budget is None else str(budget), tuple(plans), len(layout.rows))


def _row_plan(prompt: _Prompt, budget: Budget | None, text: int, cost: Cost) -> list[ItemPlan]:
    if budget is None:
        return prompt._plans(prompt.sizes, prompt._steps(prompt.total, None))
    if budget.unit in ("ratio", "tokens"):
        return prompt.within(budget)

    def spent(plans: Sequence[ItemPlan]) -> float:
        visual = [sum(plan.tokens_at(layer) for plan in plans) for layer in range(prompt.layers)]
        return cost.amount(budget.unit, text, visual)

    full = spent(prompt.all_kept())
    allowed = budget.amount * full if budget.relative else budget.amount
    if allowed >= full:
        return prompt.all_kept()
    unit = 1 if prompt.methods.decoder is not None else prompt.layers
    least = _least(prompt, unit)
    cheapest = spent(prompt.spending(least * unit))
    if cheapest > allowed:
        raise BudgetError(
            f"budget '{budget}' allows {_amount(allowed, budget.unit)}, but the prompt costs at least "
            f"{_amount(cheapest, budget.unit)} with {str(prompt.methods)} ({text} text tokens and as few visual tokens "
            f"as it can keep), of {_amount(full, budget.unit)} unpruned. The nearest feasible budget is "
            f"'{_nearest(cheapest, full, budget)}'."
        )
    most = prompt.total * prompt.layers // unit
    return prompt.spending(unit * _largest(least, most, lambda n: spent(prompt.spending(n * unit)) <= allowed))


def _least(prompt: _Prompt, unit: int) -> int:
    """The smallest spending, in steps of ``unit``, that the methods can reach."""
    low, high = max(1, len(prompt.items)), prompt.total * prompt.layers // unit
    while low < high:
        middle = (low + high) // 2
        try:
            prompt.spending(middle * unit)
            high = middle
        except BudgetError:
            low = middle + 1
    return low


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in [low, high] that fits, where all smaller ones do; ``low`` is taken to fit."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _at(steps: Sequence[Step], layer: int, tokens: int) -> int:
    return next((step.keep for step in reversed(steps) if step.layer <= layer), tokens)


def _amount(value: float, unit: Unit) -> str:
    scale, name = {"flops": (1e9, "GFLOPs"), "ms": (1, "ms"), "bytes": (1e6, "MB kv")}[unit]
    return f"{value / scale:.4g} {name}"


def _nearest(cheapest: float, full: float, budget: Budget) -> str:
    """The budget just above the cheapest, in the unit and the kind the user spoke."""
    digits = 4
    if budget.relative:
        step = 10.0**-digits
        return str(Budget(min(1.0, (int(cheapest / full / step) + 1) * step), budget.unit))
    return str(Budget(float(f"{cheapest * (1 + 10.0**-digits):.{digits}g}"), budget.unit, relative=False))
