"""A run's configuration: from YAML, from the command line, from a manifest; and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from poster_task import TASKS
from vlm_budget.errors import BudgetError, DataError, OptionError, UnknownNameError
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.config import EvalConfig
from vlm_budget.eval.source import Source
from vlm_budget.registry import PRUNERS

SWEEP = """
model: nano-robust
tasks: [nano, posters]
methods:
  - hired
  - hired+fastv
  - hired: {alpha: 0.3}
  - gsearch: {rates: [1, 1, 0.5, 0.2]}
  - divprune:
budgets: [1.0, 0.4, "128 tokens", 40% flops]
without: random
data: {posters: ./Posters}
limit: 50
batch: 4
seed: 7
device: cpu
dtype: float32
share_encoding: no
pictures: 0
scorer: clip:./scorer
"""
LEAST: dict[str, Any] = {"model": "nano", "tasks": ["nano_count"]}


def test_a_file_says_every_field(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP + f"task_folders: [{TASKS}]\n")
    found = EvalConfig.read(path)
    assert found == EvalConfig(
        model="nano-robust",
        tasks=("nano", "posters"),
        methods=("hired", "hired+fastv", "hired(alpha=0.3)", "gsearch(rates=[1, 1, 0.5, 0.2])", "divprune()"),
        budgets=("1.0", "0.4", "128 tokens", "40% flops"),
        without=("random",),
        data={"posters": "./Posters"},
        task_folders=(str(TASKS),),
        limit=50,
        batch=4,
        seed=7,
        device="cpu",
        dtype="float32",
        share_encoding=False,
        pictures=0,
        scorer="clip:./scorer",
    )
    default = EvalConfig(**LEAST)
    assert [one.name for one in fields(found) if getattr(found, one.name) == getattr(default, one.name)] == []
    tasks, cells = found.resolve()
    assert [task.name for task in tasks] == [
        "nano_count",
        "nano_existence",
        "nano_place",
        "nano_retrieval",
        "posters",
    ]
    assert Cell("hired(alpha=0.3)", "128 tokens") in cells
    assert Cell("hired(alpha=0.3)").acting.vision.alpha == 0.3
    assert Cell("gsearch(rates=[1, 1, 0.5, 0.2])", "fixed") in cells
    assert "random" not in {cell.methods for cell in cells}


def test_what_is_given_beside_a_file_wins(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    whole = EvalConfig.read(path)
    found = EvalConfig.read(path, limit=3, methods=["fastv"], data={}, seed=None)
    assert (found.limit, found.methods, found.data, found.seed) == (3, ("fastv",), {}, None)
    assert (found.tasks, found.budgets, found.batch) == (whole.tasks, whole.budgets, 4)


def test_a_manifest_says_the_same_configuration_again(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP + f"task_folders: [{TASKS}]\n")
    found = EvalConfig.read(path)
    again = EvalConfig.of(json.loads(json.dumps(asdict(found))))
    assert again == found
    assert again.resolve() == found.resolve()


def test_one_name_is_a_list_of_it_and_the_rest_has_defaults() -> None:
    found = EvalConfig.of({"model": "nano", "tasks": "nano", "methods": "hired", "budgets": 0.25})
    assert (found.tasks, found.methods, found.budgets) == (("nano",), ("hired",), ("0.25",))
    assert EvalConfig.of({"model": "nano", "tasks": "nano"}).budgets == ("1.0", "0.4", "0.2", "0.1")


def test_all_is_every_registered_method_once() -> None:
    _, cells = EvalConfig(**LEAST, methods=("all", "hired"), budgets=("0.5",)).resolve()
    names = [cell.methods for cell in cells]
    assert set(PRUNERS.names()) <= set(names)
    assert names.count("hired") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ["hired"]}, "unknown fields: method. Fields: batch, budgets"),
        ({1: 2}, "unknown fields: 1"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": None}, "tasks is a list of names, and has None"),
        ({"tasks": [["nano"]]}, "tasks is a list of names"),
        ({"task_folders": [3]}, "task_folders is a list of names, and has 3"),
        ({"methods": None}, "methods is a list of names, and has None"),
        ({"methods": [0.4]}, "methods is a list of names, and has 0.4"),
        ({"methods": [{"hired": {}, "fastv": {}}]}, "one name with its options"),
        ({"methods": [{"hired": 0.3}]}, "options are a mapping"),
        ({"methods": [{"hired": ["alpha"]}]}, "options are a mapping"),
        ({"budgets": [True]}, "budgets is a list of names, and has True"),
        ({"budgets": {"a": 1}}, "budgets is a list of names"),
        ({"data": ["posters"]}, "data must be a mapping"),
        ({"data": {"posters": 3}}, "data must be a mapping of tasks to folders"),
        ({"data": {3: "x"}}, "data must be a mapping of tasks to folders"),
        ({"model": 7}, "model must be text, got 7"),
        ({"device": None}, "device must be text"),
        ({"seed": "one"}, "seed must be a number, got 'one'"),
        ({"seed": True}, "seed must be a number, got True"),
        ({"share_encoding": "maybe"}, "share_encoding must be true or false"),
        ({"limit": 0}, "limit must be a number from 1 on"),
        ({"limit": 2.5}, "limit must be a number from 1 on"),
        ({"batch": "8"}, "batch must be a number from 1 on, got '8'"),
        ({"pictures": -1}, "pictures must be a number from 0 on"),
    ],
)
def test_wrong_fields_and_kinds_are_said(changes: dict[Any, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        EvalConfig.of({**LEAST, **changes})
    assert message in str(caught.value)


def test_a_missing_field_is_said() -> None:
    with pytest.raises(OptionError, match=r"the command line is incomplete: .*'model'"):
        EvalConfig.of({}, "the command line", tasks=["nano"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"- model\n- tasks\n", "is no mapping of fields"),
        (b"", "is no mapping of fields"),
        (b"model: [nano\ntasks: x", "cannot read"),
        (b"model: \xff\xfe", "cannot read"),
        (b"!!python/object/apply:os.getcwd []", "cannot read"),
        (b"seed: 2020-99-99", "cannot read"),
        (b"[" * 50_000, "cannot read"),
    ],
)
def test_a_damaged_file_is_said_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    with pytest.raises(OptionError, match=message) as caught:
        EvalConfig.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read .*nowhere\.yaml"):
        EvalConfig.read(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": ["nano_cuont"]}, UnknownNameError, "Did you mean 'nano_count'"),
        ({"tasks": ["nnano"]}, UnknownNameError, "Did you mean 'nano'"),
        ({"methods": [{"hired": {"alphaa": 1}}]}, UnknownNameError, "Did you mean 'alpha'"),
        ({"methods": ["hired("]}, OptionError, "cannot read method"),
        ({"budgets": ["a fifth"]}, BudgetError, "cannot read a budget"),
        ({"without": ["hired"]}, OptionError, "hired is no baseline"),
        ({"data": {"textvqa": "x"}}, OptionError, "textvqa, which is not among the tasks"),
        ({"data": {"nano_count": "x"}}, OptionError, "nano_count, which is made on the spot"),
    ],
)
def test_names_that_are_not_known_are_said(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EvalConfig.of({**LEAST, **changes}).resolve()


def test_where_samples_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Data").mkdir()

    def source(place: str | None) -> Source:
        data = {} if place is None else {"textvqa": place}
        config = EvalConfig("nano", ("textvqa",), data=data, seed=5, limit=9)
        return config.source(config.resolve()[0][0])

    assert source(str(tmp_path)) == Source(root=tmp_path, seed=5, limit=9)
    assert source("~/Data").root == tmp_path / "Data"
    assert source("hub") == Source(seed=5, limit=9)
    assert source("hub:me/Mine,val") == Source(hub="me/Mine,val", seed=5, limit=9)
    with pytest.raises(DataError, match=r"needs its dataset: pass --data textvqa=FOLDER.*'lmms-lab/textvqa'"):
        source(None)
    for place in ("nowhere", "~no-such-user/data"):
        with pytest.raises(DataError, match="there is no data folder"):
            source(place)
