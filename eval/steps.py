"""A long measurement in steps: one file that is whole at any moment, and workers that may die or hang.

A worker does one step after the other and writes after each. The supervisor starts the next worker where one ended
early, and the step at which it did so counts as failed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .device import Deadline

GRACE = 20.0
"""Seconds after the end of the time that the step at hand may still take."""
RESTARTS = 8
EMPTY: dict[str, Any] = {"steps": [], "done": [], "failed": {}, "not_measured": {}, "running": None}


class Record:
    """The JSON file of a measurement, ``data`` in memory.

    Args:
        path: Where it lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = dict(EMPTY)
        self.load()

    def load(self) -> None:
        """Take over what another process has written."""
        if self.path.exists():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def save(self, **changes: Any) -> None:
        """Take over changes and write."""
        self.data = {**self.data, **changes}
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    def fail(self, step: str, why: str) -> None:
        """Note that a step failed, and that none is running."""
        why = re.sub(r"/\S*/", "", why)[:500]  # without the folders of this machine
        self.save(failed={**self.data["failed"], step: why}, running=None)
        print(f"FAILED {step}: {why}", flush=True)

    def skip(self, step: str, why: str) -> None:
        """Note that a step was not measured, and that none is running."""
        self.save(not_measured={**self.data["not_measured"], step: why}, running=None)
        print(f"not measured: {step}: {why}", flush=True)


class NotEnoughError(Exception):
    """A step cannot be measured here, which is no failure: its text says why."""


def work(
    record: Record, steps: Iterable[tuple[str, Callable[[], None]]], deadline: Deadline, recover: Callable[[], None]
) -> None:
    """Do all steps that no earlier worker has tried, while there is time.

    Args:
        record: What the steps write to.
        steps: Names and actions, the most important first.
        deadline: No step begins after it.
        recover: Called after a failed step; raises where the next one needs another process.
    """
    todo = list(steps)
    record.save(steps=[name for name, _ in todo])
    for name, action in todo:
        if any(name in record.data[kind] for kind in ("done", "failed", "not_measured")):
            continue
        if deadline.left <= 0:
            return
        record.save(running={"step": name, "since": time.time()})
        try:
            action()
        except NotEnoughError as error:
            record.skip(name, str(error))
        except Exception as error:
            record.fail(name, f"{type(error).__name__}: {error}")
        else:
            record.save(done=[*record.data["done"], name], running=None)
            print(f"done: {name}; {deadline.left:.0f} s left", flush=True)
            continue
        recover()


def supervise(record: Record, command: Sequence[str], seconds: float, stalled: float) -> None:
    """Start workers until one comes to its end or the time is over; then list what was not measured.

    Args:
        record: What the workers write to.
        command: Starts one; the end of its time, in seconds since the epoch, is added.
        seconds: For all of them together.
        stalled: Seconds after which a step is taken to hang.
    """
    end = time.time() + seconds
    for _ in range(RESTARTS):
        tried = len(record.data["done"]) + len(record.data["failed"])
        why = watched(subprocess.Popen([*command, str(end)]), record, end + GRACE, stalled)
        if why is None or time.time() > end:
            break
        if record.data["running"]:
            record.fail(record.data["running"]["step"], why)
        elif len(record.data["done"]) + len(record.data["failed"]) == tried:
            record.fail("the start of a process", why)
            break
    tried_steps = {*record.data["done"], *record.data["failed"]}
    missing = {step: "out of time" for step in record.data["steps"] if step not in tried_steps}
    record.save(running=None, not_measured={**missing, **record.data["not_measured"]})


def watched(worker: subprocess.Popen[bytes], record: Record, end: float, stalled: float) -> str | None:
    """Wait for a worker, read what it wrote, and say why it did not come to its end; None where it did."""
    why = None
    while worker.poll() is None:
        time.sleep(0.3)
        record.load()
        running = record.data["running"]
        if time.time() > end or (running and time.time() - running["since"] > stalled):
            why = f"it hung: stopped after {stalled:.0f} s"
            worker.kill()
            worker.wait()
    record.load()
    return why or (None if worker.returncode == 0 else f"the process ended with code {worker.returncode}")
