"""``vlm_budget.psigmoid``: the steepness and the floor of a sigmoid over depth, searched for a budget."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..budget import Budget
from ..errors import BudgetError
from ..planning import Methods
from ..recipe import Recipe
from ..registry import PRUNERS
from .checks import check_running, whole
from .data import prepare
from .greedy import Sampler, new_study
from .journal import Journal
from .judge import Judge
from .metrics import Metric, MetricName
from .progress import bar

BETA = (1.0, 40.0)


@dataclass(frozen=True)
class Shape:
    """A sigmoid but for its place, which the budget fixes.

    Attributes:
        beta: Steepness.
        low: Rate of the deepest layers.
    """

    beta: float
    low: float


def best_shape(
    quality: Callable[[Shape], float | None],
    start: Shape,
    most_low: float,
    *,
    trials: int,
    sampler: Sampler = "tpe",
    seed: int = 0,
    on_trial: Callable[[int, float], None] | None = None,
) -> tuple[Shape, float]:
    """The best shape among ``trials``, found by optuna.

    Args:
        quality: Judges a shape; None where it cannot keep to the budget.
        start: Tried first, so that the result is never worse; it must keep to the budget.
        most_low: ``low`` is searched in [0, most_low], ``beta`` in [1, 40] (assumption A5, ours).
        trials: Shapes to judge, ``start`` among them.
        sampler: ``"tpe"`` or ``"gp"``.
        seed: Makes the trials the same every time, so that a resumed search asks for what the journal holds.
        on_trial: Told the trials that are done and the best quality so far.
    """
    study = new_study(sampler, seed, "maximize", startup=min(8, trials))
    study.enqueue_trial({"beta": start.beta, "low": start.low})
    best: tuple[Shape, float] | None = None
    for number in range(trials):
        if on_trial is not None and best is not None:
            on_trial(number, best[1])
        trial = study.ask()
        shape = Shape(trial.suggest_float("beta", *BETA, log=True), trial.suggest_float("low", 0.0, most_low))
        found = quality(shape)
        if found is None:
            study.tell(trial, state=_pruned())
            continue
        study.tell(trial, found)
        if best is None or found > best[1]:
            best = (shape, found)
    assert best is not None, "the first shape keeps to the budget"
    return best


@dataclass(eq=False)
class ShapeSearch:
    """Judged shapes of one model within one budget, each judged once.

    Attributes:
        judge: Judges the model.
        journal: Where judged shapes stand.
        budget: What every shape spends.
        queries: Whose attention ranks; a field of the method.
    """

    judge: Judge
    journal: Journal
    budget: Budget
    queries: str

    def methods(self, shape: Shape) -> Methods:
        """The method that applies a shape."""
        options = {"beta": shape.beta, "low": shape.low, "first": self.judge.first, "queries": self.queries}
        return Methods(None, PRUNERS.get("psigmoid")(**options))

    def quality(self, shape: Shape) -> float | None:
        """Quality of a shape; None where it cannot keep to the budget."""
        try:
            self.judge.plans(self.methods(shape), self.budget)
        except BudgetError:
            return None
        point = {"beta": shape.beta, "low": shape.low, "budget": str(self.budget), "queries": self.queries}
        return self._remembered(point, self.methods(shape), self.budget)

    def full_quality(self) -> float:
        """Quality of the unpruned model.

        Raises:
            CalibrationError: It gets every prompt wrong.
        """
        full = self._remembered({"rates": [1.0] * self.judge.layers, "queries": self.queries}, None, None)
        self.judge.require_some_right(full)
        return full

    def _remembered(self, point: Mapping[str, Any], methods: Methods | None, budget: Budget | None) -> float:
        def judged() -> dict[str, float]:
            found = self.judge.score(methods, budget)
            return {"quality": found.mean, "se": found.se}

        return float(self.journal.remember(point, judged)["quality"])

    def share(self, shape: Shape) -> float:
        """Share of the visual tokens that a layer sees, mean over layers and prompts.

        Raises:
            BudgetError: The shape cannot keep to the budget.
        """
        plans = self.judge.plans(self.methods(shape), self.budget)
        return statistics.fmean(plan.mean_tokens(self.judge.layers) / plan.total for plan in plans)


def psigmoid(
    model: Any,
    data: Iterable[Mapping[str, Any]],
    budget: Budget | str | float,
    *,
    metric: MetricName = "agreement",
    answer_tokens: int = 1,
    trials: int = 40,
    sampler: Sampler = "tpe",
    queries: Literal["instruction", "last"] = "instruction",
    journal: str | Path | None = None,
    tokenizer: Any = None,
    batch: int = 8,
    max_spread: float = 4.0,
    seed: int = 0,
    progress: bool = True,
) -> Recipe:
    """Search the sigmoid over depth that costs least quality within a budget.

    After P-Sigmoid (arXiv 2412.00556), whose text was not at hand: the formula, the ranges and the number of trials are
    ours. The budget places the curve, so that every shape that is tried spends the same.

    Args:
        model: What :func:`vlm_budget.patch` takes, not patched. It is left as it was.
        data: Calibration prompts: the processor's tensors for one prompt each, and ``"answer"`` where there is a label.
        budget: As ``patch`` takes it, in any unit; tokens are the mean per decoder layer.
        metric: ``"accuracy"`` against labels, ``"agreement"`` with the full model's answers, or ``"kl"``.
        answer_tokens: Answer tokens that are judged.
        trials: Shapes to judge.
        sampler: Of optuna: ``"tpe"`` or ``"gp"``.
        queries: Whose attention ranks the tokens, see the method ``"psigmoid"``.
        journal: File that keeps every judged shape, so that a stopped search goes on where it was.
        tokenizer: Reads answers given as text.
        batch: Prompts of equal shape that run at once.
        max_spread: How many times more visual tokens the largest prompt may have than the smallest.
        seed: Of optuna.
        progress: Show a bar on a terminal.

    Returns:
        The recipe: ``recipe.save("plan.json")``, then ``patch(model, plan="plan.json")``.

    Raises:
        CalibrationError: The data cannot be used, said before the model runs; or the full model gets all of it wrong.
        OptionError: An argument that means nothing here.
        BudgetError: No curve keeps to the budget; the message names the nearest one.
        JournalError: The journal belongs to another search.
        MissingExtraError: optuna is not installed.
    """
    spend = Budget.parse(budget)
    whole("trials", trials)
    check_running(batch, max_spread)
    measure, default = Metric(metric, answer_tokens), PRUNERS.get("psigmoid")(queries=queries)
    new_study(sampler, seed, "maximize")  # what is missing is said before the model runs
    calibration = prepare(model, data, tokenizer=tokenizer, labelled=measure.labelled, max_spread=max_spread)
    judge = Judge(model, calibration, measure, batch)
    search = ShapeSearch(judge, Journal(journal, judge.identity), spend, queries)
    start = Shape(default.beta, default.low)
    most_low = _most_low(search.share(start), judge.first, judge.layers)
    full = search.full_quality()
    with bar(trials, progress) as tick:
        best, found = best_shape(
            search.quality,
            start,
            most_low,
            trials=trials,
            sampler=sampler,
            seed=seed,
            on_trial=lambda done, value: tick(done, f"best {measure} {value:.4g}"),
        )
    chosen = search.methods(best)
    assert chosen.decoder is not None
    return Recipe.of(
        [chosen.decoder],
        spend,
        judge.model_facts,
        calibration=judge.calibration_facts(None, found, full),
        cost=judge.prices(judge.plans(chosen, spend)),
    )


def _most_low(share: float, first: int, layers: int) -> float:
    """The highest floor at which the layers that may drop still keep to a mean share of all tokens."""
    return max(0.0, min(share, (share * layers - first) / max(layers - first, 1)))


def _pruned() -> Any:
    import optuna

    return optuna.trial.TrialState.PRUNED
