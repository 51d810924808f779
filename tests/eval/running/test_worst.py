"""Which regressions are worth a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from poster_task import write_records
from vlm_budget.cli.loading import Loaded
from vlm_budget.errors import RunError
from vlm_budget.eval import regressions
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.regressions import worst
from vlm_budget.eval.store import Answer, Run
from vlm_budget.eval.task import Task

from .conftest import asked, ran

HIRED, FASTV = Cell("hired", "40%"), Cell("fastv", "40%")


def task(name: str) -> Task:
    return Task(name, 1, name, "image", "x:y", "x:y", "accuracy")


def answers(name: str, cell: Cell, scores: dict[str, float | None]) -> list[Answer]:
    return [
        Answer(name, sample, cell, sample, error="torn")
        if score is None
        else Answer(name, sample, cell, sample, "x", {"accuracy": score})
        for sample, score in scores.items()
    ]


def chosen(run: list[Answer], tasks: list[str], each: int) -> list[tuple[str, str, str]]:
    found = worst(Run(Path("run"), {}, tuple(run), ()), [task(name) for name in tasks], each)
    assert all(base.cell.unpatched and (base.task, base.sample) == (one.task, one.sample) for one, base in found)
    return [(one.task, one.cell.methods, one.sample) for one, _ in found]


def test_the_greatest_losses_come_first_then_those_that_cells_share() -> None:
    run = [
        *answers("t", Cell(), {"a": 1, "b": 1, "c": 1, "d": 0, "e": None, "f": 1}),
        *answers("t", HIRED, {"a": 0.5, "b": 0, "c": 0, "d": 0, "e": 0, "f": None}),
        *answers("t", FASTV, {"a": 1, "b": 1, "c": 0, "d": 1, "f": 0}),
    ]
    assert chosen(run, ["t"], 9) == [
        ("t", "fastv", "c"),
        ("t", "fastv", "f"),
        ("t", "hired", "c"),
        ("t", "hired", "b"),
        ("t", "hired", "a"),
    ]
    assert chosen(run, ["t"], 1) == [("t", "fastv", "c"), ("t", "hired", "c")]
    assert chosen(list(reversed(run)), ["t"], 1) == chosen(run, ["t"], 1)
    assert chosen(run, ["other"], 1) == []
    assert chosen([one for one in run if not one.cell.unpatched], ["t"], 1) == []


def test_of_too_many_every_task_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regressions, "_IN_ALL", 60)
    names = ["t1", "t2", "t3"]
    cells = [Cell("hired", f"{number}%") for number in range(10, 60)]
    run = [one for name in names for one in answers(name, Cell(), {"a": 1, "b": 1})]
    run += [one for name in names for cell in cells for one in answers(name, cell, {"a": 0, "b": 0})]
    found = chosen(run, names, 2)
    assert [sum(one[0] == name for one in found) for name in names] == [20, 20, 20]
    assert {one[2] for one in found} == {"a"}
    found = chosen([one for one in run if one.task == "t1"], names, 2)
    assert [sum(one[2] == name for one in found) for name in "ab"] == [50, 10]


def test_a_dataset_that_lost_the_sample_is_said(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    config = asked(posters, budgets=["0.05"], pictures=1, limit=6)
    ran(config, tmp_path / "run", nano)
    assert json.loads((tmp_path / "run" / "regressions.json").read_text())
    records = [json.loads(line) for line in (posters / "questions.jsonl").read_text().splitlines()]
    write_records(posters, [{**one, "id": f"new-{one['id']}"} for one in records])
    with pytest.raises(RunError, match="task 'posters' has no sample '0-.' any more; its data has changed"):
        ran(config, tmp_path / "run", nano)
