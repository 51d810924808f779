"""Weighted sums of tokens, without the matrix of weights: by lists of neighbours, by owner, or by a softmax.

By neighbours and by owner, one program sums some channels of one output, or of a part of it where there are few
outputs; nothing is added atomically, so the result does not depend on who is first. The softmax recomputes the cosines
tile by tile. They cannot exceed an anchor's cosine with itself, which is subtracted instead of a running maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import embedding_bag, normalize

from vlm_budget.errors import KernelInputError

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
from .nearest import ENTRIES, channel_block, cosines, norms, product

ROWS = 32
CHANNELS = 128
"""Rows and channels that are summed at a time."""
PROGRAMS = 512
"""As many as keep a device busy: fewer outputs are summed in parts."""
ANCHORS = 16
TOKENS = 64
VALUES = 128
"""Tile of the softmax: anchors, tokens, and channels of the values."""


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


def softmax_merge_reference(
    values: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    temperature: float,
    among: torch.Tensor,
    self_weight: float,
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.softmax_merge`."""
    wide = values if values.dtype == torch.float64 else values.float()
    mixed = [wide[:0]]
    for own in anchors.split(max(1, ENTRIES // max(len(among), 1))):
        cosine = normalize(keys[own].float(), dim=-1) @ normalize(keys[among].float(), dim=-1).T
        softmax = (cosine / temperature).softmax(-1).to(wide.dtype)
        mixed.append((1 - self_weight) * (softmax @ wide[among]) + self_weight * wide[own])
    return torch.cat(mixed).to(values.dtype)


# --- kernels ---------------------------------------------------------------------------------------------------------


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


@kernel(Config(warps=4, stages=3), sizes=("count", "n"))
def _softmax(
    values,
    keys,
    lengths,
    anchors,
    among,
    out,
    count,
    n,
    scale,
    self_weight,
    width,
    stride,
    key_width,
    key_stride,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of outputs: softmax over all tokens, and the sum of some channels of their values."""
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = slot < count
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < width
    anchor = tl.load(anchors + slot, mask=real, other=0)
    length = tl.load(lengths + anchor, mask=real, other=0.0)
    itself = length / tl.maximum(length, 1e-12)
    itself = itself * itself  # 1, or 0 of a key of length 0
    mixed = tl.zeros((TILE, CHANNELS), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        token = tl.load(among + at, mask=inside, other=0)
        cosine = cosines(keys, lengths, anchor, token, real, inside, key_width, key_stride, TILE, BLOCK, BLOCK_C, WIDEN)
        share = tl.exp2((cosine - itself[:, None]) * scale)
        share = tl.where(inside[None, :], share, 0.0)
        total += tl.sum(share, 1)
        value = tl.load(
            values + token[:, None] * stride + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        mixed = product(share.to(value.dtype), value, mixed, WIDEN)
    mask = real[:, None] & known[None, :]
    own = tl.load(values + anchor[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    result = (1 - self_weight) * (mixed / total[:, None]) + self_weight * own
    place = out + slot.to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=mask)


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


def softmax_merge_triton(
    values: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    temperature: float,
    among: torch.Tensor,
    self_weight: float,
) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.softmax_merge`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype(FLOATS, values=values, keys=keys)
    require_dtype((torch.int64,), anchors=anchors, among=among)
    require_same_device(values=values, keys=keys, anchors=anchors, among=among)
    require_shape((None, None), values=values, keys=keys)
    n, width = values.shape
    require_int32(tokens=n, width=width, key_width=keys.shape[1], anchors=anchors.numel(), among=among.numel())
    require_shape((n, None), keys=keys)
    require_shape((anchors.numel(),), anchors=anchors)
    require_shape((among.numel(),), among=among)
    require_rows(values=values, keys=keys, anchors=anchors, among=among)
    if not len(among) and len(anchors):
        raise KernelInputError("there are no tokens to mix: among is empty")
    out = torch.empty(len(anchors), width, dtype=values.dtype, device=values.device)
    if not out.numel():
        return out
    narrow = torch.float32 in (values.dtype, keys.dtype)  # no tensor cores: operands lie in registers
    channels = min(VALUES // 2 if narrow else VALUES, power_of_two(width, 16))
    _softmax.launch(
        (blocks(len(anchors), ANCHORS), blocks(width, channels)),
        values,
        keys,
        norms(keys),
        anchors,
        among,
        out,
        len(anchors),
        len(among),
        1.4426950408889634 / temperature,  # exp2
        self_weight,
        width,
        values.stride(0),
        keys.shape[1],
        keys.stride(0),
        TILE=ANCHORS,
        BLOCK=32 if narrow else TOKENS,
        BLOCK_C=channel_block(keys.dtype),
        CHANNELS=channels,
        WIDEN=_softmax.interpreted,
    )
    return out


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    index, owner, among = torch.zeros(5, 33, dtype=torch.long), torch.arange(64), torch.arange(64)
    weights = torch.ones(64)
    for dtype in FLOATS:
        values, keys = torch.zeros(64, 1024, dtype=dtype), torch.zeros(64, 1024, dtype=dtype)
        for some, rows in (("few", index), ("many", index.repeat(100, 1))):
            yield f"{some} lists, {dtype}", partial(weighted_merge_triton, values, rows, torch.ones(rows.shape))
        for count in (5, 500):
            yield f"{count} owners, {dtype}", partial(assigned_merge_triton, values, owner, weights, count, among)
        yield f"softmax, {dtype}", partial(softmax_merge_triton, values, keys, owner[:5], 0.1, among, 0.0)
    half, keys = torch.zeros(64, 1024, dtype=torch.bfloat16), torch.zeros(64, 1024)
    yield "softmax, float32 keys", partial(softmax_merge_triton, half, keys, owner[:5], 0.1, among, 0.0)
