"""What goes wrong on the way is freed, written down, or refused; never run."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from poster_task import load
from vlm_budget.cli.loading import Loaded
from vlm_budget.errors import RunError, UnknownNameError
from vlm_budget.eval import shown
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.driver import Driver
from vlm_budget.eval.report import write_report
from vlm_budget.eval.store import Store, begin, read_manifest, read_run
from vlm_budget.eval.summary import summarise
from vlm_budget.eval.task import read_task

from .conftest import PAGES, asked, ran


def test_a_batch_that_was_too_large_is_gone_before_it_is_tried_in_parts(
    posters: Path, tmp_path: Path, nano: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held = Driver.answer, []

    def tight(self: Driver, batch: Any, cell: Cell, draw: bool = False) -> Any:
        assert not [one for one in held if one() is not None], "the memory of a failed batch is still taken"
        if len(batch.samples) > 3 and not cell.unpatched:
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, cell, draw)

    monkeypatch.setattr(Driver, "answer", tight)
    run = ran(asked(posters), tmp_path / "run", nano)
    assert not any(one.error for one in run.answers)
    assert len(held) == 3 * 2, "what memory allows is remembered: 8 and 4 are tried once by each of three methods"


def test_facts_that_cannot_be_written_down_cost_their_sample_only(
    posters: Path, tmp_path: Path, nano: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(source: Any, task: Any) -> Iterator[Any]:
        for number, one in enumerate(load(source, task)):
            yield dataclasses.replace(one, facts={"x": torch.zeros(1)}) if number == 2 else one

    monkeypatch.setattr("poster_task.load", odd)
    run = ran(asked(posters), tmp_path / "run", nano)
    failed = {one.sample for one in run.answers if one.error is not None}
    assert failed == {"0-2"}
    assert len(run.answers) == PAGES * 6 * 4


def test_the_report_of_an_unfinished_run_says_so(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    run = ran(asked(posters), tmp_path / "run", nano)
    read_task("posters")
    for part in (run.answers[:20], run.answers):
        page = write_report(summarise(dataclasses.replace(run, answers=part)), tmp_path / "page", formats=("md",))[0]
        assert ("The run is not finished" in page.read_text()) == (len(part) == 20)


def test_a_run_continued_with_other_code_says_so(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    run = ran(asked(posters, limit=6), tmp_path / "run", nano)
    again = ran(asked(posters, limit=6), tmp_path / "run", nano)
    assert len(again.sessions) == 2
    other = dataclasses.replace(again, sessions=(*run.sessions, {**run.sessions[0], "git": "0" * 40}))
    for found, told in ((again, False), (other, True)):
        page = write_report(summarise(found), tmp_path / "page", formats=("md",))[0]
        assert ("continued with other code" in page.read_text()) == told


def test_machines_without_a_common_folder_write_what_one_folder_holds(
    posters: Path, tmp_path: Path, nano: Loaded
) -> None:
    """Each begins its own folder from the leader's manifest; put together, the files are a run."""
    whole = ran(asked(posters), tmp_path / "whole", nano)
    manifest = {name: value for name, value in read_manifest(tmp_path / "whole").items() if name != "version"}
    for rank in (0, 1):
        begin(tmp_path / f"machine-{rank}", manifest)
        begin(tmp_path / f"machine-{rank}", manifest)  # another process of the same machine
        Store(tmp_path / f"machine-{rank}", rank).add(whole.answers[rank::2])
    (tmp_path / "machine-1" / "answers-00001.jsonl").rename(tmp_path / "machine-0" / "answers-00001.jsonl")
    assert read_run(tmp_path / "machine-0").answers == whole.answers


def test_reading_somebody_elses_results_runs_nothing_of_theirs(
    posters: Path, tmp_path: Path, nano: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(asked(posters), tmp_path / "run", nano)
    theirs = tmp_path / "run" / "tasks"
    theirs.mkdir()
    (theirs / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    (theirs / "trap.yaml").write_text(
        "version: 3\ntitle: t\nmodality: image\nload: trap:x\nscore: trap:x\nsummary: trap:x\nmetric: accuracy\n"
    )
    path = tmp_path / "run" / "manifest.json"
    told = json.loads(path.read_text().replace("posters", "trap"))
    path.write_text(json.dumps({**told, "config": {**told["config"], "task_folders": [str(theirs)]}}))
    with pytest.raises(UnknownNameError, match="--task-folder"):
        shown.read_summary(tmp_path / "run", None, times=True)
    assert not (tmp_path / "sprung").exists()


def test_an_answer_without_the_tasks_score_is_named(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    run = ran(asked(posters, limit=2), tmp_path / "run", nano)
    other = dataclasses.replace(run.answers[0], scores={"wrong": 1.0})
    with pytest.raises(RunError, match="has no score 'accuracy'"):
        summarise(dataclasses.replace(run, answers=(other, *run.answers[1:])))
