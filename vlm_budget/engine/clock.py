"""Time per stage without stopping the device: CUDA events where there is a GPU, the host clock elsewhere."""

from __future__ import annotations

import time
from typing import Any

import torch


class Interval:
    """A started measurement; :meth:`stop` ends it, :attr:`ms` reads it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks = [self._mark()]

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Interval:
        """End the measurement."""
        self._marks.append(self._mark())
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A copy of what ended on a device tells the same time, without the device's events, which cannot be copied."""
        marks = self._marks
        if self._cuda:
            marks = [0.0, self.ms / 1000] if len(marks) == 2 else [time.perf_counter()]
        return {"_cuda": False, "_marks": marks}

    @property
    def ms(self) -> float:
        """Milliseconds between start and stop. Waits for the device where the stop has not happened there yet."""
        start, stop = self._marks
        if isinstance(start, float) and isinstance(stop, float):
            return (stop - start) * 1000
        assert isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event)
        stop.synchronize()
        return float(start.elapsed_time(stop))


def total_ms(intervals: list[Interval]) -> float:
    """Sum of measurements."""
    return sum(interval.ms for interval in intervals)
