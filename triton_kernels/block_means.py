"""Means of blocks of tokens: the update of k-means, and the mean query, key or value of a block.

A program adds up the rows of one block, one tile after the other, so that a result does not depend on how programs
are scheduled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ._heads import group_strides, require_launchable, require_shared, require_tokens
from ._launch import (
    FLOATS,
    Config,
    kernel,
    power_of_two,
    require_dtype,
    require_int32,
    require_same_device,
    require_shape,
    tl,
)

TILE = 2**13
"""Elements that a program adds at a time."""


def block_means_reference(
    values: torch.Tensor, order: torch.Tensor | None, sizes: torch.Tensor, otherwise: torch.Tensor | None
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.block_means`."""
    batch, heads, length, width = values.shape
    clusters, device = sizes.shape[-1], values.device
    ends = ends_of(sizes, length).expand(batch, heads, clusters).contiguous()
    place = torch.arange(length, device=device).expand(batch, heads, length).contiguous()
    block = torch.searchsorted(ends, place, right=True)  # rows behind the last block go to one more, left out below
    if order is not None:
        block = torch.empty_like(block).scatter_(-1, order.long().expand(batch, heads, length), block)
    group = torch.arange(batch * heads, device=device).view(batch, heads, 1)
    sums = torch.zeros(batch * heads * (clusters + 1), width, device=device)
    sums.index_add_(0, (block + group * (clusters + 1)).flatten(), values.float().reshape(-1, width))
    sums = sums.view(batch, heads, clusters + 1, width)[:, :, :clusters]
    counts = ends.diff(dim=-1, prepend=ends.new_zeros(batch, heads, 1))[..., None]
    rest = torch.zeros((), device=device) if otherwise is None else otherwise.float()
    return torch.where(counts > 0, sums / counts.clamp_min(1), rest)


def ends_of(sizes: torch.Tensor, length: int) -> torch.Tensor:
    """Int64 places behind the last row of every block; none lies behind the last of the rows."""
    return sizes.clamp_min(0).cumsum(-1).clamp_max(length)


def require_blocks(
    values: torch.Tensor, order: torch.Tensor | None, sizes: torch.Tensor, otherwise: torch.Tensor | None
) -> None:
    """Refuse what neither half can average.

    Raises:
        KernelInputError: Shapes, element types or devices.
    """
    require_tokens(values=values)
    require_same_device(values=values, order=order, sizes=sizes, otherwise=otherwise)
    batch, heads, length, width = values.shape
    require_shared(batch, heads, None, sizes=sizes)
    if order is not None:
        require_shared(batch, heads, length, order=order)
    if otherwise is not None:
        require_shape((batch, heads, sizes.shape[2], width), otherwise=otherwise)
        require_dtype((torch.float32,), otherwise=otherwise)


# One configuration: another tile, and with it another order of adding, would give other last bits.
# fmt: off
@kernel(Config(warps=4), sizes=("clusters", "heads"))
def _means(
    values, order, ends, otherwise, means, clusters, heads, width, sample_stride, head_stride, row_stride,
    order_sample, order_head, ends_sample, ends_head, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    # fmt: on
    """The mean of one block of one head."""
    block = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    sample = group // heads
    head = group % heads
    values += sample * sample_stride + head * head_stride
    ends += sample * ends_sample + head * ends_head
    begin = tl.load(ends + block - 1, mask=block > 0, other=0)
    end = tl.load(ends + block)
    channel = tl.arange(0, WIDTH)
    known = channel < width
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, end, ROWS):
        at = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = at < end
        if order is not None:
            at = tl.load(order + sample * order_sample + head * order_head + at, mask=inside, other=0).to(tl.int64)
        cells = inside[:, None] & known[None, :]
        sums += tl.load(values + at[:, None] * row_stride + channel[None, :], mask=cells, other=0.0).to(tl.float32)
    count = end - begin
    mean = tl.sum(sums, 0) / tl.maximum(count, 1).to(tl.float32)
    cell = (group * clusters + block) * width + channel
    if otherwise is not None:
        mean = tl.where(count > 0, mean, tl.load(otherwise + cell, mask=known, other=0.0))
    tl.store(means + cell, mean, mask=known)


def block_means_triton(
    values: torch.Tensor, order: torch.Tensor | None, sizes: torch.Tensor, otherwise: torch.Tensor | None
) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.block_means`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype(FLOATS, values=values)
    require_blocks(values, order, sizes, otherwise)
    require_launchable(values, order=order, sizes=sizes, otherwise=otherwise)
    batch, heads, length, width = values.shape
    clusters = sizes.shape[2]
    require_int32(clusters=clusters)
    means = torch.empty(batch, heads, clusters, width, dtype=torch.float32, device=values.device)
    if not means.numel():
        return means
    ends = ends_of(sizes, length).int().contiguous()
    whole = power_of_two(width, 16)
    _means.launch(
        (clusters, batch * heads),
        *(values, order, ends, None if otherwise is None else otherwise.contiguous(), means),
        *(clusters, heads, width, *values.stride()[:3]),
        *((0, 0) if order is None else group_strides(order)),
        *group_strides(ends),
        ROWS=max(TILE // whole, 1),
        WIDTH=whole,
    )
    return means


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    sizes, order = torch.full((1, 2, 10), 30, dtype=torch.int32), torch.zeros(1, 2, 300, dtype=torch.int32)
    for dtype in FLOATS:
        for width in (16, 64, 128):
            values, otherwise = torch.zeros(1, 2, 300, width, dtype=dtype), torch.zeros(1, 2, 10, width)
            yield f"{width} wide, {dtype}, k-means", partial(block_means_triton, values, order, sizes, otherwise)
            yield f"{width} wide, {dtype}, in order", partial(block_means_triton, values, None, sizes, None)
