"""The command as a process: quick to start, quiet when it fails."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

BARE = "import typer.rich_utils, rich.table, rich.progress"
BUDGET_S = 0.5


def process(cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "100"}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


def vlm_budget(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return process(cwd, "-m", "vlm_budget.cli", *arguments)


def seconds(cwd: Path, *command: str) -> float:
    start = time.perf_counter()
    assert process(cwd, *command).returncode == 0
    return time.perf_counter() - start


def test_help_names_every_verb_and_each_shows_an_example(tmp_path: Path) -> None:
    done = vlm_budget(tmp_path, "--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in ("demo", "run", "calibrate", "list", "explain"))
    for verb in ("demo", "run", "calibrate", "list", "explain"):
        done = vlm_budget(tmp_path, verb, "--help")
        assert done.returncode == 0
        assert f"vlm-budget {verb}" in done.stdout


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    import vlm_budget as package

    assert vlm_budget(tmp_path, "--version").stdout.strip() == f"vlm-budget {package.__version__}"


@pytest.mark.parametrize("arguments", [["--help"], ["list", "methods"], ["run", "--help"], ["run", "gone.png"]])
def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from vlm_budget.cli import app\n"
        "try:\n"
        f"    app({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert process(tmp_path, "-c", code).stdout.strip().endswith("heavy: []")


def test_a_list_starts_quickly(tmp_path: Path) -> None:
    list_methods = ("-m", "vlm_budget.cli", "list", "methods")
    seconds(tmp_path, *list_methods)  # the first run writes the byte code
    pairs = [(seconds(tmp_path, "-c", BARE), seconds(tmp_path, *list_methods)) for _ in range(3)]
    added = statistics.median(ours for _, ours in pairs) - statistics.median(bare for bare, _ in pairs)
    assert added < BUDGET_S, f"list adds {added:.2f} s to typer and rich; the budget is {BUDGET_S} s"


def test_a_real_run_ends_with_code_zero_and_a_drawing(tmp_path: Path, tiny_model: Path, poster: Path) -> None:
    arguments = ("run", str(poster), "--model", str(tiny_model), "--repeats", "1", "--max-new-tokens", "2")
    done = vlm_budget(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "visual tokens" in done.stdout
    assert (tmp_path / "kept.png").is_file()


def test_a_failing_process_says_one_line_and_a_debugged_one_says_all(tmp_path: Path) -> None:
    done = vlm_budget(tmp_path, "run", "gone.png")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: there is no file 'gone.png'\n")
    done = vlm_budget(tmp_path, "run", "gone.png", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ImageError: there is no file 'gone.png'" in done.stderr
