"""``vlm_budget.gsearch``: per-layer keep rates for one model, searched on calibration prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..budget import Budget
from ..errors import InfeasibleBudgetError, OptionError
from ..planning import Methods
from ..recipe import Recipe
from ..registry import PRUNERS
from .checks import check_running, whole
from .data import prepare
from .greedy import Rates, Sampler, Smallest, bayesian, greedy_rates, new_study
from .journal import Journal
from .judge import Judge, Score
from .metrics import Metric, MetricName
from .prefix import PrefixJudge
from .progress import Tick, bar

_RAISE, _RAISES, _REFINEMENTS = 4, 20, 4
_EVALUATIONS = 12


@dataclass(eq=False)
class RateSearch:
    """Judged schedules of one model, each judged once.

    Attributes:
        judge: Judges the model.
        journal: Where judged schedules stand.
        queries: Whose attention ranks; a field of the method.
        prefix: Runs only the layers behind those that a search has settled; None runs all layers.
    """

    judge: Judge
    journal: Journal
    queries: str
    prefix: PrefixJudge | None = None

    def method(self, rates: Rates) -> Methods:
        """The method that applies rates."""
        return Methods(None, PRUNERS.get("gsearch")(rates=rates, queries=self.queries))

    def score(self, rates: Rates) -> Score:
        """Quality of a schedule."""

        def judged() -> dict[str, float]:
            if all(rate == 1 for rate in rates):
                found = self.judge.score(None, None)
            elif self.prefix is not None:
                found = self.prefix.score(rates)
            else:
                found = self.judge.score(self.method(rates), None)
            return {"quality": found.mean, "se": found.se}

        found = self.journal.remember({"rates": list(rates), "queries": self.queries}, judged)
        return Score(found["quality"], found["se"])

    def full_quality(self) -> float:
        """Quality of the unpruned model.

        Raises:
            CalibrationError: It gets every prompt wrong.
        """
        full = self.score((1.0,) * self.judge.layers).mean
        self.judge.require_some_right(full)
        return full

    def search(self, loss: float, smallest: Smallest | None, tick: Tick) -> Rates:
        """The lowest rates that lose at most ``loss``, in the metric's own way."""
        layers = self.judge.layers
        floor = self.judge.metric.floor(self.full_quality(), loss)

        def on_layer(layer: int, fixed: Rates) -> None:
            tick(layer, f"layer {layer} of {layers}, rate {fixed[-1]:.2f}, {len(self.journal)} schedules")
            if self.prefix is not None:
                self.prefix.fix(fixed)

        return greedy_rates(
            lambda rates: self.score(rates).mean >= floor,
            layers,
            first=self.judge.first,
            smallest=smallest,
            on_layer=on_layer,
        )

    def share(self, rates: Rates, budget: Budget) -> float:
        """The largest cost of any prompt, as a multiple of what the budget allows it."""
        plans = self.judge.plans(self.method(rates), None)
        worst = 0.0
        for plan, example in zip(plans, self.judge.calibration.examples, strict=True):
            counts = plan.row_tokens(0, self.judge.layers)
            if budget.unit in ("ratio", "tokens"):
                allowed = budget.amount * (example.visual if budget.unit == "ratio" else 1)
                worst = max(worst, sum(counts) / self.judge.layers / allowed)
                continue
            full = self.judge.cost.amount(budget.unit, example.text, [example.visual] * self.judge.layers)
            spent = self.judge.cost.amount(budget.unit, example.text, counts)
            worst = max(worst, spent / (budget.amount * full if budget.relative else budget.amount))
        return worst


