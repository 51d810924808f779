"""``vlm_budget.autotune``: every method at every budget, judged and timed on one model, and what none of them beats."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from ..budget import Budget
from ..errors import (
    BudgetError,
    LatencyError,
    MissingExtraError,
    OptionError,
    PatchError,
    PlanError,
    UnsupportedModelError,
)
from ..machine import device_name
from ..methods import MethodLike, configured, resolve_methods
from ..patching import patch
from ..planning import Methods
from ..pruner import Pruner
from ..recipe import Recipe, spec_of
from ..registry import PRUNERS
from .checks import check_running, listed, whole
from .data import prepare
from .front import Front, Point
from .journal import Found, Journal
from .judge import Judge, Score
from .metrics import Metric, MetricName
from .progress import bar

Candidate = MethodLike | Sequence[MethodLike] | Recipe
BUDGETS = (0.1, 0.2, 0.3, 0.5)
# What a method cannot do on this model or within this budget; any other error is a fault, and rises.
_UNFIT = (BudgetError, PatchError, OptionError, UnsupportedModelError)
# What it cannot do today: after `calibrate` or `pip install` it can, so a journal must not remember it.
_PASSING = (LatencyError, MissingExtraError)

Try = tuple[Methods, Budget | None, Any]


def autotune(
    model: Any,
    data: Iterable[Mapping[str, Any]],
    *,
    budgets: Budget | str | float | Iterable[Budget | str | float] = BUDGETS,
    methods: str | Pruner | Recipe | Iterable[Candidate] | None = None,
    metric: MetricName = "agreement",
    answer_tokens: int = 1,
    timed: int = 3,
    repeats: int = 3,
    journal: str | Path | None = None,
    tokenizer: Any = None,
    batch: int = 8,
    max_spread: float = 4.0,
    progress: bool = True,
) -> Front:
    """Judge and time methods at budgets, side by side with the unpruned model.

    Args:
        model: What :func:`vlm_budget.patch` takes, not patched. It is left as it was.
        data: Calibration prompts: the processor's tensors for one prompt each, and ``"answer"`` where there is a label.
        budgets: What each method may spend: one budget, or a list.
        methods: One, or a list of names, configured instances, lists of two (one before the language model and one
            inside), or recipes, which bring their own budget; all registered methods by default.
        metric: ``"accuracy"`` against labels, ``"agreement"`` with the full model's answers, or ``"kl"``.
        answer_tokens: Answer tokens that are judged.
        timed: Calibration prompts that are timed, the largest ones.
        repeats: Times each of them runs, pruned and unpruned in turn; medians count.
        journal: File that keeps every point, so that a stopped run goes on where it was.
        tokenizer: Reads answers given as text.
        batch: Prompts of equal shape that are judged at once; timing always runs one.
        max_spread: How many times more visual tokens the largest prompt may have than the smallest.
        progress: Show a bar on a terminal.

    Returns:
        All points, those that a method cannot do with the reason, and the Pareto front.

    Raises:
        CalibrationError: The data cannot be used, said before the model runs; or the full model gets all of it wrong.
        JournalError: The journal belongs to another run, or was begun on another machine.
        OptionError: Nothing to try, or an argument that means nothing.
        PlanError: A recipe that says no budget.
        UnknownNameError: Unknown method, or an option that a recipe's method has not.
    """
    for name, value in (("timed", timed), ("repeats", repeats)):
        whole(name, value)
    check_running(batch, max_spread)
    tries = read_tries(methods, budgets)
    measure = Metric(metric, answer_tokens)
    calibration = prepare(model, data, tokenizer=tokenizer, labelled=measure.labelled, max_spread=max_spread)
    judge = Judge(model, calibration, measure, batch)
    machine = f"{device_name(judge.model.device)}, {torch.get_num_threads()} threads"
    known = Journal(journal, {**judge.identity, "machine": machine})

    def full() -> Found:
        found = judge.score(None, None)
        return {"quality": found.mean, "se": found.se}

    found = known.remember({"methods": []}, full)
    unpruned = Score(found["quality"], found["se"])
    judge.require_some_right(unpruned.mean)
    points = []
    with bar(len(tries), progress) as tick:
        for number, (acting, spend, spec) in enumerate(tries):
            tick(number, f"{' + '.join(name for name, _ in spec)} at {spend or 'its own rates'}")
            point: dict[str, Any] = {
                "methods": spec,
                "budget": None if spend is None else str(spend),
                "timed": [timed, repeats],
            }
            try:
                found = known.remember(point, partial(_measured, judge, acting, spend, timed, repeats))
            except _PASSING as reason:
                found = _infeasible(reason)
            points.append(Point(tuple(map(tuple, spec)), point["budget"], **found))
    facts = judge.calibration_facts(None, unpruned.mean, unpruned.mean)
    return Front(tuple(points), unpruned, judge.model_facts, facts)


def read_tries(methods: Any, budgets: Any) -> list[Try]:
    """Methods, budget and plain description of all points.

    Args:
        methods: What :func:`autotune` takes; None for all registered ones.
        budgets: Same.

    Raises:
        BudgetError: Not a budget.
        OptionError: Nothing to try, or neither one nor several.
        PatchError: Methods that do not go together.
        PlanError: A recipe that says no budget.
        UnknownNameError: Unknown method, or an option that a recipe's method has not.
    """
    spends = [Budget.parse(budget) for budget in listed("budgets", budgets, (Budget, str, Real))]
    named = PRUNERS.names() if methods is None else listed("methods", methods, (str, Pruner, Recipe))
    found: list[Try] = []
    for candidate in named:
        if isinstance(candidate, Recipe):
            found.append(_recipes_try(candidate))
            continue
        acting = resolve_methods(candidate, {})
        own: list[Budget | None] = [None] if _alone(acting) else [*spends]
        found += [(acting, spend, _spec(acting)) for spend in own]
    if not found:
        raise OptionError("there is nothing to try: name methods and budgets")
    return found


def _recipes_try(recipe: Recipe) -> Try:
    methods = resolve_methods([configured(name, options) for name, options in recipe.methods()], {})
    if recipe.budget is None and not _alone(methods):
        raise PlanError(f"the recipe of {methods} says no budget, and its options do not say one either")
    return methods, None if recipe.budget is None else Budget.parse(recipe.budget), _spec(methods)


def _alone(methods: Methods) -> bool:
    """The options alone say the schedule, so there is no budget to try."""
    return methods.vision is None and methods.decoder is not None and methods.decoder.fixed


def _spec(methods: Methods) -> Any:
    return json.loads(json.dumps([spec_of(method) for method in methods.named]))


def _measured(judge: Judge, methods: Methods, budget: Budget | None, timed: int, repeats: int) -> Found:
    try:
        plans = judge.plans(methods, budget)
        score = judge.score(methods, budget)
        cost = {**judge.prices(plans), **_times(judge, methods, budget, timed, repeats)}
    except _PASSING:
        raise
    except _UNFIT as reason:
        return _infeasible(reason)
    return {"quality": score.mean, "se": score.se, "cost": cost}


def _infeasible(reason: Exception) -> Found:
    return {"infeasible": " ".join(str(reason).split())}


def _times(judge: Judge, methods: Methods, budget: Budget | None, timed: int, repeats: int) -> dict[str, float]:
    """Milliseconds of the prompt behind the encoder, pruned and unpruned: medians over repeats, means over prompts."""
    examples = sorted(judge.calibration.examples, key=lambda one: -one.visual)[:timed]
    unpruned = ([PRUNERS.get("uniform")()], Budget(1.0))
    found: dict[str, list[float]] = {"ms": [], "ms_full": []}
    with judge.judging():
        for example in examples:
            inputs = judge.inputs_of([example])
            runs: dict[str, list[float]] = {name: [] for name in found}
            for turn in range(repeats + 1):
                for name, (acting, spend) in {"ms_full": unpruned, "ms": (methods.named, budget)}.items():
                    with patch(judge.model, acting, spend) as handle:
                        judge.model(**inputs, logits_to_keep=1)
                        report: Any = handle.report()
                    if turn:  # the first turn warms up
                        runs[name].append(report.prefill_ms + report.compact_ms + report.select_ms + report.probe_ms)
            for name, times in runs.items():
                found[name].append(statistics.median(times))
    return {name: statistics.fmean(times) for name, times in found.items()}
