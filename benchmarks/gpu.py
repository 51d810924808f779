"""What kernels and budgets buy on a GPU: the machine's ceilings, every operation, and two 7B models from end to end.

``make gpu`` runs it, and with ``SUITE=video`` sparse video attention in place of pruning. One JSON comes out, written
anew after every step, so that an end at any moment loses nothing. The steps run in a process of their own, the most
important first, until ``--minutes`` are over; a step that takes the device down or never ends is noted, and the next
process goes on behind it. What was not measured is listed with the reason, and ``--resume`` measures it.

An operation is timed only where its kernel gives what its torch reference gives, and a patched model only where it
gives what the language model gives for the same tokens. ``--device cpu --size tiny`` runs all of it on toys, with
references in place of kernels: its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlm_budget import ops
from vlm_budget.eval.device import Deadline, Stopwatch, copy_rate, describe, drain, matrix_rate
from vlm_budget.eval.large import FAMILIES, Large, build
from vlm_budget.eval.op_cases import CASES
from vlm_budget.eval.op_cases import LENGTHS as OP_LENGTHS
from vlm_budget.eval.op_work import OpCase, Sizes, Work, measured
from vlm_budget.eval.passes import CORE, FIRST, VARIANTS, Case
from vlm_budget.eval.record import environment
from vlm_budget.eval.steps import EMPTY, NotEnoughError, Record, supervise, work
from vlm_budget.eval.video_ops import LENGTHS as VIDEO_LENGTHS
from vlm_budget.eval.video_ops import VIDEO_CASES
from vlm_budget.eval.video_passes import EMPTY as EMPTY_VIDEO
from vlm_budget.eval.video_passes import VideoBench

ROOT = Path(__file__).resolve().parents[1]
STALLED = 100.0
"""Seconds after which a step is taken to hang."""
ALL = 540.0
"""Seconds for tests and measurements together, with what the last step may take beyond them still under ten minutes."""
LENGTHS = {"real": sorted(OP_LENGTHS, key=lambda tokens: tokens == 5760), "tiny": [63, 111]}
COPIED = {"real": 2**31, "tiny": 2**20}
MULTIPLIED = {"real": 8192, "tiny": 64}
WIDTHS: dict[str, dict[str, int]] = {"real": {}, "tiny": {"heads": 4, "head_dim": 16, "width": 64}}
ROUNDS = {"real": (3, 10), "tiny": (1, 1)}
TOKENS = {"real": (128, 9), "tiny": (4, 3)}
LLAVA, QWEN = FAMILIES
REST = tuple(variant for variant in VARIANTS if variant not in FIRST)
# Family, tiles, batch, stage. Throughput is measured with five tiles; with fewer, a few tokens are decoded.
HIRED = "prefill of HiRED at 20%"  # before all methods in turn, so that no other's failure or time costs its figures
WHOLE = ("prefill", "decode")
OTHER = "decode at other budgets"
PLAN = {
    "real": [
        *((family, 5, batch, HIRED) for family in (LLAVA, QWEN) for batch in (1, 8)),
        # The model that is in memory goes on.
        *((family, 5, batch, stage) for family in (QWEN, LLAVA) for batch in (1, 8) for stage in WHOLE),
        *((QWEN, tiles, 1, stage) for tiles in (4, 3, 2, 1) for stage in WHOLE),
        *((LLAVA, tiles, batch, stage) for batch in (1, 8) for tiles in (4, 3, 2) for stage in WHOLE),
        *((LLAVA, 5, batch, OTHER) for batch in (1, 8)),
        *((QWEN, tiles, 8, stage) for tiles in (4, 3, 2, 1) for stage in WHOLE),
        *((QWEN, 5, batch, OTHER) for batch in (1, 8)),
    ],
    "tiny": [
        *((LLAVA, 5, 1, stage) for stage in (HIRED, *WHOLE, OTHER)),
        *((LLAVA, 2, 2, stage) for stage in WHOLE),
        (QWEN, 5, 2, "prefill"),
    ],
}
VIDEO_OPERATIONS = {"real": VIDEO_LENGTHS, "tiny": (63, 577)}
VIDEO_HEADS = {"real": 24, "tiny": 2}
VIDEO_TESTS = " or ".join(["video_on_gpu", *sorted({case.op for case in VIDEO_CASES})])
"""What pytest is told to choose for video, and to leave out else."""
NEVER = {"llava_next, 1 tile": "LLaVA-NeXT sends a thumbnail with every crop: two tiles are its fewest"}


# --- the worker ------------------------------------------------------------------------------------------------------


class Bench:
    """Measures; one per process.

    Args:
        arguments: The command line.
        record: What to write to.
        deadline: When to stop.
    """

    def __init__(self, arguments: argparse.Namespace, record: Record, deadline: Deadline) -> None:
        self.size, self.record, self.deadline = arguments.size, record, deadline
        self.device = torch.device(arguments.device)
        self.dtype: torch.dtype = getattr(torch, arguments.dtype)
        self.attention: str | None = arguments.attention
        self.kernels: ops.Mode = "triton" if self.device.type == "cuda" else "reference"
        self.watch = Stopwatch(self.device)
        self.sizes = Sizes(self.device, self.dtype, **WIDTHS[self.size])
        self.video: VideoBench | None = None
        if arguments.suite == "video":
            self.sizes = replace(self.sizes, heads=VIDEO_HEADS[self.size])
            self.video = VideoBench(self.size, self.dtype, self.watch, record, deadline)
        self.large: Large | None = None
        self.case: Case | None = None

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Names and actions, the most important first."""
        yield "machine", self.machine
        if self.video is not None:
            for name, action in self.video.steps():
                yield name, partial(self.within_memory, action)
            yield from self._operations(VIDEO_OPERATIONS[self.size], VIDEO_CASES)
            return
        lengths, plan = LENGTHS[self.size], PLAN[self.size]
        whole = [each for each in plan if each[1] == 5 and each[3] != OTHER]
        yield from self._operations(lengths[:1], CASES)
        yield from self._models(whole)
        yield from self._operations(lengths[1:], CASES)
        yield from self._models([each for each in plan if each not in whole])

    def _operations(self, lengths: Sequence[int], cases: Sequence[OpCase]) -> Iterator[tuple[str, Callable[[], None]]]:
        for tokens in lengths:
            for entry in cases:
                name = f"{entry.op}, {entry.what}, {tokens} tokens"
                yield name, partial(self.within_memory, self.operation, entry, tokens)

    def _models(self, plan: Sequence[tuple[str, int, int, str]]) -> Iterator[tuple[str, Callable[[], None]]]:
        for family, tiles, batch, stage in plan:
            name = f"{family}, {tiles} {'tile' if tiles == 1 else 'tiles'}, batch {batch}: {stage}"
            yield name, partial(self.within_memory, self.model, family, tiles, batch, stage)

    def within_memory(self, action: Callable[..., None], *what: Any) -> None:
        """A step for which there may be too little memory, which is no failure."""
        try:
            action(*what)
        except torch.OutOfMemoryError:
            raise NotEnoughError("out of memory") from None

    def recover(self) -> None:
        """After a step that failed; raises where the device does not answer any more."""
        self.case = None
        if self.video is not None:
            self.video.clear()
        free(self.device)
        drain(self.device)

    def machine(self) -> None:
        """The two ceilings."""
        found = {
            "copy": copy_rate(self.watch, COPIED[self.size]),
            "matrix": matrix_rate(self.watch, MULTIPLIED[self.size], self.dtype),
            "empty_event_ms": self.watch.event_cost(),
        }
        self.record.save(machine=found)

    def operation(self, entry: OpCase, tokens: int) -> None:
        """One operation on so many tokens: checked, then timed beside its reference."""
        if self.video is not None:
            self.video.clear()
        if self.large is not None:  # references need memory, too
            self.case = self.large = None
            free(self.device)
        works = [self._work(entry, tokens, 0)]
        for seed in range(1, min(8, 1 + 4 * self.watch.cache_bytes // works[0].bytes)):
            works.append(self._work(entry, tokens, seed))
        found = measured(works, self.watch, self.kernels, entry.lists)
        ms, machine = found["ms"], self.record.data["machine"]
        best = min(times["median"] for times in (ms["cold"], ms["replayed"]) if times)
        row = {
            "op": entry.op,
            "what": entry.what,
            "tokens": tokens,
            "bound": entry.bound,
            **found,
            "share_of_copy_rate": found["bytes"] / best * 1000 / machine["copy"]["bytes_per_second"],
            "share_of_matrix_rate": found["flops"] / best * 1000 / machine["matrix"]["flops_per_second"],
        }
        self.record.save(operations=[*self.record.data["operations"], row])

    def _work(self, entry: OpCase, tokens: int, seed: int) -> Work:
        return entry.make(self.sizes, tokens, torch.Generator(self.device).manual_seed(seed))

    def model(self, family: str, tiles: int, batch: int, stage: str) -> None:
        """One stage of one model at one size of its input."""
        case = self._prepared(family, tiles, batch)
        if stage == HIRED:
            case.prefills(CORE, self.deadline)
        elif stage == "prefill":
            case.prefills(VARIANTS, self.deadline)
            if tiles == 5 and batch == 1:
                case.waits(FIRST)
        else:
            long, short = TOKENS[self.size]
            chosen = VARIANTS if tiles < 5 else FIRST if stage == "decode" else REST
            case.generations(chosen, long if tiles == 5 else short, self.deadline, throughput=tiles == 5)
        earlier = {self._key(row): row for row in self.record.data["models"]}
        row = case.record()
        earlier[self._key(row)] = merged(earlier.get(self._key(row)), row)
        self.record.save(models=list(earlier.values()))
        if case.left_out:
            raise NotEnoughError(f"out of time from {case.left_out[0]} on")

    def _prepared(self, family: str, tiles: int, batch: int) -> Case:
        """The case at hand, or a new one; one model is in memory at a time."""
        case = self.case
        if case is not None and (case.large.family, case.tiles, case.batch) == (family, tiles, batch):
            return case
        self.case = case = None
        if self.large is None or self.large.family != family:
            self.large = None
            free(self.device)
            self.large = build(family, self.size, self.device, self.dtype, self.attention)
            self.record.save(shapes={**self.record.data["shapes"], family: self.large.facts})
        self.case = Case(self.large, tiles, batch, self.watch, ROUNDS[self.size])
        return self.case

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["family"], row["tiles"], row["batch"]


def free(device: torch.device) -> None:
    """Give unused memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def merged(earlier: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """What two processes found out about one case; the later one counts where both have it."""
    if earlier is None:
        return row
    known = {(each["method"], each["budget"]): each for each in earlier["variants"]}
    for each in row["variants"]:
        key = each["method"], each["budget"]
        found = {name: value for name, value in each.items() if value or name not in known.get(key, {})}
        known[key] = {**known.get(key, {}), **found}
    return {**earlier, **row, "rounds": row["rounds"] or earlier["rounds"], "variants": list(known.values())}


# --- the GPU tests --------------------------------------------------------------------------------------------------


def run_tests(files: Sequence[str], seconds: float, report: Path, workers: int = 4, which: str = "") -> dict[str, Any]:
    """Run the GPU tests for so long at most, and count.

    Args:
        files: Test files; those that need a package which is missing are left out, and said to be.
        seconds: After that the run is interrupted.
        report: Where pytest writes its own, which does not exist yet.
        workers: Processes, where pytest-xdist is installed; most of the time goes into compiling, which needs no GPU.
        which: Names of those to run, as pytest's ``-k`` takes them; all by default.
    """
    lacking = [] if importlib.util.find_spec("hypothesis") else needing(files, "hypothesis")
    chosen = [file for file in files if file not in lacking]
    options = ["-q", "-m", "gpu", f"--junitxml={report}", "--continue-on-collection-errors"]
    options += ["-o", "faulthandler_timeout=60"]  # tells which test hangs
    options += ["-k", which] if which else []
    if workers and importlib.util.find_spec("xdist"):
        options += ["-n", str(workers)]
    runner = subprocess.Popen([sys.executable, "-m", "pytest", *options, *chosen], cwd=ROOT, start_new_session=True)
    try:
        code = runner.wait(seconds)
    except subprocess.TimeoutExpired:
        runner.send_signal(signal.SIGINT)  # pytest still writes what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            runner.wait(15)
        code = "out of time"
    finally:
        with contextlib.suppress(ProcessLookupError):  # what is left of it, a kernel that hangs say, must not stay
            os.killpg(runner.pid, signal.SIGKILL)
        runner.wait()
    return {"exit_code": code, "lacking_hypothesis": lacking, **counted(report)}


def needing(files: Sequence[str], package: str) -> list[str]:
    """Those that import a package, or whose folder's set-up or a helper of theirs does."""

    def imports(file: Path, name: str) -> bool:
        return re.search(rf"^(?:from|import) {name}\b", file.read_text(encoding="utf-8"), re.MULTILINE) is not None

    helpers = [file.stem for file in (ROOT / "tests" / "fixtures").glob("*.py") if imports(file, package)]
    wanting = rf"(?:{'|'.join([package, *helpers])})"
    read = {file: [ROOT / file, *(ROOT / file).parent.glob("conftest.py")] for file in files}
    return [file for file, parts in read.items() if any(imports(part, wanting) for part in parts)]


def counted(report: Path) -> dict[str, Any]:
    """Numbers of passed, failed and skipped tests, and the names of those that failed."""
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0, "seconds": None, "failing": ["pytest wrote no report"]}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    failing = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    return {
        "passed": total - skipped - len(failing),
        "failed": len(failing),
        "skipped": skipped,
        "seconds": float(suite.get("time", 0)),
        "failing": failing,
    }


def gpu_test_files() -> list[str]:
    """Test files with tests that need a device, the engine's and the kernels' first."""
    marked = re.compile(r"^(?:pytestmark = |@)pytest\.mark\.gpu", re.MULTILINE)
    found = [file for file in (ROOT / "tests").rglob("test_*.py") if marked.search(file.read_text(encoding="utf-8"))]
    return [str(file.relative_to(ROOT)) for file in sorted(found, key=lambda file: (file.parent.name != "gpu", file))]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    made.add_argument("--device", default="cuda")
    made.add_argument("--dtype", default=None, help="bfloat16 on a GPU, float32 on a CPU by default")
    made.add_argument("--size", choices=sorted(LENGTHS), default="real")
    made.add_argument("--suite", choices=["tokens", "video"], default="tokens", help="pruning, or video attention")
    made.add_argument("--minutes", type=float, default=6, help="for the measurements")
    made.add_argument("--test-minutes", type=float, default=0, help="for the GPU tests before them; 0: none")
    made.add_argument("--attention", default=None, help="attn_implementation; the best that is installed if not given")
    made.add_argument("--only", default="", help="a regular expression: only steps whose name it finds")
    made.add_argument("--resume", action="store_true", help="measure what an earlier run of the same commit left out")
    made.add_argument("--git", default=None, help="commit, where the tree is no checkout")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    made.add_argument("--worker", type=float, default=None, help=argparse.SUPPRESS)
    return made


def begin(record: Record, arguments: argparse.Namespace) -> None:
    """Write what is known before anything is measured.

    Raises:
        SystemExit: There is nothing to go on with.
    """
    cuda = arguments.device.startswith("cuda")
    place = environment(arguments.device, arguments.dtype) | describe(torch.device(arguments.device))
    place["git"] = place["git"] or arguments.git
    place["kernels"] = ops.mode()
    video = arguments.suite == "video"
    known = {"size": arguments.size, "trial": not cuda, "minutes": arguments.minutes}
    known["not_measured"] = {} if video else dict(NEVER)
    if arguments.resume:
        same = ("git", "device", "dtype", "versions", "kernels")
        earlier = record.data.get("environment", {})
        if any(earlier.get(name) != place[name] for name in same) or record.data.get("size") != arguments.size:
            sys.exit(f"{record.path} is no earlier run of this commit on this machine: leave --resume out")
        record.save(**known)
        return
    none: dict[str, Any] = {"machine": None, "shapes": {}, "operations": [], "models": [], "tests": None}
    none |= EMPTY_VIDEO if video else {}
    record.data = {"environment": place}
    record.save(**{**EMPTY, **none, **known})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; what it returns is the exit code."""
    started = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(words)
    cuda = arguments.device.startswith("cuda")
    arguments.dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    video = arguments.suite == "video"
    record = Record(arguments.out / f"gpu{'_video' * video}{'_trial' * (not cuda)}.json")
    if arguments.worker is not None:
        bench = Bench(arguments, record, Deadline(arguments.worker - time.time()))
        steps = [step for step in bench.steps() if step[0] == "machine" or re.search(arguments.only, step[0])]
        work(record, steps, bench.deadline, bench.recover)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin(record, arguments)
    seconds = 60 * arguments.minutes
    if arguments.test_minutes:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "tests.xml"
            which = VIDEO_TESTS if video else f"not ({VIDEO_TESTS})"
            record.save(tests=run_tests(gpu_test_files(), 60 * arguments.test_minutes, report, which=which))
        seconds = min(seconds, ALL - (time.monotonic() - started))
    supervise(record, [sys.executable, __file__, *words, "--worker"], seconds, STALLED)
    data = record.data
    print(f"{record.path}: {len(data['done'])} steps done, {len(data['failed'])} failed, tests: {data['tests']}")
    return 1 if data["failed"] or (data["tests"] and data["tests"]["exit_code"]) else 0


if __name__ == "__main__":
    sys.exit(main())
