"""Greedy MAP of a determinantal point process: tokens of quality that differ from each other.

The choices are made in panels: one program per group makes a panel's choices in one launch, and a matrix product then
takes the chosen tokens out of all similarities. The host is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ._cosines import CosineRows, inner_products, require_choices, require_groups
from ._launch import FLOATS, Config, blocks, kernel, power_of_two, require_dtype, require_same_device, require_shape, tl

EXHAUSTED = 1e-5
"""Share of a token's length outside the span of the chosen ones that is no more than rounding."""

PANEL = 32
"""Choices per launch."""


def map_dpp_reference(rows: CosineRows, log_quality: torch.Tensor, k: int) -> torch.Tensor:
    """What is right for one group; see :func:`vlm_budget.ops.greedy_dpp`."""
    level = 2 * log_quality.to(rows.unit)[None]
    left = (rows.unit.ne(0).any(1)[None] & level.isfinite()).to(level)  # exactly one, so that equal tokens tie
    last = below_everything(log_quality).to(level)[None]
    chosen = torch.empty(1, k, dtype=torch.long, device=left.device)
    factor = left.new_empty(k, rows.size)
    for step in range(k):
        gain = torch.where(left > EXHAUSTED, left.log().add_(level), last)
        index = torch.argmax(gain, 1, keepdim=True, out=chosen[:, step : step + 1])[0]
        own = left.index_select(1, index)
        scale = torch.where(own > EXHAUSTED, own.rsqrt(), 0.0)
        above = factor[:step]
        row = torch.addmm(rows.row(index), above.index_select(1, index).T, above, alpha=-1)
        found = torch.mul(row, scale, out=factor[step : step + 1])
        left.addcmul_(found, found, value=-1).index_fill_(1, index, 0.0)
        last.index_fill_(1, index, float("-inf"))
    return chosen[0]


