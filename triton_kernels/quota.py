"""The split of a budget by largest remainder, on the device: what HiRED gives to every crop.

The arithmetic is in whole numbers, so that every device splits alike: weights are rounded to about a 2**30th of the
largest, and a share's proportion is a quotient of integers. One program does it all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from vlm_budget.errors import KernelInputError

from ._launch import (
    Config,
    device_function,
    kernel,
    require_dtype,
    require_int32,
    require_rows,
    require_same_device,
    require_shape,
    tl,
)

FEW, MOST = 128, 1024
"""Shares that one warp can hold, and one program."""


def whole_weights(weights: torch.Tensor) -> torch.Tensor:
    """[S] int64 in proportion to ``weights``; what is not finite or not positive becomes 0, what is positive stays so.

    Scaled by a power of two, so that weights of up to 30 bits keep their exact proportions.
    """
    wide = torch.where(weights.isfinite() & (weights > 0), weights, 0.0).double()
    above = torch.frexp(wide.amax(0)).exponent  # every weight is below 2 ** above
    scaled = (wide * torch.exp2(30.0 - above.double()) + 0.5).long()
    return torch.where(wide > 0, scaled.clamp_min(1), 0)


def quota_reference(total: int, weights: torch.Tensor, caps: torch.Tensor) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.quota`."""
    if not len(caps):
        return caps.new_empty(0, dtype=torch.int32)
    whole, caps = whole_weights(weights), caps.long().clamp_min(0)
    heavy = whole > 0
    among = torch.minimum(caps.new_full((), total), torch.where(heavy, caps, 0).sum())
    shares = _poured(among, torch.where(heavy, whole, 0), caps)
    left = torch.minimum(total - shares.sum(), torch.where(heavy, 0, caps).sum())
    return (shares + _poured(left, torch.where(heavy, 0, caps), caps)).int()


def _poured(total: torch.Tensor, weights: torch.Tensor, caps: torch.Tensor) -> torch.Tensor:
    """[S] int64 shares of ``total`` in proportion to ``weights``, none above its cap."""
    shares, open_ = torch.zeros_like(caps), weights > 0
    for _ in range(len(caps) + 1):  # every round but the last fills one share or more
        wanted = total * weights
        whole = torch.where(open_, weights, 0).sum().clamp_min(1)
        part, rest = wanted // whole, wanted % whole
        over = open_ & ((part > caps) | ((part == caps) & (rest > 0)))
        shares, open_ = torch.where(over, caps, shares), open_ & ~over
        total = total - torch.where(over, caps, 0).sum()
        if over.device.type == "cpu" and not over.any():
            break
    part, rest = torch.where(open_, part, 0), torch.where(open_, rest, -1)
    best = rest.argsort(descending=True, stable=True)  # ties to the earlier share
    rank = torch.empty_like(best).scatter_(0, best, torch.arange(len(best), device=best.device))
    return shares + part + (open_ & (rank < total - part.sum())).long()


@device_function
def _proportions(left, weights, open_):
    """Whole part and remainder of every open share's proportion."""
    whole = tl.maximum(tl.sum(tl.where(open_, weights, 0), 0), 1)
    wanted = left * tl.where(open_, weights, 0)
    return wanted // whole, wanted % whole


@device_function
def _pour(total, weights, caps, at, n):
    """Shares of ``total`` in proportion to ``weights``, none above its cap."""
    shares = tl.zeros_like(caps)
    left = total
    open_ = weights > 0
    for _ in range(0, n):  # Triton 3.6 cannot compile a while loop here; rounds that fill no share change nothing
        part, rest = _proportions(left, weights, open_)
        over = open_ & ((part > caps) | ((part == caps) & (rest > 0)))
        shares = tl.where(over, caps, shares)
        left -= tl.sum(tl.where(over, caps, 0), 0)
        open_ = open_ & (over == 0)
    part, rest = _proportions(left, weights, open_)
    rest = tl.where(open_, rest, -1)
    shares += part
    left -= tl.sum(part, 0)
    for _ in range(0, left.to(tl.int32)):
        best = tl.max(rest, 0)
        first = tl.min(tl.where(rest == best, at, 2147483647), 0)
        shares += tl.where((at == first) & (best >= 0), 1, 0)
        rest = tl.where(at == first, -1, rest)
    return shares


def _quota(weights, caps, shares, total, n, SLOTS: tl.constexpr):
    """Positive weights first, up to their caps; what is left goes to the others in proportion to their caps."""
    at = tl.arange(0, SLOTS)
    inside = at < n
    weight = tl.load(weights + at, mask=inside, other=0)
    cap = tl.maximum(tl.load(caps + at, mask=inside, other=0).to(tl.int64), 0)
    heavy = weight > 0
    among = tl.minimum(tl.sum(tl.where(heavy, cap, 0), 0), total.to(tl.int64))
    share = _pour(among, weight, cap, at, n)
    light = tl.where(heavy, 0, cap)
    left = tl.minimum(total.to(tl.int64) - tl.sum(share, 0), tl.sum(light, 0))
    share += _pour(left, light, cap, at, n)
    tl.store(shares + at, share.to(tl.int32), mask=inside)


_quota_of_few = kernel(Config(warps=1), sizes=("total", "n"))(_quota)
_quota_of_many = kernel(Config(warps=8), sizes=("total", "n"))(_quota)


def require_shares(total: int, weights: torch.Tensor, caps: torch.Tensor) -> None:
    """Refuse what neither half can split.

    Raises:
        KernelInputError: Shapes, element types, devices, or a total that is negative or needs more than 32 bits.
    """
    require_dtype((torch.float64, torch.float32, torch.bfloat16, torch.float16), weights=weights)
    require_dtype((torch.int64, torch.int32), caps=caps)
    require_same_device(weights=weights, caps=caps)
    require_int32(total=total)
    require_shape((None,), weights=weights)
    require_shape(weights.shape, caps=caps)


def quota_triton(total: int, weights: torch.Tensor, caps: torch.Tensor) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.quota`.

    Raises:
        KernelInputError: Element types, devices or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_shares(total, weights, caps)
    require_rows(caps=caps)
    n = weights.numel()
    if n > MOST:
        raise KernelInputError(f"the kernel splits over at most {MOST} shares, got {n}")
    shares = torch.empty(n, dtype=torch.int32, device=weights.device)
    if n:
        run = _quota_of_few if n <= FEW else _quota_of_many
        run.launch((1,), whole_weights(weights), caps, shares, total, n, SLOTS=FEW if n <= FEW else MOST)
    return shares


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    for n in (5, MOST):
        for whole in (torch.int64, torch.int32):
            weights, caps = torch.ones(n, dtype=torch.float64), torch.ones(n, dtype=whole)
            yield f"{n} shares, {whole} caps", partial(quota_triton, 7, weights, caps)
