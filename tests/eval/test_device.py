"""Times, memory and waits of a device, which stand-ins play."""

from __future__ import annotations

import argparse
import subprocess
import time
import warnings
from typing import Any
from unittest import mock

import torch

from vlm_budget.eval import device, large, passes
from vlm_budget.eval.device import Deadline, Stopwatch

CPU = torch.device("cpu")


class Event:
    """A point in time."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1000


def test_on_a_device_every_call_is_timed_with_the_cache_full_of_other_data() -> None:
    watch, slept, called = Stopwatch(CPU), [], []
    watch.cuda = True
    watch._other.fill_(1)
    stand_ins = {"Event": Event, "_sleep": slept.append, "Stream": mock.MagicMock(), "stream": mock.MagicMock()}
    stand_ins |= {"current_stream": mock.MagicMock(), "CUDAGraph": mock.MagicMock(), "graph": mock.MagicMock()}
    with mock.patch.multiple(torch.cuda, **stand_ins):
        times = watch.cold([lambda: called.append(0), lambda: called.append(1)], 5, warmups=3)
        assert called == [0, 1, 0, 0, 1, 0, 1, 0] and len(times) == 5 and min(times) >= 0
        assert slept == [device.HEAD_START] * 5 and not watch._other.any()
        called.clear()
        times = watch.replayed([lambda: called.append(0), lambda: called.append(1)], 6, 4)
    assert times is not None and len(times) == 4
    assert called == [0, 1, 0, 1, 0, 1, 0, 1]  # once before the capture, then six times


def test_waits_are_put_down_to_who_made_them() -> None:
    def waits(module: str, times: int) -> Any:
        space: dict[str, Any] = {"__name__": module, "warn": warnings.warn, "SYNC": device.SYNC}
        exec(f"def f(then=None):\n    for _ in range({times}): warn(SYNC)\n    return then and then()", space)
        return space["f"]

    ours, theirs = waits("vlm_budget.engine.choice", 2), waits("transformers.models.llava", 1)
    bench = waits("vlm_budget.eval.passes", 1)

    def call() -> None:
        ours(lambda: theirs())
        bench()
        warnings.warn("something else", stacklevel=1)

    with mock.patch.object(torch.cuda, "set_sync_debug_mode") as mode:
        found = device.count_waits(call)
    assert [each.args for each in mode.call_args_list] == [("warn",), ("default",)]
    assert (found["total"], found["ours"]) == (4, 2)
    assert found["places"]["vlm_budget: engine/choice.py:2 f"] == 2
    assert found["places"]["transformers: models/llava.py:2 f"] == 1


def test_on_a_device_memory_and_waits_are_told_too() -> None:
    made, watch = large.build("llava_next", "tiny", CPU, torch.float32), Stopwatch(CPU)
    case = passes.Case(made, 2, 1, watch, rounds=(1, 1))
    watch.cuda = True
    stand_ins = dict.fromkeys(("_sleep", "synchronize", "set_sync_debug_mode"), mock.DEFAULT)
    stand_ins |= {"reset_peak_memory_stats": mock.DEFAULT, "max_memory_allocated": lambda where: watch.own_bytes + 5}
    with mock.patch.multiple(torch.cuda, **stand_ins) as called:
        case.prefills(passes.FIRST, Deadline(60))
        case.waits(passes.FIRST)
        case.generations(passes.FIRST[:2], 3, Deadline(60), throughput=True)
    rows = {(row["method"], row["budget"]): row for row in case.record()["variants"]}
    assert {row["peak_bytes"] for row in rows.values()} == {5} and rows["full", 1.0]["decode"]["peak_bytes"] == 5
    assert rows["hired", 0.2]["waits"] == {"total": 0, "ours": 0, "places": {}} and "waits" not in rows["native", 0.2]
    assert {each.args for each in called["_sleep"].call_args_list} == {(passes.LAUNCHED,)}


def test_a_device_is_described() -> None:
    facts = {"multi_processor_count": 132, "total_memory": 10, "L2_cache_size": 2**20}
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=argparse.Namespace(**facts)),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(device, "driver_version", return_value="1.2"),
    ):
        found = device.describe(torch.device("cuda"))
    assert found["driver"] == "1.2" and found["l2_bytes"] == 2**20 and found["capability"] == [9, 0]
    assert device.describe(CPU) == {}


def test_the_driver_is_read_off_its_tool_or_unknown() -> None:
    done = subprocess.CompletedProcess([], 0, stdout="580.1\n580.1\n")
    with mock.patch.object(subprocess, "run", return_value=done):
        assert device.driver_version() == "580.1"
    with mock.patch.object(subprocess, "run", side_effect=FileNotFoundError):
        assert device.driver_version() is None
