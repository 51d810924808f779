"""Every sample once, whatever happens to the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from poster_task import write_records
from vlm_budget import patch
from vlm_budget.cli.loading import Loaded
from vlm_budget.errors import DataError, OptionError, PatchError, RunError, UnknownNameError
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.driver import Driver
from vlm_budget.eval.store import Run, read_run
from vlm_budget.eval.summary import summarise
from vlm_budget.images import load_image
from vlm_budget.models import find_family
from vlm_budget.prompts import build_inputs

from .conftest import PAGES, asked, ran

METHODS = [
    "hired",
    "mmtok",
    "divprune",
    "prumerge_plus",
    "fastv(k=1)",
    "hired+pyramiddrop",
    "gsearch(rates=(1,1,0.5,0.2))",
]


def said(run: Run) -> dict[Any, Any]:
    return {one.key: (one.answer, one.error, dict(one.scores), dict(one.cost)) for one in run.answers}


@pytest.mark.parametrize(("batch", "share"), [(8, True), (8, False), (5, True)])
def test_batches_and_shared_encodings_change_no_answer(
    posters: Path, tmp_path: Path, nano: Loaded, batch: int, share: bool
) -> None:
    single = ran(asked(posters, methods=METHODS, budgets=["0.6"], batch=1), tmp_path / "one", nano)
    other = asked(posters, methods=METHODS, budgets=["0.6"], batch=batch, share_encoding=share)
    assert said(ran(other, tmp_path / "other", nano)) == said(single)
    assert len(single.answers) == PAGES * 6 * 10
    assert not [one.error for one in single.answers if one.error]


def test_answers_and_costs_are_those_of_patch_and_generate(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    run = ran(asked(posters, methods=["hired", "fastv(k=1)"], budgets=["0.6"]), tmp_path / "run", nano)
    records = [json.loads(line) for line in (posters / "questions.jsonl").read_text().splitlines()]
    by_key = {one.key: one for one in run.answers}
    _, base, _ = find_family(nano.model)
    for record in records[::5]:
        inputs = build_inputs(
            nano.processor, [record["question"]], [[load_image(posters / "pages" / record["page"])]], nano.model
        )
        for name, options in (("hired", {}), ("fastv(k=1)", {"k": 1})):
            with patch(nano.model, name.split("(")[0], 0.6, **options) as handle, torch.no_grad():
                output = nano.model.generate(**inputs, max_new_tokens=1, do_sample=False)
                report, plan = handle.report(), handle.plan(**inputs)
            found = by_key["posters", record["id"], Cell(name, "60%")]
            assert found.answer == nano.processor.tokenizer.decode(output[0, -1:])
            assert found.scores == {"accuracy": float(found.answer == record["answer"])}
            assert found.cost["kv_bytes"] == report.kv_bytes
            assert found.cost["flops"] == report.forecast.prefill_flops
            assert (found.cost["visual"], found.cost["kept"], found.cost["new"]) == (plan.total, plan.keep, 1)
            assert found.cost["mean_kept"] == plan.mean_tokens(len(base.language_model.layers))
            assert found.cluster == record["page"]


def test_the_unpatched_model_is_measured_and_left_as_it_was(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    hooks = {name: len(module._forward_hooks) for name, module in nano.model.named_modules()}
    run = ran(asked(posters), tmp_path / "run", nano)
    assert {name: len(module._forward_hooks) for name, module in nano.model.named_modules()} == hooks
    times = {one.cell: one.ms for one in run.times}
    assert times[Cell()]["prefill"] > times[Cell("hired", "40%")]["prefill"] > 0
    assert {"load", "process", "encode", "total"} <= set(times[Cell()])
    full = next(one for one in run.answers if one.cell.unpatched)
    assert full.cost["kept"] == full.cost["visual"] == full.cost["mean_kept"] > 0


def test_a_run_goes_on_where_it_was_and_asks_nothing_twice(
    posters: Path, tmp_path: Path, nano: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(asked(posters), tmp_path / "whole", nano)
    calls: list[int] = []
    real = Driver.answer

    def counted(self: Driver, batch: Any, cell: Cell, draw: bool = False) -> Any:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(len(batch.samples))
        return real(self, batch, cell, draw)

    monkeypatch.setattr(Driver, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        ran(asked(posters), tmp_path / "part", nano)
    some = read_run(tmp_path / "part")
    assert 0 < len(some.answers) < len(whole.answers)
    monkeypatch.setattr(Driver, "answer", real)
    assert said(ran(asked(posters), tmp_path / "part", nano)) == said(whole)
    lines = (tmp_path / "part" / "answers-00000.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted((tmp_path / "whole" / "answers-00000.jsonl").read_text().splitlines())
    monkeypatch.setattr(Driver, "answer", lambda *_: pytest.fail("a finished run asks nothing"))
    again = ran(asked(posters), tmp_path / "part", nano)
    assert again.manifest["samples"] == {"posters": PAGES * 6}


def test_bad_samples_are_recorded_and_the_others_answered(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    good = ran(asked(posters), tmp_path / "good", nano)
    records = [json.loads(line) for line in (posters / "questions.jsonl").read_text().splitlines()]
    (posters / "pages" / "torn.png").write_bytes((posters / "pages" / "0.png").read_bytes()[:300])
    bad = {
        "gone": {"question": "what color is digit 7", "answer": "red", "page": "gone.png"},
        "torn": {"question": "what color is digit 7", "answer": "red", "page": "torn.png"},
        "two": {"question": "<image><image> what", "answer": "red", "page": "0.png"},
    }
    faulty = {"answer": "red", "page": "0.png"}, {"question": "x", "answer": "y", "page": "../../../../etc/passwd"}
    mixed = [*records[:3], *({"id": name, **one} for name, one in bad.items()), *faulty, *records[3:]]
    write_records(posters, mixed)
    with (posters / "questions.jsonl").open("a") as file:
        file.write('{"id": "cut", "question": "wh\n[1, 2]\n')
    run = ran(asked(posters), tmp_path / "bad", nano)
    errors = {one.sample: one.error for one in run.answers if one.error is not None}
    assert "there is no file" in errors["gone"]
    assert "damaged or truncated" in errors["torn"]
    assert errors["two"]
    assert "the record has no question" in errors["record 6"]
    assert "leads out of the data folder" in errors["record 7"]
    assert sum(name.startswith("questions.jsonl line") for name in errors) == 2
    assert len(errors) == 7
    rest = {key: value for key, value in said(run).items() if value[1] is None}
    assert rest == said(good)
    assert sum(one.error is not None for one in run.answers) == 7 * 4
    (result,) = [one for one in summarise(run).results if one.cell.unpatched]
    assert (result.main.n, sum(result.errors.values())) == (PAGES * 6, 7)


def test_memory_that_runs_out_halves_the_batch(
    posters: Path, tmp_path: Path, nano: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = said(ran(asked(posters), tmp_path / "want", nano))
    real, sizes = Driver.answer, []

    def tight(self: Driver, batch: Any, cell: Cell, draw: bool = False) -> Any:
        if len(batch.samples) > 2 and cell.methods == "hired":
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append((cell.methods, len(batch.samples)))
        return real(self, batch, cell, draw)

    monkeypatch.setattr(Driver, "answer", tight)
    assert said(ran(asked(posters), tmp_path / "run", nano)) == want
    assert {size for name, size in sizes if name == "hired"} <= {1, 2}
    assert 8 in {size for name, size in sizes if name != "hired"}
    first = sizes.index(("hired", 2))
    assert sum(name == "hired" for name, _ in sizes[first:]) <= PAGES * 6


def test_a_budget_beyond_reach_is_an_error_of_every_sample_and_tried_once(
    posters: Path, tmp_path: Path, nano: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    real = Driver.answer

    def counted(self: Driver, batch: Any, cell: Cell, draw: bool = False) -> Any:
        if cell.methods == "fastv":
            tried.append(len(batch.samples))
        return real(self, batch, cell, draw)

    monkeypatch.setattr(Driver, "answer", counted)
    run = ran(asked(posters, methods=["fastv"], budgets=["0.1"]), tmp_path / "run", nano)
    errors = [one.error for one in run.answers if one.cell.methods == "fastv"]
    assert len(errors) == PAGES * 6
    assert set(errors) == {errors[0]}
    assert "BudgetError: FastV() cannot keep to" in errors[0]
    assert "nearest feasible" in errors[0]
    assert len(tried) < PAGES * 6


def test_methods_that_the_model_cannot_run_are_refused_or_left_out(tmp_path: Path) -> None:
    import tiny_models

    tiny = tiny_models.build("gemma3")
    loaded = Loaded("gemma3", False, "gemma3", tiny.model, None)
    from vlm_budget.eval.config import EvalConfig
    from vlm_budget.eval.runner import _usable

    config = EvalConfig.of({"model": "x", "tasks": ["nano"], "methods": ["all"], "budgets": ["0.5"]})
    kept, refused = _usable(loaded, config.resolve()[1], config)
    assert "fastv at 50%" in refused
    assert Cell("hired", "50%") in kept
    config = EvalConfig.of({"model": "x", "tasks": ["nano"], "methods": ["fastv"], "budgets": ["0.5"]})
    with pytest.raises(PatchError, match="sliding_attention"):
        _usable(loaded, config.resolve()[1], config)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": ["poster"]}, UnknownNameError, "Did you mean 'posters'"),
        ({"tasks": []}, OptionError, "at least one task"),
        ({"methods": ["hirred"]}, UnknownNameError, "Did you mean 'hired'"),
        ({"data": {}}, DataError, "needs its dataset"),
        ({"data": {"posters": "/nowhere"}}, DataError, "there is no data folder"),
        ({"data": {"posters": "hub"}}, DataError, "name it with --data"),
        ({"data": {"textvqa": "."}}, OptionError, "not among the tasks"),
        ({"batch": 0}, OptionError, "batch must be a number from 1"),
        ({"limit": True}, OptionError, "limit must be"),
        ({"model": "nanoo"}, OSError, "Did you mean 'nano'"),
    ],
)
def test_bad_configurations_are_said_before_anything_is_written(
    posters: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    from vlm_budget.eval.runner import run

    with pytest.raises(error, match=message):
        run(asked(posters, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_dataset_without_a_single_sample_is_refused(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    write_records(posters, [{"question": "x"}])
    with pytest.raises(RunError, match="none of its records is a sample: record 0: the record has no answer"):
        ran(asked(posters), tmp_path / "run", nano)
    write_records(posters, [])
    with pytest.raises(RunError, match="it holds no samples"):
        ran(asked(posters), tmp_path / "run", nano)


def test_another_configuration_in_the_same_folder_is_refused(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    ran(asked(posters, limit=6), tmp_path / "run", nano)
    with pytest.raises(RunError, match="another cells"):
        ran(asked(posters, limit=6, budgets=["0.3"]), tmp_path / "run", nano)
    with pytest.raises(RunError, match="another options"):
        ran(asked(posters, limit=7), tmp_path / "run", nano)


def test_regressions_are_drawn_with_their_kept_tokens(posters: Path, tmp_path: Path, nano: Loaded) -> None:
    run = ran(asked(posters, budgets=["0.05"], pictures=2), tmp_path / "run", nano)
    entries = json.loads((tmp_path / "run" / "regressions.json").read_text())
    full = {one.sample: one for one in run.answers if one.cell.unpatched}
    assert entries
    for entry in entries:
        assert full[entry["sample"]].scores["accuracy"] == 1
        assert entry["answer"] != entry["unpatched_answer"]
        assert (tmp_path / "run" / "pictures" / entry["picture"]).stat().st_size > 1000
    per_cell = [(entry["methods"], entry["budget"]) for entry in entries]
    assert max(per_cell.count(one) for one in per_cell) <= 2