def below_everything(scores: torch.Tensor) -> torch.Tensor:
    """[..., n] numbers in the order of ``scores``, ties to the lower index, all lower than any logarithm."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(-1, -scores.shape[-1] - 1, -1, dtype=torch.float32, device=scores.device)
    return torch.empty_like(scores, dtype=torch.float32).scatter_(-1, order, (places * 1e30).expand_as(order))


def greedy_dpp_reference(features: torch.Tensor, log_quality: torch.Tensor, k: int) -> torch.Tensor:
    """What is right for [G, n, C] features and [G, n] log qualities: every group for itself."""
    pairs = zip(features, log_quality, strict=True)
    found = [map_dpp_reference(CosineRows(each), quality, k) for each, quality in pairs]
    return torch.stack(found) if found else torch.empty(0, k, dtype=torch.long, device=features.device)


def _choose(
    similar, level, left, last, factor, chosen, n, k, begin, end, group_stride, row_stride,
    BLOCK: tl.constexpr, LINES: tl.constexpr, PANEL: tl.constexpr, EXHAUSTED: tl.constexpr,
):  # fmt: skip
    """The choices ``begin`` to ``end`` of one group, block by block of its tokens; what changes lies in scratch memory.

    The t-th choice of a panel reads the t rows of the Cholesky factor above, through one multiprocessor's path to the
    L2 cache, which bounds the time: PANEL n / 2 numbers per choice. Without panels it would be k n / 2. A program that
    spans the device would have to wait for all its parts in every step.
    """
    group = tl.program_id(0).to(tl.int64)
    similar += group * group_stride
    level += group * n
    left += group * n
    last += group * n
    width = tl.cdiv(n, BLOCK) * BLOCK  # of the factor's rows, so that all begin where wide loads can
    factor += group * PANEL * width
    chosen += group * k
    for step in range(begin, end):
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        place = tl.full((BLOCK,), 0, tl.int32) + n
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            remains = tl.load(left + at, mask=inside, other=0.0)
            live = remains > EXHAUSTED
            gain = tl.log(tl.where(live, remains, 1.0)) + tl.load(level + at, mask=inside & live, other=0.0)
            gain = tl.where(live, gain, tl.load(last + at, mask=inside, other=float("-inf")))
            better = gain > best  # strictly: the earlier block wins ties
            best = tl.where(better, gain, best)
            place = tl.where(better, at, place)
        index = tl.min(tl.where(best == tl.max(best, 0), place, n), 0)
        tl.store(chosen + step, index.to(tl.int64))
        own = tl.load(left + index)
        live = own > EXHAUSTED
        inverse = tl.where(live, 1.0 / tl.sqrt_rn(tl.where(live, own, 1.0)), 0.0)
        above = tl.where(live, step - begin, 0)  # nothing is left of any token: nothing to be made orthogonal
        tl.debug_barrier()  # all have read what one of them changes now
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            row = tl.load(similar + index.to(tl.int64) * row_stride + at, mask=inside, other=0.0)
            for first in range(0, above, LINES):
                for offset in tl.static_range(LINES):
                    line = factor + (first + offset) * width
                    # One mask per line, not per token, lets all lines be loaded at once, 16 bytes at a time.
                    known = tl.full((BLOCK,), 0, tl.int32) + (first + offset) < above
                    row -= tl.load(line + index) * tl.load(line + at, mask=known, other=0.0)
            found = row * inverse
            tl.store(factor + (step - begin) * width + at, found, mask=inside)
            remains = tl.load(left + at, mask=inside, other=0.0) - found * found
            tl.store(left + at, tl.where(at == index, 0.0, remains), mask=inside)
        tl.store(last + index, float("-inf"))
        tl.debug_barrier()  # the next step reads what other threads wrote


_SIZES = ("n", "k", "begin", "end", "group_stride", "row_stride")
_CHOOSE = {
    block: kernel(Config(warps=warps, meta={"BLOCK": block}), sizes=_SIZES)(_choose)
    for block, warps in ((1024, 8), (2048, 8))
}


def greedy_dpp_triton(features: torch.Tensor, log_quality: torch.Tensor, k: int) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.greedy_dpp`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_groups("features", features)
    groups, n = features.shape[:2]
    require_dtype(FLOATS, log_quality=log_quality)
    require_same_device(features=features, log_quality=log_quality)
    require_shape((groups, n), log_quality=log_quality)
    require_choices(groups, n, k)
    chosen = torch.empty(groups, k, dtype=torch.int64, device=features.device)
    if not chosen.numel():
        return chosen
    log_quality = log_quality.contiguous()
    similar, scale = inner_products(features)
    directed = similar.diagonal(dim1=-2, dim2=-1) > 0  # a row of zeros has no direction
    if scale is not None:
        directed &= scale > 0
        similar.mul_(scale[:, :, None]).mul_(scale[:, None, :])
        similar.nan_to_num_(0.0)  # rows that hold no finite numbers
    level = 2 * log_quality.float()
    left = (directed & level.isfinite()).float()  # exactly one, so that equal tokens tie
    last = below_everything(log_quality)
    block = min(power_of_two(n, min(_CHOOSE)), max(_CHOOSE))
    # Zeros, since what lies behind the last row and token is read, too, and multiplied by zero.
    factor = torch.zeros(groups, PANEL, blocks(n, block) * block, dtype=torch.float32, device=features.device)
    for begin in range(0, k, PANEL):
        end = min(begin + PANEL, k)
        _CHOOSE[block].launch(
            (groups,), similar, level, left, last, factor, chosen, n, k, begin, end, *similar.stride()[:2],
            LINES=8, PANEL=PANEL, EXHAUSTED=EXHAUSTED,
        )  # fmt: skip
        if end < k:
            for each, rows in zip(similar, factor[..., :n], strict=True):  # one by one: a batch equals its groups
                each.addmm_(rows.T, rows, alpha=-1)
    return chosen


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every launch there is, for ``make kernels-compile``."""

    def call(n: int) -> Callable[[], object]:
        # Without memory: nothing is computed where nothing is launched.
        features, quality = torch.empty(1, n, 8, device="meta"), torch.empty(1, n, device="meta")
        return lambda: greedy_dpp_triton(features, quality, PANEL)

    for n in (577, 2880, 2**16):  # the last one's groups lie further apart than 32 bits tell
        yield f"{n} tokens", call(n)
