"""Runs as a user starts them: killed and resumed, on two processes, twice at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from poster_task import TASKS, write_posters
from vlm_budget.cli.loading import Loaded, load
from vlm_budget.eval.report import write_report
from vlm_budget.eval.store import locked, read_run
from vlm_budget.eval.summary import summarise
from vlm_budget.eval.task import add_folder

from .conftest import asked, ran

KILLS = 10
METHODS = ["hired", "divprune", "fastv(k=1)"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TASKS.parent), os.environ.get("PYTHONPATH", "")]),
}
MODULE = ["-m", "vlm_budget.eval"]


def words(posters: Path, out: Path, batch: int = 2) -> list[str]:
    """A run's command line behind the interpreter or the launcher."""
    options = {
        "--model": "nano",
        "--tasks": "posters",
        "--methods": ",".join(METHODS),
        "--budgets": "0.6,0.4",
        "--data": f"posters={posters}",
        "--task-folder": str(TASKS),
        "--batch": str(batch),
        "--pictures": "0",
        "--device": "cpu",
        "--out": str(out),
    }
    return [*MODULE, "run", *(word for pair in options.items() for word in pair)]


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def posters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "posters"
    write_posters(folder, 10)
    return folder


@pytest.fixture(scope="module")
def whole(posters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    found = finished([sys.executable, *words(posters, out)])
    assert found.returncode == 0, found.stderr
    assert "unpatched" in found.stdout
    return out


def lines(out: Path) -> list[str]:
    """All answers, order aside."""
    return sorted(line for path in out.glob("answers-*.jsonl") for line in path.read_text().splitlines())


def size(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("answers-*.jsonl"))


def start_over(posters: Path, out: Path, nano: Loaded) -> None:
    """A child's whole life: what the command does, on the model it was born with."""
    ran(asked(posters, model="nano", batch=2, methods=METHODS, budgets=["0.6", "0.4"]), out, nano)


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_resumed_nothing_is_lost(posters: Path, whole: Path, tmp_path: Path) -> None:
    out, rng = tmp_path / "run", random.Random(0)
    nano = load("nano", "cpu", "float32", lambda name: None)
    torch.set_num_threads(1)
    children = multiprocessing.get_context("fork")  # loading a model ten times would take minutes
    for _ in range(KILLS):
        before = size(out)
        child = children.Process(target=start_over, args=(posters, out, nano))
        child.start()
        while child.is_alive() and size(out) <= before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
        part = read_run(out)  # readable at any moment, every answer once
        assert len({one.key for one in part.answers}) == len(part.answers)
    assert len(lines(out)) < len(lines(whole))
    found = finished([sys.executable, *MODULE, "resume", str(out)])
    assert found.returncode == 0, found.stderr
    assert lines(out) == lines(whole)
    add_folder(TASKS)
    texts = []
    for folder in (out, whole):
        files = write_report(summarise(read_run(folder), times=False), folder / "pages", times=False)
        texts.append([file.read_bytes() for file in files])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(posters: Path, whole: Path, tmp_path: Path) -> None:
    # --multi_gpu is what makes the launcher start several processes, on a CPU too.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    found = finished([sys.executable, *launch, *plain, *words(posters, tmp_path / "run")])
    assert found.returncode == 0, found.stderr
    assert lines(tmp_path / "run") == lines(whole)
    shares = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "run").glob("answers-*.jsonl"))]
    assert len(shares) == 2
    assert min(shares) > 0.4 * sum(shares)
    add_folder(TASKS)
    one, two = (summarise(read_run(folder), times=False) for folder in (whole, tmp_path / "run"))
    assert one.results == two.results


def test_a_run_in_a_folder_in_use_leaves_at_once(posters: Path, whole: Path) -> None:
    with locked(whole):
        found = finished([sys.executable, *words(posters, whole)])
    assert found.returncode == 1
    assert "another run writes to" in found.stderr
    assert "Traceback" not in found.stderr


def test_bad_words_are_one_line_on_stderr(posters: Path, tmp_path: Path) -> None:
    command = [sys.executable, *words(posters, tmp_path / "run")]
    command[command.index(",".join(METHODS))] = "hierd"
    found = finished(command)
    assert found.returncode == 1
    assert "Did you mean 'hired'" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run" / "manifest.json").exists()
