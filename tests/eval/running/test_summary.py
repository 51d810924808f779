"""Figures of runs made by hand, against sums done by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthetic_run import make_run
from vlm_budget.errors import RunError, UnknownNameError
from vlm_budget.eval.cells import FIXED, Cell
from vlm_budget.eval.store import Answer, BatchTime, Run
from vlm_budget.eval.summary import COSTS, Result, Summary, compare, summarise
from vlm_budget.eval.task import Task, read_task

TASK = "nano_count"
FULL, RANDOM, HIRED, FASTV = Cell(), Cell("random", "40%"), Cell("hired", "40%"), Cell("fastv", "40%")


def said(cell: Cell, scores: Mapping[str, float | None], cost: Mapping[str, float] | None = None) -> list[Answer]:
    """Answers by sample; None is an error. Every sample is its own cluster."""
    return [
        Answer(TASK, name, cell, name, error="ImageError: torn")
        if value is None
        else Answer(TASK, name, cell, name, "x", {"accuracy": value}, dict(cost or {}))
        for name, value in scores.items()
    ]


def a_run(
    answers: Sequence[Answer], times: Sequence[BatchTime] = (), version: int = 1, cells: Sequence[Cell] | None = None
) -> Run:
    columns = list(dict.fromkeys(one.cell for one in answers)) if cells is None else cells
    listed = [{"methods": cell.methods, "budget": cell.budget} for cell in columns]
    return Run(Path("run"), {"tasks": {TASK: version}, "cells": listed}, tuple(answers), tuple(times))


def results(run: Run, **options: Any) -> dict[Cell, Result]:
    return {one.cell: one for one in summarise(run, **options).results}


def test_main_is_the_mean_with_its_standard_error() -> None:
    found = results(a_run(said(FULL, {"a": 1, "b": 1, "c": 0, "d": 1})))[FULL]
    # s² = (3 · 0.25² + 0.75²) / 3 = 0.25, and the error is the root of s² / 4
    assert (found.main.mean, found.main.n) == (0.75, 4)
    assert found.main.se == pytest.approx(0.25)
    assert found.figures == {"accuracy": 0.75}
    assert (found.minus_unpatched, found.minus_random) == (None, None)


def test_errors_of_one_page_are_clustered() -> None:
    answers = [replace(one, cluster="page") for one in said(FULL, {"a": 1, "b": 1})] + said(FULL, {"c": 0, "d": 1})
    # Sums about the mean 0.75 are 0.5, -0.75 and 0.25: 0.875 · 3 / 2, its root over 4 samples.
    assert results(a_run(answers))[FULL].main.se == pytest.approx(math.sqrt(0.875 * 1.5) / 4)


def test_differences_are_first_minus_second_on_shared_samples_only() -> None:
    run = a_run(
        [
            *said(FULL, {"a": 1, "b": 1, "c": 0, "d": None, "e": 1}),
            *said(HIRED, {"a": 1, "b": 0, "c": 1, "d": 1, "e": None}),
            *said(RANDOM, {"b": 0, "c": 0, "d": 0, "e": 1}),
        ]
    )
    found = results(run)
    hired = found[HIRED]
    assert hired.main.mean == 0.75
    assert hired.minus_unpatched is not None
    assert hired.minus_random is not None
    assert (hired.minus_unpatched.difference, hired.minus_unpatched.n) == (0.0, 3)  # a, b, c: 0 - 1 + 1
    assert (hired.minus_random.difference, hired.minus_random.n) == (pytest.approx(2 / 3), 3)  # b, c, d
    random = found[RANDOM]
    assert random.minus_random is None
    assert random.minus_unpatched is not None
    assert random.minus_unpatched.difference == pytest.approx(-1 / 3)  # b, c, e
    assert random.minus_unpatched.low <= -1 / 3 <= random.minus_unpatched.high


def test_random_tokens_are_those_of_the_same_budget() -> None:
    names = {"a": 1.0, "b": 1.0}
    run = a_run([*said(FULL, names), *said(Cell("hired", "20%"), names), *said(RANDOM, {"a": 0, "b": 0})])
    assert results(run)[Cell("hired", "20%")].minus_random is None
    fixed = Cell("gsearch(rates=(1,1,0.5,0.2))", FIXED)
    run = a_run([*said(fixed, names), *said(Cell("random", FIXED), names)])
    assert results(run)[fixed].minus_random is None


def test_errors_are_counted_by_reason_and_left_out() -> None:
    answers = said(HIRED, {"a": 1, "b": None, "c": None, "d": 0})
    answers[1] = replace(answers[1], error="BudgetError: too small")
    found = results(a_run([*answers, *said(FULL, {"a": None, "b": None})]))
    assert found[HIRED].errors == {"BudgetError: too small": 1, "ImageError: torn": 1}
    assert (found[HIRED].main.mean, found[HIRED].main.n) == (0.5, 2)
    assert found[HIRED].minus_unpatched is None
    assert found[HIRED].share == {}
    assert (found[FULL].main.n, sum(found[FULL].errors.values())) == (0, 2)
    assert math.isnan(found[FULL].main.mean)


def test_cells_without_any_answer_are_left_out() -> None:
    summary = summarise(a_run(said(HIRED, {"a": 1}), cells=[FULL, HIRED]))
    assert summary.cells == (FULL, HIRED)
    assert [one.cell for one in summary.results] == [HIRED]
    assert (TASK, FULL) not in summary.by_place


def test_shares_of_cost_are_over_samples_that_both_answered() -> None:
    run = a_run(
        [
            *said(FULL, {"a": 1}, {"flops": 100, "mean_kept": 10}),
            *said(FULL, {"b": 1}, {"flops": 300, "mean_kept": 30}),
            *said(FULL, {"big": None, "other": 1}, {"flops": 7000, "mean_kept": 700}),
            *said(HIRED, {"a": 1}, {"flops": 40, "mean_kept": 2}),
            *said(HIRED, {"b": 1}, {"flops": 120, "mean_kept": 6}),
            *said(HIRED, {"big": 1, "other": None}, {"flops": 9000, "mean_kept": 900}),
        ]
    )
    found = results(run)[HIRED]
    assert found.share == {"mean_kept": pytest.approx(0.2), "flops": pytest.approx(0.4)}
    assert found.cost["flops"] == pytest.approx((40 + 120 + 9000) / 3)


def test_times_are_per_prompt_and_prefill_holds_the_choice() -> None:
    names = {"a": 1.0, "b": 1.0, "c": 1.0}
    times = [
        BatchTime(TASK, FULL, ("a", "b", "c"), {"prefill": 60.0, "encode": 9.0}),
        BatchTime(TASK, HIRED, ("a", "b"), {"prefill": 10.0, "select": 6.0, "compact": 2.0, "encode": 5.0}),
        BatchTime(TASK, HIRED, ("c",), {"prefill": 11.0, "encode": 1.0}),
    ]
    run = a_run([*said(FULL, names), *said(HIRED, names)], times)
    found = results(run)[HIRED]
    assert found.cost == {"prefill_ms": pytest.approx(29 / 3), "select_ms": 2, "compact_ms": pytest.approx(2 / 3)} | {
        "encode_ms": 2
    }
    assert found.share == {"prefill_ms": pytest.approx(29 / 60)}
    bare = results(run, times=False)
    assert bare[HIRED].cost == {}
    assert bare[HIRED].minus_unpatched == found.minus_unpatched


def test_without_times_equal_runs_give_equal_figures(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, samples=24), make_run(tmp_path, speed=3.0, samples=24)
    assert summarise(one, times=False).results == summarise(two, times=False).results
    assert summarise(one).results != summarise(two).results


def test_names_with_an_underscore_are_not_shown() -> None:
    rows = [
        Answer(TASK, name, FULL, name, "x", {"accuracy": 1.0, "_hit": 1.0, **more})
        for name, more in (("a", {"extra": 4.0}), ("b", {}))
    ]
    assert results(a_run(rows))[FULL].figures == {"accuracy": 1.0, "extra": 4.0}


def test_another_version_of_a_task_is_refused() -> None:
    with pytest.raises(RunError, match=r"version 7 of task 'nano_count', here it is 1.*Run it again"):
        summarise(a_run(said(FULL, {"a": 1}), version=7))
    task: Task = replace(read_task(TASK), version=2)
    with pytest.raises(RunError, match="here it is 2"):
        summarise(a_run(said(FULL, {"a": 1})), [task])


def test_a_task_that_is_not_known_here_is_said() -> None:
    run = a_run(said(FULL, {"a": 1}))
    with pytest.raises(UnknownNameError, match="Did you mean 'nano_count'"):
        summarise(replace(run, manifest={**run.manifest, "tasks": {"nano_cuont": 1}}))


def test_compare_takes_shared_answers_and_keeps_the_sign() -> None:
    run = a_run(
        [*said(HIRED, {"a": 1, "b": 1, "c": 0, "d": None}), *said(FASTV, {"a": 0, "b": 1, "d": 1, "e": 0})],
    )
    found = compare(run, TASK, "accuracy", HIRED, FASTV)
    assert (found.difference, found.n) == (0.5, 2)
    assert compare(run, TASK, "accuracy", FASTV, HIRED).difference == -0.5
    with pytest.raises(RunError, match="hired at 40% and unpatched share no answered sample of 'nano_count'"):
        compare(run, TASK, "accuracy", HIRED, FULL)


def priced(full: float | None = 1.0) -> Summary:
    """A method at a quarter and three quarters of the cost, one at a single budget, one dearer than the model."""
    cells = {
        Cell("hired", "20%"): (0.25, [1, 0, 0, 0]),
        Cell("hired", "60%"): (0.75, [1, 1, 1, 0]),
        Cell("fastv", "40%"): (0.5, [1, 1, 0, 0]),
        Cell("slow", "90%"): (1.5, [1, 1, 1, 1]),
    }
    answers = [] if full is None else said(FULL, dict.fromkeys("abcd", full), {"flops": 100.0})
    for cell, (share, right) in cells.items():
        answers += said(cell, dict(zip("abcd", map(float, right), strict=True)), {"flops": 100 * share})
    return summarise(a_run(answers))


def test_at_equal_cost_the_metric_lies_on_the_line_between_budgets() -> None:
    found = priced().at_equal_cost(TASK, "flops", (0.2, 0.25, 0.5, 0.75, 0.9, 1.0, 1.2))
    assert (found.cost, found.shares) == ("flops", (0.2, 0.25, 0.5, 0.75, 0.9, 1.0, 1.2))
    # From (0.25, 0.25) over (0.75, 0.75) to the unpatched model's (1, 1); below and above nothing was measured.
    assert found.rows["hired"] == (None, *map(pytest.approx, (0.25, 0.5, 0.75, 0.9, 1.0)), None)
    assert found.rows["fastv"] == (None, None, 0.5, *map(pytest.approx, (0.75, 0.9, 1.0)), None)
    assert found.rows["slow"] == (None,) * 7
    assert "unpatched" not in found.rows


def test_at_equal_cost_nothing_is_said_without_a_full_cost() -> None:
    assert priced(None).at_equal_cost(TASK, "flops").rows == dict.fromkeys(("hired", "fastv", "slow"), (None,) * 3)
    assert priced().at_equal_cost(TASK, "kv_bytes").rows["hired"] == (None, None, None)
    assert "kv_bytes" in COSTS
