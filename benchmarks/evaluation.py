"""How fast a sweep is, and what a second process brings: ``vlm-budget eval run`` as a user starts it, on nano.

Every registered method at five budgets on all tasks of nano, on two processes; then a smaller run on one process and on
two, started in turn with fresh folders. Samples per second are answers over the seconds between the first and the last
write, without the start of Python and the loading of the model; the seconds of the whole command stand beside. Answers
of the runs must be equal line by line, order aside; exit code 1 where they are not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vlm_budget.eval.record import environment, write_json
from vlm_budget.eval.store import read_run

BUDGETS = "1.0,0.75,0.5,0.3,0.2"


def command(out: Path, methods: str, limit: int, batch: int, processes: int) -> list[str]:
    """A run's command line."""
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    start = [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "-m"] if processes > 1 else []
    options = {
        "--model": "nano",
        "--tasks": "nano",
        "--methods": methods,
        "--budgets": BUDGETS,
        "--limit": str(limit),
        "--batch": str(batch),
        "--pictures": "0",
        "--device": "cpu",
        "--out": str(out),
    }
    words = [word for pair in options.items() for word in pair]
    return [sys.executable, "-m", *start, "vlm_budget.eval", "run", *words]


def timed(folder: Path, methods: str, limit: int, batch: int, processes: int) -> dict[str, Any]:
    """Run, and look at what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    began, first = time.time(), None
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    with subprocess.Popen(command(folder, methods, limit, batch, processes), **quiet) as process:
        while process.poll() is None:
            if first is None and any(path.stat().st_size for path in folder.glob("answers-*.jsonl")):
                first = time.time()
            time.sleep(0.01)
    if process.returncode or first is None:
        raise RuntimeError(f"the run ended with {process.returncode}")
    run = read_run(folder)
    last = max(path.stat().st_mtime for path in folder.glob("answers-*.jsonl"))
    return {
        "processes": processes,
        "answers": len(run.answers),
        "answered": sum(one.error is None for one in run.answers),
        "cells": len(run.manifest["cells"]),
        "seconds": round(time.time() - began, 1),
        "answering_seconds": round(last - first, 1),
        "per_second": round(len(run.answers) / (last - first), 1),
    }


def lines(folder: Path) -> list[str]:
    """All answers of a run, order aside."""
    return sorted(line for path in folder.glob("answers-*.jsonl") for line in path.read_text().splitlines())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=500, help="per task of the sweep")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pair-samples", type=int, default=250, help="per task of the runs on one and two processes")
    parser.add_argument("--pair-methods", default="hired,divprune")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sweep = timed(Path(place) / "sweep", "all", arguments.samples, arguments.batch, 2)
        print(sweep, flush=True)
        found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        texts = []
        for turn in range(arguments.pairs):
            for processes in (1, 2):
                folder = Path(place) / f"pair-{turn}-{processes}"
                size = (arguments.pair_samples, arguments.batch, processes)
                found[processes].append(timed(folder, arguments.pair_methods, *size))
                texts.append(lines(folder))
                print(found[processes][-1], flush=True)
    ratios = [two["per_second"] / one["per_second"] for one, two in zip(found[1], found[2], strict=True)]
    equal = all(text == texts[0] for text in texts)
    result = {
        "environment": environment(),
        "budgets": BUDGETS,
        "samples_per_task": arguments.samples,
        "batch": arguments.batch,
        "sweep": sweep,
        "pairs": {str(processes): rows for processes, rows in found.items()},
        "second_process": {"median": statistics.median(ratios), "ratios": ratios},
        "equal_answers": equal,
    }
    write_json(arguments.out / "evaluation_cpu.json", result)
    if not equal:
        raise SystemExit("the runs do not agree")


if __name__ == "__main__":
    main()
