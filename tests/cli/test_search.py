"""``search`` and ``autotune``: plans that work, faults before the work, and Ctrl-C that costs nothing."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlm_budget
from vlm_budget.eval import nano
from vlm_budget.eval.nano.data import VALIDATION_SEED
from vlm_budget.eval.nano.data import test_set as posters
from vlm_budget.recipe import Recipe, read_plan
from vlm_budget.search.judge import Judge

Cli = Callable[..., Any]


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight labelled questions about two posters."""
    folder = tmp_path_factory.mktemp("calibration")
    rows = []
    for index, sample in enumerate(posters(2, VALIDATION_SEED)):
        sample.image.save(folder / f"{index}.png")
        rows += [{"image": f"{index}.png", "prompt": q.prompt, "answer": q.answer} for q in sample.questions[:4]]
    (folder / "calib.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "calib.jsonl"


def test_gsearch_writes_a_plan_that_patches(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    result = cli("search", "nano-robust", "--data", calibration, "--metric", "kl", "--tolerance", 0.2)
    assert result.exit_code == 0, result.stderr
    recipe = read_plan(tmp_path / "plan.json")
    assert isinstance(recipe, Recipe)
    ((name, options),) = recipe.spec
    assert name == "gsearch" and options["rates"][:2] == (1.0, 1.0) and options["rates"][3] < 1
    assert recipe.calibration is not None and recipe.calibration.size == 8
    for text in (
        "gsearch for LlavaNextModel",
        "tokens per layer",
        "plan.json",
        "vlm_budget.patch(model, plan='plan.json')",
    ):
        assert text in result.stdout
    assert result.stderr == ""
    model, _ = nano.load("nano-robust")
    with vlm_budget.patch(model, plan=tmp_path / "plan.json"):
        pass


def test_psigmoid_keeps_to_its_budget_and_prints_json(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    result = cli(
        "search", "nano", "--data", calibration, "-m", "psigmoid", "-b", 0.7, "--trials", 3, "--out", "p.json", "--json"
    )
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["command"] == "search" and facts["out"] == "p.json"
    assert facts["recipe"] == json.loads((tmp_path / "p.json").read_text())
    assert facts["recipe"]["budget"] == "70%"
    assert facts["recipe"]["cost"]["share"] == pytest.approx(0.7, abs=1 / 192)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "cannot read calibration file 'nowhere.jsonl'"),
        (["-m", "psigmoid"], "pass --budget"),
        (["-m", "psigmoid", "-b", "0.7", "--tolerance", "0.1"], "--tolerance is for gsearch"),
        (["-m", "psigmoid", "-b", "0.7", "--search", "bayes"], "--search is for gsearch"),
        (["--trials", "3"], "--trials is for --search bayes or --method psigmoid"),
        (["--search", "bisection", "--sampler", "gp"], "--sampler is for --search bayes"),
        (["--seed", "0"], "--seed is for --search bayes"),
        (["-b", "7 apples"], "unknown unit"),
        (["--out", "no/such/plan.json"], "there is no folder"),
        (["--out", "."], "is a directory"),
        (["-b", "0.3"], "nearest feasible budget is '50%'"),
    ],
)
def test_faults_are_one_line_and_no_work(
    cli: Cli, calibration: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "score", lambda *_: pytest.fail("the model ran"))
    result = cli("search", "nano", "--data", calibration, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model loads, and no picture."""
    for target in ("vlm_budget.cli.loading.load", "vlm_budget.search.data.load_jsonl"):
        monkeypatch.setattr(target, lambda *_: pytest.fail("the work began"))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("search", ["--tolerance", "-1"], "tolerance must be a number above 0"),
        ("search", ["--tolerance", "nan"], "tolerance must be a number above 0"),
        ("search", ["--tolerance", "5"], "below 1"),
        ("search", ["--metric", "kl", "--answer-tokens", "3"], "first answer token only"),
        ("search", ["--search", "bayes", "--seed", str(2**32)], "seed must be below"),
        ("search", ["--journal", "no/such/file"], "cannot write journal 'no/such/file': there is no folder"),
        ("search", ["--journal", "notes.txt"], "'notes.txt' is no search journal; it was left as it is"),
        ("search", ["--journal", "plan.json"], "--journal 'plan.json' is the file of --out"),
        ("search", ["--metric", "accuracy", "--data", "bare.jsonl"], "1 of 1 calibration prompts have no answer"),
        ("search", ["--out", "bare.jsonl", "--data", "bare.jsonl"], "--out 'bare.jsonl' is the file of --data"),
        ("autotune", ["--metric", "kl", "--answer-tokens", "3"], "first answer token only"),
        ("autotune", ["--methods", "hired+divprune"], "both act before the language model"),
        ("autotune", ["--methods", "hierd"], "Did you mean 'hired'"),
        ("autotune", ["--methods", ","], "there is nothing to try"),
        ("autotune", ["--out", "notes.txt"], "is a file; name a folder"),
        ("autotune", ["--out", "notes.txt/front"], "is a file; name a folder"),
        ("autotune", ["--out", "foreign"], "is no front of this library"),
        ("autotune", ["--journal", "notes.txt"], "is no search journal"),
        ("autotune", ["--journal", "bare.jsonl", "--data", "bare.jsonl"], "is the file of --data"),
        ("autotune", ["--metric", "accuracy", "--data", "bare.jsonl"], "1 of 1 calibration prompts have no answer"),
    ],
)
def test_faults_of_options_are_said_before_anything_loads(
    cli: Cli, calibration: Path, tmp_path: Path, verb: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "foreign").mkdir()
    texts = {
        "notes.txt": "my notes\n",
        "foreign/front.json": "{}",
        "bare.jsonl": json.dumps({"image": str(calibration.with_name("0.png")), "prompt": "what"}),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    result = cli(verb, "nano", "--data", calibration, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("arguments", [["--search", "bayes"], ["-m", "psigmoid", "-b", "0.7"]])
def test_a_missing_optimizer_is_said_before_anything_loads(
    cli: Cli, calibration: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = cli("search", "nano", "--data", calibration, *arguments)
    assert result.exit_code == 1
    assert "pip install 'vlm-budget[search]'" in result.stderr


def test_bayesian_search_takes_its_options(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    result = cli(
        "search", "nano", "--data", calibration, "--search", "bayes", "--trials", 2, "--sampler", "tpe", "--seed", 5,
        "--metric", "kl", "--tolerance", 0.2,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    judged = [json.loads(row) for row in (tmp_path / "plan.json.journal").read_text().splitlines()[1:]]
    assert len(judged) <= 1 + 2 * 2  # the full model, and two trials for each of two layers


def test_wrong_labels_are_no_plan_that_drops_everything(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    wrong = calibration.with_name("wrong.jsonl")
    rows = [{**json.loads(line), "answer": "zq"} for line in calibration.read_text().splitlines()]
    wrong.write_text("\n".join(map(json.dumps, rows)))
    result = cli("search", "nano", "--data", wrong, "--metric", "accuracy")
    assert result.exit_code == 1
    assert "expected answer to none of the 8 calibration prompts" in result.stderr
    assert not (tmp_path / "plan.json").exists()


def test_accuracy_without_labels_is_refused(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    bare = calibration.with_name("bare.jsonl")
    bare.write_text("\n".join(json.dumps({"image": "0.png", "prompt": f"what is {word}"}) for word in "12"))
    result = cli("search", "nano", "--data", bare, "--metric", "accuracy")
    assert result.exit_code == 1
    assert "2 of 2 calibration prompts have no answer" in result.stderr


@pytest.mark.parametrize("verb", ["search", "autotune"])
def test_ctrl_c_says_how_to_go_on(
    verb: str, cli: Cli, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Judge._score, []

    def stopped(self: Judge, logits: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(0)
        return real(self, logits)

    own = {
        "search": ("--metric", "kl", "--tolerance", 0.2),
        "autotune": ("--methods", "random,uniform,hired", "--budgets", "20%", "--timed", 1, "--repeats", 1),
    }[verb]
    monkeypatch.setattr(Judge, "_score", stopped)
    result = cli(verb, "nano-robust", "--data", calibration, *own)
    journal = {"search": "plan.json.journal", "autotune": "front/points.journal"}[verb]
    assert result.exit_code == 130
    assert f"kept in {journal}: run the same command again" in result.stderr
    assert len((tmp_path / journal).read_text().splitlines()) == 1 + 3
    monkeypatch.setattr(Judge, "_score", real)
    result = cli(verb, "nano-robust", "--data", calibration, *own)
    assert result.exit_code == 0, result.stderr
    rows = (tmp_path / journal).read_text().splitlines()
    assert len(set(rows)) == len(rows) > 4


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    arguments = ["search", "nano-robust", "--data", str(calibration), "--metric", "kl", "--tolerance", "0.05"]
    command = [sys.executable, "-m", "vlm_budget.cli", *arguments, "--batch", "1"]
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "plan.json.journal"
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 4):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes().split(b"\n")[:-1]
    assert len(before) >= 4
    assert not (tmp_path / "plan.json").exists()
    result = cli(*arguments)
    assert result.exit_code == 0, result.stderr
    rows = journal.read_bytes().split(b"\n")[:-1]
    assert rows[: len(before)] == before
    assert len({json.loads(row).get("key") for row in rows}) == len(rows)


# --- autotune -------------------------------------------------------------------------------------------------------


def test_autotune_writes_the_front_its_plans_and_its_picture(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    result = cli(
        "autotune", "nano-robust", "--data", calibration, "--methods", "random, hired,hired+fastv,psigmoid",
        "--budgets", "20%,60%", "--metric", "accuracy", "--timed", 1, "--repeats", 1, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert len(facts["points"]) == 8
    assert [row["methods"][0]["name"] for row in facts["points"] if "infeasible" in row] == ["psigmoid"]
    assert facts["full"]["mean"] == facts["calibration"]["full_quality"]
    for file in facts["files"]:
        assert isinstance(read_plan(file), Recipe)
    assert (tmp_path / "front" / "front.json").is_file()
    assert (tmp_path / "front" / "front.png").read_bytes().startswith(b"\x89PNG")


def test_autotune_shows_a_table_and_what_did_not_fit(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    result = cli(
        "autotune", "nano", "--data", calibration, "--methods", "uniform,fastv", "--budgets", "20%", "--no-plot",
        "--timed", 1, "--repeats", 1, "--out", "here",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for text in ("uniform", "agreement on 8 prompts", "fastv at 20%: ", "On the front: here/01_uniform_20pct.json"):
        assert text in result.stdout
    assert not (tmp_path / "here" / "front.png").exists()


def test_a_second_autotune_leaves_no_plan_of_the_first(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    common = ("autotune", "nano", "--data", calibration, "--methods", "uniform", "--timed", 1, "--repeats", 1)
    assert cli(*common, "--budgets", "20%").exit_code == 0
    assert (tmp_path / "front" / "01_uniform_20pct.json").is_file() and (tmp_path / "front" / "front.png").is_file()
    result = cli(*common, "--budgets", "50%", "--no-plot")
    assert result.exit_code == 0, result.stderr
    left = sorted(file.name for file in (tmp_path / "front").iterdir())
    assert left == ["01_uniform_50pct.json", "front.json", "points.journal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "hierd"], "Did you mean 'hired'"),
        (["--methods", "hired+random"], "both act before the language model"),
        (["--budgets", "20%,300%"], "a relative budget is a share"),
        (["--out", "file"], "is a file; name a folder"),
        (["--data", "nowhere.jsonl"], "cannot read calibration file"),
    ],
)
def test_autotune_says_faults_in_one_line(
    cli: Cli, calibration: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    result = cli("autotune", "nano", "--data", calibration, "--no-plot", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_missing_plotter_is_said_before_the_work(
    cli: Cli, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb = importlib.import_module("vlm_budget.cli.autotune")  # the attribute of the package is the verb itself
    monkeypatch.setattr(verb, "find_spec", lambda name: None)
    result = cli("autotune", "nano", "--data", calibration)
    assert result.exit_code == 1
    assert "pass --no-plot" in result.stderr
