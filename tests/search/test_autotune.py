"""``autotune``: every method at every budget, what cannot be done with the reason, and the front."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import vlm_budget
from fingerprint import fingerprint
from vlm_budget.errors import (
    JournalError,
    LatencyError,
    MissingExtraError,
    OptionError,
    SelectionError,
    VLMBudgetError,
)
from vlm_budget.planning import Methods
from vlm_budget.recipe import CalibrationFacts, ModelFacts, Recipe, read_plan
from vlm_budget.registry import PRUNERS
from vlm_budget.search import autotune as module
from vlm_budget.search.data import prepare
from vlm_budget.search.front import Front, Point
from vlm_budget.search.judge import Judge, Score
from vlm_budget.search.metrics import Metric

from .conftest import Case

QUICK: dict[str, Any] = {"metric": "kl", "timed": 1, "repeats": 1, "progress": False}


def test_methods_budgets_compositions_and_recipes_are_measured(case: Case) -> None:
    fixed = PRUNERS.get("gsearch")(rates=(1, 1, 0.25))
    recipe = Recipe.of(
        [PRUNERS.get("psigmoid")(beta=5.0)], vlm_budget.Budget(0.75), ModelFacts("LlavaModel", "", 3, (1, 9))
    )
    front = vlm_budget.autotune(
        case.model,
        case.data,
        budgets=[0.3, "90% flops"],
        methods=["uniform", ["random", "psigmoid"], fixed, recipe],
        **QUICK,
    )
    assert [(point.name, point.budget) for point in front.points] == [
        ("uniform", "30%"),
        ("uniform", "90% flops"),
        ("random + psigmoid", "30%"),
        ("random + psigmoid", "90% flops"),
        ("gsearch", None),
        ("psigmoid", "75%"),
    ]
    assert all(point.infeasible is None for point in front.points)
    for point in front.points:
        assert point.cost["ms"] > 0 and point.cost["ms_full"] > 0
        assert 0 < point.share("flops") < 1
        assert point.quality < 0 <= point.se
    assert front.points[0].cost["share"] == pytest.approx(0.3, abs=0.02)
    assert front.points[1].share("flops") <= 0.9
    assert front.full == Score(0.0, 0.0)


def test_what_does_not_fit_is_kept_with_its_reason(case: Case) -> None:
    front = vlm_budget.autotune(case.model, case.data, budgets=[0.3], methods=["uniform", "psigmoid"], **QUICK)
    uniform, sigmoid = front.points
    assert uniform.infeasible is None
    assert sigmoid.infeasible is not None and "nearest feasible budget" in sigmoid.infeasible
    assert front.pareto() == (uniform,)
    assert front.reasons() == [f"psigmoid at 30%: {sigmoid.infeasible}"]
    with pytest.raises(OptionError, match="infeasible"):
        front.recipe(sigmoid)


def test_faults_are_not_taken_for_what_does_not_fit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PRUNERS.get("random"), "pick", lambda self, ctx, k: torch.zeros(k, dtype=torch.long))
    with pytest.raises(SelectionError):
        vlm_budget.autotune(case.model, case.data, budgets=[0.3], methods=["random"], **QUICK)


def test_a_stopped_run_goes_on_where_it_was(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**QUICK, "budgets": [0.2, 0.5], "methods": ["uniform", "psigmoid"], "journal": tmp_path / "points"}
    real, done = module._measured, []

    def stopped(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(module, "_measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        vlm_budget.autotune(case.model, case.data, **options)
    done.clear()
    front = vlm_budget.autotune(case.model, case.data, **options)
    assert len(done) == 2
    done[:] = [(), ()]
    assert vlm_budget.autotune(case.model, case.data, **options) == front
    monkeypatch.setattr(module, "device_name", lambda device: "another machine")
    with pytest.raises(JournalError, match="its machine differ"):
        vlm_budget.autotune(case.model, case.data, **options)


def test_the_model_is_left_as_it_was(case: Case) -> None:
    before = fingerprint(case.model)
    vlm_budget.autotune(case.model, case.data, budgets=[0.3], methods=["uniform", "fastv"], **QUICK)
    assert fingerprint(case.model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": []}, "nothing to try"),
        ({"budgets": []}, "nothing to try"),
        ({"timed": 0}, "timed must be"),
        ({"repeats": True}, "repeats must be"),
        ({"batch": 0}, "batch must be a number from 1 on, got 0"),
        ({"max_spread": 0}, "max_spread must be"),
        ({"budgets": None}, "budgets must be a list, got None"),
        ({"budgets": {"a": 0.1}}, "budgets must be a list"),
        ({"methods": 5}, "methods must be a list, got 5"),
        ({"journal": 5}, "journal must be a path"),
    ],
)
def test_options_that_mean_nothing_are_refused(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        vlm_budget.autotune(case.model, case.data, **{**QUICK, **options})


@pytest.mark.parametrize(
    ("budgets", "methods", "expected"),
    [
        (0.2, "random", [("random", "20%")]),
        ("20%", ["random", "uniform"], [("random", "20%"), ("uniform", "20%")]),
        (vlm_budget.Budget(0.5), PRUNERS.get("random")(seed=3), [("random", "50%")]),
        (iter([9, 0.5]), iter(["uniform"]), [("uniform", "9 tokens"), ("uniform", "50%")]),
    ],
)
def test_one_stands_for_a_list_of_one(case: Case, budgets: Any, methods: Any, expected: list[Any]) -> None:
    front = vlm_budget.autotune(case.model, case.data, budgets=budgets, methods=methods, **QUICK)
    assert [(point.name, point.budget) for point in front.points] == expected


FACTS = ModelFacts("LlavaModel", "", 3, (1, 9))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe((("random", {"gone": 1}),), "20%", FACTS), "gone"),
        (Recipe((("random", {}),), None, FACTS), "says no budget"),
        (Recipe((("psigmoid", {}),), None, FACTS), "says no budget"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(case: Case, recipe: Recipe, message: str) -> None:
    with pytest.raises(VLMBudgetError, match=message):
        vlm_budget.autotune(case.model, case.data, methods=recipe, **QUICK)


@pytest.mark.parametrize("error", [LatencyError, MissingExtraError])
def test_what_can_pass_is_not_remembered(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    options = {**QUICK, "budgets": [0.5], "methods": ["uniform", "random"], "journal": tmp_path / "points"}
    real = Judge.plans

    def fails(self: Judge, methods: Any, budget: Any) -> Any:
        if "Uniform" in str(methods):
            raise error("not calibrated")
        return real(self, methods, budget)

    monkeypatch.setattr(Judge, "plans", fails)
    front = vlm_budget.autotune(case.model, case.data, **options)
    assert [point.infeasible for point in front.points] == ["not calibrated", None]
    monkeypatch.setattr(Judge, "plans", real)
    again = vlm_budget.autotune(case.model, case.data, **options)
    assert again.points[0].infeasible is None and again.points[0].share("flops") < 1
    assert again.points[1] == front.points[1]


def test_milliseconds_work_after_a_calibration(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_BUDGET_CACHE", str(tmp_path / "cache"))
    options = {**QUICK, "budgets": ["1 s"], "methods": ["uniform"], "journal": tmp_path / "points"}
    (missing,) = vlm_budget.autotune(case.model, case.data, **options).points
    assert "calibrate" in (missing.infeasible or "")
    vlm_budget.calibrate(case.model, longest=128, repeats=1)
    (found,) = vlm_budget.autotune(case.model, case.data, **options).points
    assert found.infeasible is None


def test_choosing_is_charged_and_the_encoder_is_not(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds are the language model's, with probes, selection and compaction; medians over measured rounds."""
    judge = Judge(case.model, prepare(case.model, case.data), Metric("kl"))
    rounds: dict[bool, Iterator[float]] = {full: iter([900.0, 10.0, 700.0, 30.0]) for full in (False, True)}

    class Handle:
        def __init__(self, full: bool) -> None:
            self.full = full

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def report(self) -> Any:
            parts = {"probe_ms": 4.0, "select_ms": 2.0, "compact_ms": 1.0} if not self.full else {}
            rest = {"probe_ms": 0.0, "select_ms": 0.0, "compact_ms": 0.0, "encode_ms": 5000.0, "drop_ms": 3.0}
            return SimpleNamespace(**{**rest, **parts, "prefill_ms": next(rounds[self.full])})

    monkeypatch.setattr(module, "patch", lambda model, methods, budget: Handle(budget == vlm_budget.Budget(1.0)))
    found = module._times(judge, Methods(PRUNERS.get("random")()), vlm_budget.Budget(0.5), timed=1, repeats=3)
    assert found == {"ms": 30.0 + 7.0, "ms_full": 30.0}


