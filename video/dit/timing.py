"""Times of dense and sparse attention on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from .attend import attend
from .call import Call
from .method import SparseAttention


@torch.no_grad()
def milliseconds(device: torch.device, run: Callable[[], object], repeats: int = 1) -> float:
    """Mean time of a run, from an idle device to an idle device; the host waits for it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda _: None)
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(device)
    return (time.perf_counter() - start) * 1e3 / repeats


def sparse_milliseconds(call: Call, method: SparseAttention, rounds: int) -> float:
    """Mean time of a whole sparse call over the steps of a run, after a first one, which clusters from nothing.

    Args:
        call: Tensors of the shapes to come. Its state is left alone.
        method: What to time.
        rounds: Steps, at least; as many more as it takes for what is reused for some steps to count in part.
    """
    kept: dict[str, object] = {}

    def steps(first: int, count: int) -> None:
        for number in range(first, first + count):
            now = replace(call, state=kept, moment=replace(call.moment, step=number))
            attend(now, method.blocks(now))

    with torch.no_grad():
        steps(0, 1)
    reuse = getattr(method, "reuse", 1)
    counted = reuse * max(1, -(-rounds // reuse))
    return milliseconds(call.query.device, lambda: steps(1, counted)) / counted
