"""What one timed call of an operation is, when its result counts as right, and how it is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlm_budget import ops
from vlm_budget.triton_kernels._launch import Kernel

from .device import Call, Stopwatch, drain, graph_size, repetitions, spread

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative difference in norm between kernel and reference, by the element type of what is added up."""

Bound = Literal["memory", "matrix", "latency"]


@dataclass(frozen=True)
class Sizes:
    """Widths of the inputs, those of a 7B model unless it is a trial.

    Attributes:
        device: Where the inputs live.
        dtype: Of states and embeddings; scores are float32.
        heads: Query heads.
        head_dim: Width of one.
        width: Of an embedding.
        keep: Share of the tokens that stay, one in so many.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    heads: int = 32
    head_dim: int = 128
    width: int = 4096
    keep: int = 5


class DisagreementError(RuntimeError):
    """A kernel does not give what its reference gives."""


def difference(found: Any, wanted: Any, tolerance: float) -> float:
    """Relative difference of two results, the largest over their tensors.

    Raises:
        DisagreementError: It exceeds the tolerance; whole numbers, shapes or types differ.
    """
    worst = 0.0
    for place, (own, other) in enumerate(zip(tensors(found), tensors(wanted), strict=True)):
        if own.shape != other.shape or own.dtype != other.dtype:
            raise DisagreementError(f"output {place}: {own.shape} {own.dtype} instead of {other.shape} {other.dtype}")
        if not own.is_floating_point():
            wrong = int((own != other).sum())
            if wrong:
                raise DisagreementError(f"output {place}: {wrong} of {own.numel()} numbers differ")
            continue
        own, other = own.double(), other.double()
        odd = int((own.isfinite() != other.isfinite()).sum())
        own, other = own.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
        apart = float((own - other).norm() / other.norm().clamp_min(1e-30))
        if odd or not apart <= tolerance:
            raise DisagreementError(
                f"output {place}: differs by {apart:.1e} in norm (at most {tolerance:.0e} is allowed), and "
                f"{odd} entries are finite in one alone"
            )
        worst = max(worst, apart)
    return worst


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result if isinstance(result, (tuple, list)) else vars(result).values() if result is not None else ()
    return [tensor for part in parts for tensor in tensors(part)] if not isinstance(result, (int, float, bool)) else []


@dataclass(frozen=True)
class Work:
    """One call, and what it must do at the least.

    Attributes:
        call: Runs the operation; :func:`vlm_budget.ops.use` decides which half.
        bytes: Read and written.
        flops: Multiplications and additions.
        tolerance: Largest relative difference of floating-point results; whole numbers must be equal.
        judge: Judges a result where several are right (of equal tokens either may be chosen) in place of the
            comparison: how far it falls short of the best, to be below ``tolerance``.
    """

    call: Call
    bytes: int
    flops: int = 0
    tolerance: float = TOLERANCE[torch.float32]
    judge: Callable[[Any], torch.Tensor] | None = None

    def compare(self, found: Any, wanted: Any) -> float:
        """How far the kernel's result is from the reference's.

        Raises:
            DisagreementError: Too far.
        """
        if self.judge is None:
            return difference(found, wanted, self.tolerance)
        own = float(self.judge(found))
        if not own <= self.tolerance:
            other = float(self.judge(wanted))
            if not own <= other:
                raise DisagreementError(f"falls short of the best by {own:.1e}, the reference by {other:.1e}")
        return own


@dataclass(frozen=True)
class OpCase:
    """One entry of the table.

    Attributes:
        op: Name in :mod:`vlm_budget.ops`.
        what: The inputs, in words.
        bound: What limits the operation; ``latency`` where neither bytes nor FLOPs do.
        make: ``(sizes, tokens, generator)`` to the work.
        lists: The call copies lists from the host, which a CUDA graph cannot hold.
    """

    op: str
    what: str
    bound: Bound
    make: Callable[[Sizes, int, torch.Generator], Work]
    lists: bool = False


def weight(*given: torch.Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in given if tensor is not None)


def parts_of(tokens: int, parts: int) -> list[int]:
    """Sizes of nearly equal parts of a row of tokens."""
    return [tokens * (part + 1) // parts - tokens * part // parts for part in range(parts)]


# --- times -----------------------------------------------------------------------------------------------------------


def measured(works: Sequence[Work], watch: Stopwatch, kernels: ops.Mode, lists: bool = False) -> dict[str, Any]:
    """Check an operation, then time it beside its reference, for about a second.

    Calls are timed twenty times, longer ones as often as fits; every spread says how often.

    Args:
        works: The same on other inputs, so many that the cache holds none of them when its turn comes again.
        watch: The device.
        kernels: The half to be timed.
        lists: See :class:`OpCase`.

    Raises:
        DisagreementError: It does not give what its reference gives, or not the same again.
    """
    calls = [work.call for work in works]
    with ops.use("reference"):
        wanted = [call() for call in calls[:2]]
    with ops.use(kernels):
        found = [call() for call in calls[:2]]
        apart = max(work.compare(*pair) for work, *pair in zip(works[:2], found, wanted, strict=True))
        cost = min(watch.wall(calls[0])[0] for _ in range(2))
        repeats = repetitions(cost)
        cold = watch.cold(calls, repeats, warmups=min(3, repeats // 4))
        host = [watch.wall(calls[turn % len(calls)])[0] for turn in range(repeats)]
        difference(calls[0](), found[0], 0.0)  # the same bits again: an error that moves is a race
        replayed, why = (None, "copies lists from the host") if lists else _replayed(calls, watch, cost)
    with ops.use("reference"):
        repeats = repetitions(watch.wall(calls[0])[0])
        reference = watch.cold(calls, repeats, warmups=min(1, repeats // 4))
    with ops.use("auto"):
        auto = launches(calls[0])
    return {
        "runs": "kernel" if kernels == "triton" else "reference",
        "auto": "kernel" if auto else "reference",
        "difference": apart,
        "bytes": works[0].bytes,
        "flops": works[0].flops,
        "ms": {
            "cold": spread(cold),
            "replayed": spread(replayed) if replayed else None,
            "with_host": spread(host),
            "reference": spread(reference),
        },
        "not_replayed": why,
        "times_faster": spread(reference)["median"] / spread(cold)["median"],
    }


def _replayed(calls: Sequence[Call], watch: Stopwatch, cost: float) -> tuple[list[float] | None, str | None]:
    """Times of a CUDA graph of calls that cost so many milliseconds, or why there are none."""
    try:
        return watch.replayed(calls, *graph_size(cost)), None
    except RuntimeError as error:
        drain(watch.device)
        return None, str(error).split("\n")[0][:200]


def launches(call: Call) -> bool:
    """Whether a call launches any kernel of ours, which tells the half that ran."""
    launched: list[Kernel] = []
    plain = Kernel.launch

    def noted(self: Kernel, *args: Any, **meta: Any) -> None:
        launched.append(self)
        plain(self, *args, **meta)

    Kernel.launch = noted  # type: ignore[method-assign]
    try:
        call()
    finally:
        Kernel.launch = plain  # type: ignore[method-assign]
    return bool(launched)
