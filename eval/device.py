"""Times, ceilings and waits of a device: what a benchmark of kernels stands on.

On a CUDA device a call is timed by events, with the caches flushed before it and the host far enough ahead that its own
time does not show. Elsewhere the host's clock stands in, so that the same code runs: such times mean nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch

Call = Callable[[], Any]

HEAD_START = 2_000_000
"""Clock cycles (about a millisecond) for which the device waits while the host issues what is timed."""

SHARE = 250.0
"""Milliseconds that one kind of timing of an operation may take; there are four kinds."""

MOST = 20
"""Timed repetitions, unless they would take longer than that."""

SYNC = "called a synchronizing CUDA operation"
"""What torch says in ``torch.cuda.set_sync_debug_mode("warn")``."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high, "min": min(values), "max": max(values), "runs": len(values)}


def repetitions(ms: float) -> int:
    """How often to time what takes so many milliseconds."""
    return max(1, min(MOST, int(SHARE / max(ms, 1e-3))))


def graph_size(ms: float) -> tuple[int, int]:
    """Calls in a graph, and how often to time it, for calls of so many milliseconds."""
    repeats = repetitions(ms)
    return max(1, min(MOST, int(SHARE / max(ms, 1e-3) / (repeats + 1)))), repeats


class Deadline:
    """How much time is left.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; below 0 once it has passed."""
        return self._end - time.monotonic()


def drain(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times calls on one device.

    Args:
        device: Where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 2**16
        self.cache_bytes = int(cache)
        self.own_bytes = 4 * self.cache_bytes
        self._other = torch.empty(self.own_bytes, dtype=torch.uint8, device=device)

    def wall(self, call: Call) -> tuple[float, Any]:
        """Milliseconds on the host's clock, from an idle device to an idle device, and the call's result."""
        drain(self.device)
        start = time.perf_counter()
        result = call()
        drain(self.device)
        return (time.perf_counter() - start) * 1000, result

    def cold(self, calls: Sequence[Call], repeats: int, warmups: int = 3) -> list[float]:
        """Milliseconds that the device takes per call, its cache holding something else before each.

        Args:
            calls: Called in turn; the same work on other inputs.
            repeats: Timed calls.
            warmups: Calls before them.
        """
        for turn in range(warmups):
            calls[turn % len(calls)]()
        drain(self.device)
        if not self.cuda:
            return [self.wall(calls[turn % len(calls)])[0] for turn in range(repeats)]
        marks = []
        for turn in range(repeats):
            self._other.zero_()
            torch.cuda._sleep(HEAD_START)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            calls[turn % len(calls)]()
            stop.record()
            marks.append((start, stop))
        drain(self.device)
        return [float(start.elapsed_time(stop)) for start, stop in marks]

    def replayed(self, calls: Sequence[Call], length: int, repeats: int) -> list[float] | None:
        """Milliseconds per call of a CUDA graph that makes ``length`` calls, over all inputs in turn.

        Without launch gaps and the cost of an event, what is left is what the device needs. None without CUDA.

        Raises:
            RuntimeError: The calls cannot be captured: they wait for the device, say.
        """
        if not self.cuda:
            return None
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        drain(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for turn in range(length):
                calls[turn % len(calls)]()
        return [each / length for each in self.cold([graph.replay], repeats, 1)]

    def event_cost(self) -> dict[str, float]:
        """What two events in a row measure with nothing between them: part of every cold time."""
        return spread(self.cold([lambda: None], 20))


# --- ceilings --------------------------------------------------------------------------------------------------------


def copy_rate(watch: Stopwatch, size: int, repeats: int = 20) -> dict[str, Any]:
    """Bytes per second of a copy within the device's memory, read and written ones counted.

    Args:
        watch: The device.
        size: Bytes of the source; far more than a cache holds.
        repeats: Timed copies.
    """
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    ms = spread(watch.cold([lambda: target.copy_(source)], repeats))
    return {"bytes": 2 * size, "ms": ms, "bytes_per_second": 2 * size / ms["median"] * 1000}


def matrix_rate(watch: Stopwatch, size: int, dtype: torch.dtype, repeats: int = 20) -> dict[str, Any]:
    """FLOPs per second of a square matrix product of random numbers (zeros draw less power and run faster)."""
    left, right = (torch.randn(size, size, dtype=dtype, device=watch.device) for _ in range(2))
    out = torch.empty_like(left)
    ms = spread(watch.cold([lambda: torch.mm(left, right, out=out)], repeats))
    flops = 2 * size**3
    return {"size": size, "flops": flops, "ms": ms, "flops_per_second": flops / ms["median"] * 1000}


def describe(device: torch.device) -> dict[str, Any]:
    """Driver, memory, caches and capability of a CUDA device; empty for others."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
    }


def driver_version() -> str | None:
    """Of the NVIDIA driver, as its own tool says it; None where there is no such tool."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split("\n")[0].strip() or None


# --- waits -----------------------------------------------------------------------------------------------------------


def count_waits(call: Call) -> dict[str, Any]:
    """How often the host waited for the device during a call, and who made it wait.

    Every wait is put down to the innermost frame that is ours or transformers'.

    Returns:
        ``total``; ``ours``; and ``places``, the number of waits per file, line and function.
    """
    places: Counter[tuple[str, str]] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if SYNC in str(message):
            places[blame(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {
        "total": places.total(),
        "ours": sum(count for (owner, _), count in places.items() if owner == "vlm_budget"),
        "places": {f"{owner}: {place}": count for (owner, place), count in places.most_common()},
    }


def blame(frame: FrameType | None) -> tuple[str, str]:
    """Package and place of the innermost frame that is ours or transformers'; a benchmark's own does not count."""
    while frame is not None:
        package, _, rest = str(frame.f_globals.get("__name__", "")).partition(".")
        if package in ("vlm_budget", "transformers") and not (package == "vlm_budget" and rest.startswith("eval")):
            code = frame.f_code
            return package, f"{rest.replace('.', '/')}.py:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "other", ""
