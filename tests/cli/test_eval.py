"""``vlm-budget eval``: what its verbs print, write and refuse."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from poster_task import TASKS, write_posters, write_records
from vlm_budget.cli import app
from vlm_budget.eval import task as task_module
from vlm_budget.eval.driver import Driver
from vlm_budget.eval.task import FOLDERS

Cli = Callable[..., Any]
NANO = ["--model", "nano", "--tasks", "nano", "--methods", "hired", "--budgets", "0.4", "--limit", "4"]
CELLS = ("unpatched", "random at 40%", "uniform at 40%", "hired at 40%")
POSTERS = ("--tasks", "posters", "--task-folder", TASKS)


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that a test names are gone after it."""
    monkeypatch.setattr(task_module, "FOLDERS", FOLDERS[:1])


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A program may take all cores; a test leaves them to the others."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four questions of each of nano's tasks; what it printed lies in ``printed.txt``."""
    folder = tmp_path_factory.mktemp("eval")
    found = CliRunner().invoke(app, ["eval", "run", *NANO, "--out", str(folder / "results")], env={"COLUMNS": "200"})
    (folder / "printed.txt").write_text(f"{found.exit_code}\n{found.stdout}\n{found.stderr}")
    return folder / "results"


@pytest.fixture
def posters(tmp_path: Path) -> Path:
    """Six questions on one page."""
    write_posters(tmp_path / "posters", 1)
    return tmp_path / "posters"


