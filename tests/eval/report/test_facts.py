from dataclasses import replace
from pathlib import Path

import pytest

from synthetic_run import make_run
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.report import facts
from vlm_budget.eval.report.facts import Footgun
from vlm_budget.eval.store import Run
from vlm_budget.eval.summary import Summary, summarise
from vlm_budget.eval.task import read_task


def titled(summary: Summary, title: str, times: bool = True) -> Footgun | None:
    return next((one for one in facts.footguns(summary, times) if title in one.title), None)


def without(run: Run, *methods: str) -> Run:
    cells = [one for one in run.manifest["cells"] if one["methods"] not in methods]
    kept = tuple(one for one in run.answers if one.cell.methods not in methods)
    return replace(run, manifest={**run.manifest, "cells": cells}, answers=kept)


def test_a_run_whose_answers_are_all_there_is_finished(summary: Summary) -> None:
    now = facts.progress(summary)
    assert (now.answers, now.expected, now.errors, now.finished) == (1920, 1920, 32, True)
    assert titled(summary, "not finished") is None


def test_a_run_that_lacks_one_answer_is_not_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    summary = summarise(replace(run, answers=run.answers[1:]))
    assert str(facts.progress(summary)) == "not finished: 1,919 of 1,920 answers"
    found = titled(summary, "not finished")
    assert found is not None and "eval resume" in found.text


@pytest.mark.parametrize("reads_text", [True, False])
def test_small_budgets_and_clear_losses_are_named_where_a_task_reads_text(tmp_path: Path, reads_text: bool) -> None:
    run = make_run(tmp_path)
    tasks = [replace(read_task(name), reads_text=reads_text) for name in run.manifest["tasks"]]
    found = titled(summarise(run, tasks), "nano_count reads small print")
    if not reads_text:
        assert found is None
        return
    assert found is not None
    named = {case.partition(":")[0] for case in found.cases}
    assert {"hired at 0.1", "hired at 0.2", "fastv at 0.4"} <= named
    assert "unpatched" not in named


def test_a_kept_share_above_a_quarter_without_a_clear_loss_is_not_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    same = {(one.task, one.sample): one for one in run.answers if one.cell.unpatched}
    answers = [
        replace(same[one.task, one.sample], cell=one.cell, cost=one.cost) if one.cell.methods == "hired" else one
        for one in run.answers
    ]
    tasks = [replace(read_task(name), reads_text=True) for name in run.manifest["tasks"]]
    found = titled(summarise(replace(run, answers=tuple(answers)), tasks), "nano_count reads")
    assert found is not None
    named = {case.partition(":")[0] for case in found.cases}
    assert "hired at 0.4" not in named and "hired at 0.2" in named


def test_cells_that_are_not_faster_are_named_with_their_figure(summary: Summary) -> None:
    found = titled(summary, "Not faster")
    assert found is not None
    assert "divprune at 0.4 on nano_count: not faster, 1.13 x the unpatched prefill" in found.cases
    assert all(case.startswith("divprune at 0.4") for case in found.cases)
    assert facts.slow(summary) == [Cell("divprune", "0.4")]
    assert titled(summary, "Not faster", times=False) is None


def test_methods_that_lose_to_random_are_named(summary: Summary) -> None:
    found = titled(summary, "Worse than random")
    assert found is not None
    assert {case.split()[0] for case in found.cases} == {"fastv"}
    assert {cell.methods for cell in facts.losing(summary)} == {"fastv"}


@pytest.mark.parametrize(("samples", "few"), [(60, True), (100, True), (101, False)])
def test_few_answered_samples_are_named(tmp_path: Path, samples: int, few: bool) -> None:
    """One sample of each task is broken."""
    found = titled(summarise(make_run(tmp_path, samples=samples)), "Few samples")
    assert (found is not None) == few
    assert found is None or found.cases[0] == f"nano_retrieval: {samples - 1} samples"


def test_what_always_holds_is_always_said(summary: Summary) -> None:
    assert titled(summary, "Overlapping intervals") is not None
    assert titled(summary, "side by side, on this machine") is not None
    assert titled(summary, "side by side, on this machine", times=False) is None


def test_refused_baselines_are_named(tmp_path: Path, summary: Summary) -> None:
    found = titled(summarise(without(make_run(tmp_path), "random", "uniform")), "Baselines")
    assert found is not None and found.cases == ["random", "uniform"]
    assert titled(summary, "Baselines") is None


def test_changes_that_are_not_committed_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    environment = {**run.manifest["environment"], "git": "2a0500d+changes"}
    found = titled(summarise(replace(run, manifest={**run.manifest, "environment": environment})), "not committed")
    assert found is not None and found.grave
