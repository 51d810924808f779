"""Sparse calls of one layer, step after step, as a run makes them; timed as a whole and operation by operation."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_budget.engine.clock import Interval
from vlm_budget.video.dit.attend import attend
from vlm_budget.video.dit.call import Call, Moment
from vlm_budget.video.dit.method import SparseAttention

from .device import drain
from .video_shapes import Shape

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
STEPS = 50
"""Denoising steps of a run: over those that are sparse, the first clustering is shared."""
PERIOD = 8
"""Sparse steps after the first that are timed, at least."""


@dataclass(frozen=True)
class Run:
    """Sparse calls of one layer, step after step, on the same tensors.

    Attributes:
        method: What chooses pairs.
        shape: Of the calls.
        tensors: Queries, keys and values, [1, H, L, D].
    """

    method: SparseAttention
    shape: Shape
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @property
    def dense_steps(self) -> int:
        """Of a run, before the first sparse one."""
        return int(self.shape.warmup * STEPS)

    @property
    def steps(self) -> int:
        """After the first: so many that clusterings are shared as in a run."""
        reuse = max(1, int(getattr(self.method, "reuse", 1)))
        return reuse * math.ceil(PERIOD / reuse)

    def at(self, step: int, state: dict[str, Any]) -> Call:
        """The call of a step."""
        moment = Moment(step + self.dense_steps, STEPS, 1, 60)
        return Call(*self.tensors, self.shape.grid, 0, None, False, self.shape.scale, moment, state)

    def _run(self) -> Iterator[Any]:
        """A run from an empty state; yields after each step."""
        state: dict[str, Any] = {}
        for step in range(1 + self.steps):
            call = self.at(step, state)
            yield attend(call, self.method.blocks(call))

    def timed(self) -> tuple[float, float]:
        """Milliseconds of the first step, and of those after it on average."""
        device = self.tensors[0].device
        drain(device)
        marks = [Interval(device)]
        for _ in self._run():
            marks[-1].stop()
            marks.append(Interval(device))
        first, *steps = (mark.ms for mark in marks[:-1])
        return first, statistics.mean(steps)

    def parts(self) -> dict[str, tuple[float, float]]:
        """The same of every operation of ours, and of all that is none."""
        totals = []
        run = self._run()
        while True:
            with OpClock() as clock:
                whole = Interval(self.tensors[0].device)
                if next(run, None) is None:
                    break
                whole.stop()
            spent = {name: sum(each.ms for each in found) for name, found in clock.calls.items()}
            totals.append({**spent, "other": whole.ms - sum(spent.values())})
        names = {name for step in totals for name in step}
        times = {name: [step.get(name, 0.0) for step in totals] for name in sorted(names)}
        return {name: (first, statistics.mean(steps)) for name, (first, *steps) in times.items()}


class OpClock(TorchDispatchMode):
    """Times operations of ours on the device's clock; ``calls`` has them by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, list[Interval]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "vlm_budget":
            return func(*args, **(kwargs or {}))
        tensor = next(leaf for arg in args for leaf in (arg if isinstance(arg, list) else [arg]) if is_tensor(leaf))
        clock = Interval(tensor.device)
        result = func(*args, **(kwargs or {}))
        self.calls.setdefault(func._schema.name.split("::")[1], []).append(clock.stop())
        return result


def is_tensor(value: Any) -> bool:
    """It is one."""
    return isinstance(value, torch.Tensor)


def amortised(first: float, later: float, sparse_steps: int) -> float:
    """Mean over the sparse steps of a run, the first of which costs more."""
    return (first + (sparse_steps - 1) * later) / sparse_steps


@contextmanager
def only(backend: SDPBackend) -> Iterator[None]:
    """Attention takes this back end or none, and does not say why at length."""
    with warnings.catch_warnings(), sdpa_kernel([backend]):
        warnings.simplefilter("ignore")
        yield