def refused(result: Any, *messages: str) -> None:
    """One line on stderr, exit code 1, nothing on stdout."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "unexpected" not in result.stderr
    for message in messages:
        assert message in result.stderr


def test_tasks_are_listed(cli: Cli) -> None:
    found = cli("eval", "ls")
    assert found.exit_code == 0
    for path in FOLDERS[0].glob("*.yaml"):
        assert path.stem in found.stdout
    assert "yours: --data" in found.stdout
    assert "made on the spot" in found.stdout
    listed = json.loads(cli("eval", "ls", "--json").stdout)["tasks"]
    assert [one["name"] for one in listed] == sorted(path.stem for path in FOLDERS[0].glob("*.yaml"))
    mine = cli("eval", "ls", "--task-folder", TASKS)
    assert "posters from files" in mine.stdout


def test_one_task_is_shown(cli: Cli) -> None:
    found = json.loads(cli("eval", "ls", "textvqa", "--json").stdout)
    assert (found["name"], found["metric"], found["reads_text"]) == ("textvqa", "accuracy", True)
    assert "TextVQA_0.5.1_val.json" in found["data"]["files"]
    shown = cli("eval", "ls", "textvqa")
    assert shown.exit_code == 0
    assert "TextVQA_0.5.1_val.json" in shown.stdout
    refused(cli("eval", "ls", "textvq"), "unknown task 'textvq'", "Did you mean 'textvqa'")
    refused(cli("eval", "ls", "--task-folder", "nowhere"), "there is no folder of tasks 'nowhere'")


def test_a_task_with_brackets_in_its_words_is_listed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    text = (TASKS / "posters.yaml").read_text().replace("posters from files", '"[/bold] \\e[31m[red]"')
    (tmp_path / "mine" / "[a].yaml").write_text(text.replace("metric: accuracy", 'metric: "[/x]"'))
    found = cli("eval", "ls", "--task-folder", "mine")
    assert found.exit_code == 0
    assert all(word in found.stdout for word in ("[a]", "[/x]", "[/bold] [U+001B][31m[red]"))


def test_a_good_dataset_is_validated(cli: Cli, posters: Path) -> None:
    found = cli("eval", "validate", *POSTERS, "--data", f"posters={posters}")
    assert (found.exit_code, found.stdout) == (0, "posters: 6 samples, 0 faulty\n")
    found = cli("eval", "validate", *POSTERS, "--data", f"posters={posters}", "--limit", 2, "--json")
    assert json.loads(found.stdout) == {"tasks": {"posters": {"samples": 2, "broken": 0, "faults": []}}}


def test_a_faulty_dataset_is_told_and_ends_with_code_one(cli: Cli, posters: Path) -> None:
    page = {"question": "q", "answer": "a", "page": "gone.png"}
    write_records(posters, [{**page, "id": "x\x1b[2J[bold]"}, {**page, "page": "0.png"}])
    found = cli("eval", "validate", *POSTERS, "--data", f"posters={posters}")
    assert found.exit_code == 1
    assert "posters: 2 samples, 1 faulty" in found.stdout
    assert "x[U+001B][2J[bold]: there is no file" in found.stdout
    assert "\x1b" not in found.stdout
    found = cli("eval", "validate", *POSTERS, "--data", f"posters={posters}", "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["tasks"]["posters"]["broken"] == 1
    found = cli("eval", "validate", *POSTERS, "--data", f"posters={posters}", "--no-pictures")
    assert found.exit_code == 0


def test_a_missing_dataset_is_refused_by_validate(cli: Cli, posters: Path) -> None:
    refused(cli("eval", "validate", *POSTERS), "task 'posters' needs its dataset", "--data posters=FOLDER")
    refused(cli("eval", "validate", *POSTERS, "--data", "posters=nowhere"), "there is no data folder 'nowhere'")
    refused(cli("eval", "validate", *POSTERS, "--data", "posters"), "--data 'posters': write TASK=FOLDER")
    refused(cli("eval", "validate", "--tasks", ","), "name at least one task")
    (posters / "questions.jsonl").unlink()
    refused(cli("eval", "validate", *POSTERS, "--data", f"posters={posters}"), "holds none of questions.jsonl")


def test_a_run_writes_its_folder_and_prints_a_table(results: Path) -> None:
    code, printed = (results.parent / "printed.txt").read_text().split("\n", 1)
    assert code == "0", printed
    for name in ("manifest.json", "answers-00000.jsonl", "times-00000.jsonl", "sessions.jsonl", "regressions.json"):
        assert (results / name).is_file()
    for name in ("report.html", "report.md", "results.csv"):
        assert (results / name).stat().st_size > 500
        assert "nano_retrieval" in (results / name).read_text()
    answers = [json.loads(line) for line in (results / "answers-00000.jsonl").read_text().splitlines()]
    assert len(answers) == 4 * 4 * len(CELLS)
    assert not [one["error"] for one in answers if one["error"]]
    assert "nano: the task's metric ± standard error" in printed
    assert str(results / "report.html") in printed.replace("\n", "")
    lines = [line for line in printed.splitlines() if any(line.startswith(f"│ {cell} ") for cell in CELLS)]
    assert len(lines) == len(CELLS)
    assert all(line.count(" ± ") == 4 for line in lines)
    right = [one["scores"]["accuracy"] for one in answers if one["task"] == "nano_count"][:4]
    assert f"{sum(right) / 4:.3f} ± " in next(line for line in lines if "hired" in line)


def test_two_runs_of_one_configuration_write_the_same_answers(cli: Cli, results: Path, tmp_path: Path) -> None:
    assert cli("eval", "run", *NANO, "--out", "again").exit_code == 0
    name = "answers-00000.jsonl"
    assert (tmp_path / "again" / name).read_bytes() == (results / name).read_bytes()
    for folder in (tmp_path / "again", results):
        out = tmp_path / f"pages-{folder.name}"
        assert cli("eval", "report", folder, "--no-times", "--out", out).exit_code == 0
    for page in ("report.md", "results.csv", "report.html"):
        assert (tmp_path / "pages-again" / page).read_bytes() == (tmp_path / "pages-results" / page).read_bytes()
    refused(cli("eval", "run", *NANO[:-1], "5", "--out", "again"), "another options", "eval resume")


def test_resuming_a_finished_run_asks_nothing(cli: Cli, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, before = Driver.answer, (results / "answers-00000.jsonl").read_bytes()

    def only_drawn(self: Driver, batch: Any, cell: Any, draw: bool = False) -> Any:
        assert draw, "a finished run asks nothing"
        return real(self, batch, cell, draw)

    monkeypatch.setattr(Driver, "answer", only_drawn)
    found = cli("eval", "resume", results)
    assert found.exit_code == 0, found.output
    assert "hired at 40%" in found.stdout
    assert (results / "answers-00000.jsonl").read_bytes() == before


def test_a_report_in_another_folder_holds_the_formats_asked_for(cli: Cli, results: Path, tmp_path: Path) -> None:
    found = cli("eval", "report", results, "--formats", "csv", "--out", "pages")
    assert (found.exit_code, found.stdout) == (0, f"Written: {Path('pages') / 'results.csv'}\n")
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["results.csv"]
    with (tmp_path / "pages" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == {"nano_count", "nano_existence", "nano_place", "nano_retrieval"}
    refused(cli("eval", "report", results, "--formats", "pdf", "--out", "pages"), "no report format 'pdf'", "html")


def test_two_cells_are_compared(cli: Cli, results: Path) -> None:
    answers = [json.loads(line) for line in (results / "answers-00000.jsonl").read_text().splitlines()]

    def mean(task: str, methods: str) -> float:
        mine = [one for one in answers if (one["task"], one["cell"]["methods"]) == (task, methods)]
        return sum(one["scores"]["accuracy"] for one in mine) / len(mine)

    found = cli("eval", "compare", results, "hired at 40%", "random at 40%", "--json")
    told = json.loads(found.stdout)
    assert (told["first"], told["second"], len(told["tasks"])) == ("hired at 40%", "random at 40%", 4)
    for task, one in told["tasks"].items():
        assert one["difference"] == pytest.approx(mean(task, "hired") - mean(task, "random"))
        assert one["low"] <= one["difference"] <= one["high"]
        assert one["n"] == 4
    shown = cli("eval", "compare", results, "hired at 40%", "unpatched")
    assert "hired at 40% minus unpatched" in shown.stdout
    assert "nano_place" in shown.stdout
    refused(cli("eval", "compare", results, "hired at 30%", "unpatched"), "has no 'hired at 30%'", "'random at 40%'")


def test_a_comparison_of_a_part_of_a_run_names_the_tasks_it_has(cli: Cli, results: Path, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "manifest.json").write_bytes((results / "manifest.json").read_bytes())
    name = "answers-00000.jsonl"
    lines = (results / name).read_text().splitlines(keepends=True)
    (tmp_path / "part" / name).write_text("".join(line for line in lines if '"nano_count"' in line))
    found = cli("eval", "compare", "part", "hired at 40%", "random at 40%", "--json")
    assert found.exit_code == 0, found.output
    assert list(json.loads(found.stdout)["tasks"]) == ["nano_count"]
    (tmp_path / "part" / name).write_text("")
    refused(cli("eval", "compare", "part", "hired at 40%", "unpatched"), "share no answered sample of any task")
    assert cli("eval", "report", "part", "--formats", "md").exit_code == 0


@pytest.mark.parametrize("verb", ["resume", "report", "compare"])
def test_a_folder_without_a_run_is_refused(cli: Cli, tmp_path: Path, verb: str) -> None:
    cells = ("hired at 40%", "unpatched") if verb == "compare" else ()
    refused(cli("eval", verb, "nowhere", *cells), "'nowhere' holds no run")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{")
    refused(cli("eval", verb, "bad", *cells), "cannot read")
    (tmp_path / "bad" / "manifest.json").write_text('{"version": 1}')
    refused(cli("eval", verb, "bad", *cells), "manifest", "config")


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"--tasks": "nano_cuont"}, ("unknown task 'nano_cuont'", "Did you mean 'nano_count'")),
        ({"--tasks": ""}, ("name at least one task",)),
        ({"--methods": "hierd"}, ("Did you mean 'hired'",)),
        ({"--methods": "hired(alphaa=1)"}, ("Did you mean 'alpha'",)),
        ({"--budgets": "a fifth"}, ("cannot read a budget from 'a fifth'",)),
        ({"--budgets": "150%"}, ("a relative budget is a share",)),
        ({"--without": "hired"}, ("hired is no baseline; there are unpatched, random, uniform",)),
        ({"--model": "nanoo"}, ("Did you mean 'nano'",)),
        ({"--data": "textvqa=."}, ("textvqa, which is not among the tasks",)),
        ({"--data": "nano_count=."}, ("nano_count, which is made on the spot",)),
        ({"--config": "nowhere.yaml"}, ("cannot read 'nowhere.yaml'",)),
        ({"--task-folder": "nowhere"}, ("there is no folder of tasks 'nowhere'",)),
        ({"--out": "file"}, ("cannot write to 'file'",)),
        ({"--out": "full"}, ("'full' holds other files; name a new folder",)),
    ],
)
def test_bad_words_are_said_before_anything_is_written(
    cli: Cli, tmp_path: Path, changes: dict[str, str], messages: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    given = {**dict(zip(NANO[::2], NANO[1::2], strict=True)), "--tasks": "nano_count", "--out": "out", **changes}
    refused(cli("eval", "run", *(word for pair in given.items() for word in pair)), *messages)
    assert not list(tmp_path.glob("*/manifest.json"))


def test_a_run_without_a_model_or_a_task_is_refused(cli: Cli) -> None:
    refused(cli("eval", "run", "--tasks", "nano"), "the command line is incomplete", "model")
    refused(cli("eval", "run", "--model", "nano"), "the command line is incomplete", "tasks")


def test_words_on_the_command_line_win_over_the_file(cli: Cli, posters: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        f"model: nano\ntasks: posters\ntask_folders: {TASKS}\ndata: {{posters: {posters}}}\nmethods: [hired: {{alpha: "
        "0.3}]\nbudgets: [0.5]\nwithout: uniform\nlimit: 3\nbatch: 2\nshare_encoding: no\npictures: 0\n"
    )
    found = cli("eval", "run", "--config", "sweep.yaml", "--budgets", "0.3", "--limit", 2, "--out", "one")
    assert found.exit_code == 0, found.output
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    told = manifest["config"]
    assert (told["budgets"], told["limit"], told["batch"], told["without"]) == (["0.3"], 2, 2, ["uniform"])
    assert (told["share_encoding"], told["task_folders"], told["device"]) == (False, [str(TASKS)], "auto")
    assert [cell["methods"] for cell in manifest["cells"]] == ["unpatched", "random", "hired(alpha=0.3)"]
    assert manifest["tasks"] == {"posters": 3}
    assert manifest["samples"] == {"posters": 2}
    assert json.loads((tmp_path / "one" / "regressions.json").read_text()) == []
    task_module.FOLDERS[:] = FOLDERS[:1]  # as another process would begin
    refused(cli("eval", "compare", "one", "hired(alpha=0.3) at 30%", "unpatched"), "--task-folder")
    named = ("--task-folder", str(TASKS), "--json")
    again = cli("eval", "compare", "one", "hired(alpha=0.3) at 30%", "unpatched", *named)
    assert json.loads(again.stdout)["tasks"]["posters"]["n"] == 2


def test_errors_of_samples_are_counted_in_the_table(cli: Cli, posters: Path) -> None:
    with (posters / "questions.jsonl").open("a") as file:
        file.write("{cut\n")
    given = ("--model", "nano", "--data", f"posters={posters}", "--budgets", "1.0", "--out", "one")
    found = cli("eval", "run", *POSTERS, *given)
    assert found.exit_code == 0, found.output
    assert "1 of 7 answers are errors; see the report" in found.stdout


def test_an_interrupted_run_says_how_to_go_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Driver, "answer", stopped)
    found = cli("eval", "run", *NANO, "--out", "part")
    assert found.exit_code == 130
    assert "stopped; go on with: vlm-budget eval resume part" in found.stderr
    assert "Traceback" not in found.output
    monkeypatch.undo()
    assert not os.path.exists("part/regressions.json")