# --- the front ------------------------------------------------------------------------------------------------------


def point(quality: float, ms: float, name: str = "random", budget: str = "20%") -> Point:
    cost = {"ms": ms, "ms_full": 10.0, "flops": 5 * ms, "flops_full": 100.0, "kv_bytes": 1.0, "kv_bytes_full": 2.0}
    return Point(((name, {}),), budget, quality, 0.01, cost)


def made(*points: Point) -> Front:
    judged = CalibrationFacts("ab" * 32, 32, "accuracy", None, 0.9, 0.9)
    return Front(points, Score(0.9, 0.01), ModelFacts("LlavaModel", "cd" * 32, 3, (30, 30)), judged)


def test_no_point_of_the_front_is_beaten_and_every_other_is() -> None:
    generator = torch.Generator().manual_seed(0)
    points = [
        point(int(torch.randint(5, (), generator=generator)) / 5, float(torch.randint(1, 9, (), generator=generator)))
        for _ in range(60)
    ]
    front = made(*points).pareto("ms")

    def beaten(one: Point) -> bool:
        return any(
            other.quality >= one.quality
            and other.share("ms") <= one.share("ms")
            and (other.quality > one.quality or other.share("ms") < one.share("ms"))
            for other in points
        )

    assert not any(beaten(one) for one in front)
    kept = {(one.quality, one.share("ms")) for one in front}
    assert all(beaten(one) or (one.quality, one.share("ms")) in kept for one in points)
    assert [one.share("ms") for one in front] == sorted(one.share("ms") for one in front)
    assert made().pareto() == ()
    with pytest.raises(OptionError, match="cost must be one of ms, flops, kv_bytes, got 'watts'"):
        made(*points).pareto("watts")  # type: ignore[arg-type]


