"""Weighted sums of tokens, without the matrix of weights: by lists of neighbours, or by owner.

One program sums some channels of one output, or of a part of it where there are few outputs; nothing is added
atomically, so the result does not depend on who is first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import embedding_bag

from ._launch import (
    FLOATS,
    Config,
    blocks,
    kernel,
    power_of_two,
    require_dtype,
    require_int32,
    require_rows,
    require_same_device,
    require_shape,
    tl,
)
from .softmax_merge import softmax_merge_reference as softmax_merge_reference
from .softmax_merge import softmax_merge_triton as softmax_merge_triton

ROWS = 32
CHANNELS = 128
"""Rows and channels that are summed at a time."""
PROGRAMS = 512
"""As many as keep a device busy: fewer outputs are summed in parts."""


# --- references ------------------------------------------------------------------------------------------------------


def weighted_merge_reference(values: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.weighted_merge`."""
    real = index >= 0
    ends = real.sum(1).cumsum(0)
    return _summed(values, index[real], weights[real], ends - real.sum(1))


def assigned_merge_reference(
    values: torch.Tensor, owner: torch.Tensor, weights: torch.Tensor, count: int, among: torch.Tensor
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.assigned_merge`."""
    sorted_owner, order = owner.sort(stable=True)
    owners = torch.arange(count + 1, device=owner.device)
    starts = torch.searchsorted(sorted_owner, owners)
    order = order[starts[0] : starts[-1]]
    return _summed(values, among[order], weights[order], (starts - starts[0])[:-1])


def _summed(values: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Weighted sums of runs of rows, in float32 or wider."""
    wide = values if values.dtype == torch.float64 else values.float()
    if not len(starts) or not len(rows) or not values.shape[1]:
        return values.new_zeros(len(starts), values.shape[1])
    summed = embedding_bag(rows, wide, starts, mode="sum", per_sample_weights=weights.to(wide.dtype))
    return summed.to(values.dtype)


# --- kernels ---------------------------------------------------------------------------------------------------------


# One configuration: how the rows of a tile are spread over warps says in which order tl.sum adds them, so a choice by
# timing would change the last bits of a sum.
@kernel(Config(warps=4), sizes=("count", "parts"))
def _sums(
    values,
    index,
    weights,
    starts,
    order,
    out,
    count,
    parts,
    width,
    stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A part of one output: of a row of ``index``, or of what stands in ``order`` between two ``starts``."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < width
    if starts is None:
        begin = row * count
        end = begin + count
    else:
        begin = tl.load(starts + row)
        end = tl.load(starts + row + 1)
    summed = tl.zeros((ROWS, CHANNELS), tl.float32)
    part = tl.program_id(2)
    for first in range(begin + part * ROWS, end, parts * ROWS):
        at = first + tl.arange(0, ROWS)
        inside = at < end
        if order is not None:
            at = tl.load(order + at, mask=inside, other=0)
        token = tl.load(index + at, mask=inside, other=-1)
        weight = tl.load(weights + at, mask=inside & (token >= 0), other=0.0)
        mask = (token >= 0)[:, None] & known[None, :]
        value = tl.load(values + token[:, None] * stride + channel[None, :], mask=mask, other=0.0)
        summed += weight[:, None] * value.to(tl.float32)
    total = tl.sum(summed, 0)
    place = out + (part * tl.num_programs(0).to(tl.int64) + row) * width + channel
    tl.store(place, total.to(out.dtype.element_ty), mask=known)


# --- wrappers --------------------------------------------------------------------------------------------------------


def _summing(
    values: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor | None,
    order: torch.Tensor | None,
    outputs: int,
    count: int,
) -> torch.Tensor:
    """Launch, for ``outputs`` of which the largest may have ``count`` rows."""
    width = values.shape[1]
    channels = min(CHANNELS, power_of_two(width, 16))
    programs = outputs * blocks(width, channels)
    parts = min(blocks(PROGRAMS, max(programs, 1)), max(blocks(count, ROWS), 1))
    dtype = values.dtype if parts == 1 else torch.float32
    out = torch.empty(parts, outputs, width, dtype=dtype, device=values.device)
    if out.numel():
        _sums.launch(
            (outputs, blocks(width, channels), parts),
            values,
            index,
            weights,
            starts,
            order,
            out,
            count,
            parts,
            width,
            values.stride(0),
            ROWS=ROWS,
            CHANNELS=channels,
        )
    return out[0] if parts == 1 else out.sum(0).to(values.dtype)


def weighted_merge_triton(values: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.weighted_merge`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype(FLOATS, values=values)
    require_dtype((torch.float32,), weights=weights)
    require_dtype((torch.int64,), index=index)
    require_same_device(values=values, index=index, weights=weights)
    require_shape((None, None), values=values, index=index)
    require_shape(tuple(index.shape), weights=weights)
    require_rows(values=values)
    require_int32(tokens=len(values), width=values.shape[1], outputs=len(index), count=index.shape[1])
    return _summing(values, index.contiguous(), weights.contiguous(), None, None, *index.shape)


def assigned_merge_triton(
    values: torch.Tensor, owner: torch.Tensor, weights: torch.Tensor, count: int, among: torch.Tensor
) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.assigned_merge`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype(FLOATS, values=values)
    require_dtype((torch.float32,), weights=weights)
    require_dtype((torch.int64,), owner=owner, among=among)
    require_same_device(values=values, owner=owner, weights=weights, among=among)
    require_shape((None, None), values=values)
    require_int32(tokens=len(values), width=values.shape[1], members=owner.numel(), count=count)
    require_shape((owner.numel(),), owner=owner, weights=weights, among=among)
    require_rows(values=values, owner=owner, weights=weights, among=among)
    # The host does not learn how many belong to whom: those without an owner stand in front of the first start.
    sorted_owner, order = owner.sort(stable=True)
    starts = torch.searchsorted(sorted_owner, torch.arange(count + 1, device=owner.device))
    return _summing(values, among, weights, starts, order, count, len(among))


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    index, owner, among = torch.zeros(5, 33, dtype=torch.long), torch.arange(64), torch.arange(64)
    weights = torch.ones(64)
    for dtype in FLOATS:
        values = torch.zeros(64, 1024, dtype=dtype)
        for some, rows in (("few", index), ("many", index.repeat(100, 1))):
            yield f"{some} lists, {dtype}", partial(weighted_merge_triton, values, rows, torch.ones(rows.shape))
        for count in (5, 500):
            yield f"{count} owners, {dtype}", partial(assigned_merge_triton, values, owner, weights, count, among)