def gsearch(
    model: Any,
    data: Iterable[Mapping[str, Any]],
    *,
    metric: MetricName = "agreement",
    tolerance: float | None = None,
    budget: Budget | str | float | None = None,
    answer_tokens: int = 1,
    search: Literal["bisection", "bayes"] = "bisection",
    sampler: Sampler | None = None,
    evaluations: int | None = None,
    queries: Literal["instruction", "last"] = "instruction",
    journal: str | Path | None = None,
    tokenizer: Any = None,
    batch: int = 8,
    max_spread: float = 4.0,
    seed: int | None = None,
    progress: bool = True,
) -> Recipe:
    """Search the smallest keep rate of every decoder layer that costs at most ``tolerance`` in quality.

    After G-Search (arXiv 2412.00556), whose text was not at hand: what is ranked by which attention, what a trial does
    with deeper layers, the tolerance and bisection are ours. Takes up to six judged schedules per layer, less as rates
    get small; layers that are settled do not run again where the metric needs the first answer token only.

    Args:
        model: What :func:`vlm_budget.patch` takes, not patched. It is left as it was.
        data: Calibration prompts: the processor's tensors for one prompt each, and ``"answer"`` where there is a label.
        metric: ``"accuracy"`` against labels, ``"agreement"`` with the full model's answers, or ``"kl"``.
        tolerance: Quality that may be lost: a share of the full model's, below 1 (default 0.01); nats for ``"kl"``
            (0.02).
        budget: Raise the tolerance until the schedule keeps to this budget on every prompt; ``tolerance`` is then the
            least one tried.
        answer_tokens: Answer tokens that are judged.
        search: ``"bisection"``, or ``"bayes"`` by optuna, as the paper does.
        sampler: Of ``"bayes"``: ``"tpe"`` (default) or ``"gp"``.
        evaluations: Of ``"bayes"``: trials per layer, 12 by default.
        queries: Whose attention ranks the tokens, see the method ``"gsearch"``.
        journal: File that keeps every judged schedule, so that a stopped search goes on where it was.
        tokenizer: Reads answers given as text.
        batch: Prompts of equal shape that run at once.
        max_spread: How many times more visual tokens the largest prompt may have than the smallest.
        seed: Of ``"bayes"``, 0 by default.
        progress: Show a bar on a terminal.

    Returns:
        The recipe: ``recipe.save("plan.json")``, then ``patch(model, plan="plan.json")``.

    Raises:
        CalibrationError: The data cannot be used, said before the model runs; or the full model gets all of it wrong.
        OptionError: An argument that means nothing here.
        BudgetError: No schedule keeps to the budget: the first two layers see every token.
        JournalError: The journal belongs to another search.
        MissingExtraError: ``search="bayes"`` without optuna.
    """
    spend = None if budget is None else Budget.parse(budget)
    measure = Metric(metric, answer_tokens)
    allowed = measure.allowed(tolerance)
    check_running(batch, max_spread)
    PRUNERS.get("gsearch")(queries=queries)  # refuses unknown ones before the model runs
    smallest = smallest_by(search, sampler, evaluations, seed)
    calibration = prepare(model, data, tokenizer=tokenizer, labelled=measure.labelled, max_spread=max_spread)
    judge = Judge(model, calibration, measure, batch)
    prefix = PrefixJudge(judge, queries, judge.first) if measure.tokens == 1 else None
    found = RateSearch(judge, Journal(journal, judge.identity), queries, prefix)
    if spend is not None:
        _require_reachable(found, spend)
    with bar(judge.layers, progress) as tick:
        if spend is None:
            rates = found.search(allowed, smallest, tick)
        else:
            allowed, rates = _within(
                spend,
                allowed,
                math.inf if measure.name == "kl" else 1.0,
                lambda loss: found.search(loss, smallest, tick),
                lambda it: found.share(it, spend) <= 1,
            )
    full, quality = found.full_quality(), found.score(rates).mean
    methods = found.method(rates)
    assert methods.decoder is not None
    return Recipe.of(
        [methods.decoder],
        None,
        judge.model_facts,
        calibration=judge.calibration_facts(allowed, quality, full),
        cost=judge.prices(judge.plans(methods, None)),
    )


def smallest_by(search: str, sampler: Sampler | None, evaluations: int | None, seed: int | None) -> Smallest | None:
    """How a layer's rate is found; None for bisection.

    Raises:
        OptionError: No such way, or options of the other one.
        MissingExtraError: optuna is not installed, or scipy for ``"gp"``.
    """
    if search not in ("bisection", "bayes"):
        raise OptionError(f"search must be 'bisection' or 'bayes', got {search!r}")
    if search == "bayes":
        count = _EVALUATIONS if evaluations is None else whole("evaluations", evaluations)
        chosen: Sampler = "tpe" if sampler is None else sampler
        start = 0 if seed is None else seed
        new_study(chosen, start, "minimize")  # what is not installed is said before the model runs
        return bayesian(count, chosen, start)
    for name, value in (("sampler", sampler), ("evaluations", evaluations), ("seed", seed)):
        if value is not None:
            raise OptionError(f"{name} is for search='bayes'; bisection has none, got {name}={value!r}")
    return None


def _require_reachable(found: RateSearch, budget: Budget) -> None:
    layers = found.judge.layers
    first = found.judge.first
    least = found.share((1.0,) * first + (0.0,) * (layers - first), budget)
    if least > 1:
        grain = 1 if budget.unit == "tokens" else 10**4
        units = math.ceil(budget.amount * least * grain - 1e-6)
        nearest = replace(budget, amount=units / grain)
        while found.share((1.0,) * first + (0.0,) * (layers - first), nearest) > 1:
            units += 1  # products of floats may fall short by a hair
            nearest = replace(budget, amount=units / grain)
        raise InfeasibleBudgetError(
            f"no schedule keeps to budget '{budget}': the first {first} of {layers} layers see every visual token. "
            "Drop tokens before the language model, with a method such as 'hired', or raise the budget.",
            [nearest],
        )


def _within(
    budget: Budget, least: float, most: float, searched: Callable[[float], Rates], fits: Callable[[Rates], bool]
) -> tuple[float, Rates]:
    """The smallest tolerance, of those tried, whose schedule keeps to the budget; judged schedules are shared."""
    low, high = 0.0, least
    for _ in range(_RAISES):
        rates = searched(high)
        if fits(rates):
            break
        low, high = high, min(_RAISE * high, most)
    else:
        raise InfeasibleBudgetError(f"no tolerance up to {low:g} gives a schedule within '{budget}'. Raise the budget.")
    for _ in range(_REFINEMENTS if low else 0):
        middle = (low * high) ** 0.5
        tried = searched(middle)
        if fits(tried):
            high, rates = middle, tried
        else:
            low = middle
    return high, rates