def test_the_front_is_saved_as_recipes_that_can_be_read(tmp_path: Path) -> None:
    front = made(point(0.9, 8, "hired"), point(0.5, 2, "random", "40% flops"), point(0.4, 9, "uniform"))
    files = front.save(tmp_path / "new" / "front")
    assert [file.name for file in files] == ["01_random_40pct_flops.json", "02_hired_20pct.json"]
    assert tuple(read_plan(file) for file in files) == front.recipes
    assert front.recipes[0].budget == "40% flops"
    rows = json.loads((tmp_path / "new" / "front" / "front.json").read_text())["points"]
    assert [row["on_front"] for row in rows] == [["ms", "flops"], ["ms", "flops"], []]


def test_a_saved_point_patches_the_model(case: Case, tmp_path: Path) -> None:
    front = vlm_budget.autotune(case.model, case.data, budgets=[0.3], methods=[["uniform", "psigmoid"]], **QUICK)
    (file,) = front.save(tmp_path)
    one = {key: value for key, value in case.data[0].items() if key != "answer"}
    with vlm_budget.patch(case.model, plan=file) as handle, torch.no_grad():
        case.model(**one)
    assert handle.report().plan.mean_tokens(3) / handle.report().plan.total == pytest.approx(0.3, abs=0.02)


def test_a_second_run_leaves_no_plan_of_the_first(tmp_path: Path) -> None:
    first, second = made(point(0.9, 8, "hired"), point(0.5, 2)), made(point(0.9, 7, "random", "30%"))
    first.save(tmp_path, picture=True)
    mine = ["01_random_10pct.json", "notes.txt", "points.journal", "front.png.bak"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / "02_hired_20pct.json").unlink()  # what is gone already is no fault
    files = second.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*mine, "front.json", files[0].name])
    assert [read_plan(file) for file in files] == list(second.recipes)
    second.save(tmp_path, picture=True)
    assert (tmp_path / "front.png").is_file()
    second.save(tmp_path)
    assert not (tmp_path / "front.png").exists()


def test_only_files_of_the_folder_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "front"
    made(point(0.9, 8)).save(folder)
    names = ["../01_a.json", str(tmp_path / "01_a.json"), "notes.txt", "points.journal", 5, "01_gone.json"]
    index = json.loads((folder / "front.json").read_text())
    (folder / "front.json").write_text(json.dumps({**index, "files": names}))
    kept = [tmp_path / "01_a.json", folder / "notes.txt", folder / "points.journal"]
    for file in kept:
        file.write_text("mine")
    made(point(0.9, 8)).save(folder)
    assert all(file.read_text() == "mine" for file in kept)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "5", '{"points": []}', "[" * 100_000])
def test_a_front_json_of_something_else_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "front.json").write_text(text)
    with pytest.raises(OptionError, match="is no front of this library"):
        made(point(0.9, 8)).save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["front.json"]
    assert (tmp_path / "front.json").read_text() == text


def test_places_where_nothing_can_be_written_are_refused(tmp_path: Path) -> None:
    front = made(point(0.9, 8))
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "front"):
        with pytest.raises(OptionError, match="is a file; name a folder"):
            front.save(folder)
    with pytest.raises(OptionError, match=r"draws no '.foo' files; try .png, or one of"):
        front.plot(tmp_path / "x.foo")
    for path in (tmp_path, tmp_path / "no_such" / "x.png", tmp_path / "file" / "x.png"):
        with pytest.raises(OptionError, match="name a file in a folder that is there"):
            front.plot(path)
    (tmp_path / "locked.png").symlink_to(tmp_path / "gone" / "x.png")
    with pytest.raises(OptionError, match="cannot draw"):
        front.plot(tmp_path / "locked.png")


def test_the_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = made(point(0.9, 8, "hired"), point(0.5, 2), Point((("fastv", {}),), "5%", infeasible="too little"))
    for cost in ("ms", "flops"):
        front.plot(tmp_path / f"{cost}.png", cost)  # type: ignore[arg-type]
        assert (tmp_path / f"{cost}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="nothing to draw"):
        made(front.points[2]).plot(tmp_path / "none.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib: pip install 'vlm-budget\[search\]'"):
        front.plot(tmp_path / "missing.png")


def test_the_table_shows_quality_with_its_error_and_shares() -> None:
    console = Console(width=120, record=True, file=__import__("io").StringIO())
    console.print(made(point(0.875, 8, "hired"), point(0.5, 2)).table())
    text = console.export_text()
    for cell in ("hired", "20%", "0.875 ± 0.01", "80%", "40%", "50%", "accuracy on 32 prompts, 0.9 unpruned"):
        assert cell in text
