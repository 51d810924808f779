"""A long measurement whose workers die, hang and run out of time loses nothing but the step at hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from vlm_budget.eval import steps
from vlm_budget.eval.steps import EMPTY, Record, supervise

WORKER = """
import os, sys, time
from pathlib import Path
from vlm_budget.eval.device import Deadline
from vlm_budget.eval.steps import Record, work

record = Record(Path(sys.argv[1]))
steps = [("good", lambda: None), ("deadly", lambda: os._exit(7)), ("endless", lambda: time.sleep(60)),
         ("wrong", lambda: 1 / 0), ("last", lambda: None), ("late", lambda: time.sleep(float(sys.argv[2])))]
work(record, steps, Deadline(float(sys.argv[3]) - time.time()), lambda: None)
"""


def test_a_step_that_dies_or_hangs_fails_and_the_others_are_measured(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json")
    record.save(**EMPTY)
    supervise(record, [sys.executable, "-c", WORKER, str(record.path), "0"], 60, stalled=1.0)
    assert record.data["done"] == ["good", "last", "late"]
    assert record.data["failed"] == {
        "deadly": "the process ended with code 7",
        "endless": "it hung: stopped after 1 s",
        "wrong": "ZeroDivisionError: division by zero",
    }
    assert record.data["not_measured"] == {} and record.data == json.loads(record.path.read_text())


def test_what_is_left_when_the_time_is_over_is_listed(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json")
    record.save(**EMPTY, kept=1)
    record.save(done=["good", "deadly", "endless"])
    worker = WORKER.replace("float(sys.argv[3]) - time.time()", "60")

    def watched(started: subprocess.Popen[bytes], record: Record, end: float, stalled: float) -> str | None:
        """The time ends when the last step runs, however long a busy machine takes to get there."""
        until = time.monotonic() + 60
        while (record.data["running"] or {}).get("step") != "late" and time.monotonic() < until:
            time.sleep(0.1)
            record.load()
        return plain(started, record, time.time(), stalled)

    plain = steps.watched
    with mock.patch.object(steps, "watched", watched):
        supervise(record, [sys.executable, "-c", worker, str(record.path), "60"], 0, stalled=100)
    assert record.data["done"][-1] == "last" and set(record.data["failed"]) == {"wrong"}
    assert record.data["not_measured"] == {"late": "out of time"} and record.data["kept"] == 1


def test_a_worker_that_cannot_start_is_told_once(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json")
    record.save(**EMPTY)
    supervise(record, [sys.executable, "-c", "raise SystemExit(3)"], 60, stalled=10)
    assert record.data["failed"] == {"the start of a process": "the process ended with code 3"}


def test_failures_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    record = Record(tmp_path / "x.json")
    record.save(**EMPTY)
    record.fail("a step", f"no {tmp_path}/kernel.so here")
    assert record.data["failed"]["a step"] == "no kernel.so here"
