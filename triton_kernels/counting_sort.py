"""A stable order of tokens by cluster, in time that grows with the tokens alone.

Chunks of tokens are counted by cluster; a scan over the chunks says where the first token of each cluster of each chunk
goes; and a token goes as many places further as there are equal labels before it in its chunk. Counts are added with
atomics of whole numbers, whose sums do not depend on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from vlm_budget.errors import KernelInputError

from ._heads import MOST_GROUPS
from ._launch import Config, blocks, kernel, require_dtype, require_int32, require_rows, require_shape, tl

CHUNK = 1024
"""Tokens counted at a time: fewer cost memory, more cost comparisons within a chunk."""
TILE = 128
STEP = 32
"""Tokens of a program, and earlier ones that they are compared with at a time."""


def counting_sort_reference(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is right; see :func:`vlm_budget.ops.counting_sort`."""
    labels = labels.clamp(0, clusters - 1)
    order = labels.argsort(dim=-1, stable=True).int()
    sizes = labels.new_zeros(*labels.shape[:2], clusters)
    return order, sizes.scatter_add_(-1, labels.long(), torch.ones_like(labels))


def require_labels(labels: torch.Tensor, clusters: int) -> None:
    """Refuse what neither half can sort.

    Raises:
        KernelInputError: Shapes, element types or numbers of clusters.
    """
    require_shape((None, None, None), labels=labels)
    require_dtype((torch.int32,), labels=labels)
    require_int32(clusters=clusters)
    if clusters < 1:
        raise KernelInputError(f"clusters must be at least 1, got {clusters}")


@kernel(Config(warps=4), sizes=("length", "clusters", "chunks", "heads"))
def _counts(labels, counted, length, clusters, chunks, heads, sample_stride, head_stride, CHUNK: tl.constexpr):
    """How many tokens of one chunk each cluster has."""
    group = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = at < length
    label = tl.load(
        labels + (group // heads) * sample_stride + (group % heads) * head_stride + at, mask=inside, other=0
    )
    label = tl.minimum(tl.maximum(label, 0), clusters - 1)
    row = (group * chunks + tl.program_id(0)) * clusters
    tl.atomic_add(counted + row + label, tl.full((CHUNK,), 1, tl.int32), mask=inside, sem="relaxed")


@kernel(Config(warps=4), sizes=("clusters", "chunks"))
def _earlier(counted, sizes, clusters, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Counts of some clusters made those of all earlier chunks; and their totals."""
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < clusters
    counted += group * chunks * clusters
    total = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, chunks, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        cells = (row < chunks)[:, None] & known[None, :]
        at = counted + row[:, None] * clusters + column[None, :]
        count = tl.load(at, mask=cells, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=cells)
        total += tl.sum(count, 0)
    tl.store(sizes + group * clusters + column, total, mask=known)


@kernel(Config(warps=8), sizes=("length", "clusters", "chunks", "heads"))
def _placed(
    labels,
    earlier,
    ends,
    sizes,
    order,
    length,
    clusters,
    chunks,
    heads,
    sample_stride,
    head_stride,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of tokens written to their places."""
    group = tl.program_id(1).to(tl.int64)
    labels += (group // heads) * sample_stride + (group % heads) * head_stride
    lane = tl.arange(0, STEP)
    first = tl.program_id(0) * TILE
    chunk = first // CHUNK
    at = first + tl.arange(0, TILE)
    inside = at < length
    label = tl.load(labels + at, mask=inside, other=0)
    label = tl.minimum(tl.maximum(label, 0), clusters - 1)
    equal = tl.zeros((TILE, STEP), tl.int32)
    for start in range(chunk * CHUNK, first, STEP):
        before = tl.load(labels + start + lane)
        before = tl.minimum(tl.maximum(before, 0), clusters - 1)
        equal += (label[:, None] == before[None, :]).to(tl.int32)
    for start in range(first, first + TILE, STEP):
        own = start + lane
        before = tl.load(labels + own, mask=own < length, other=0)
        before = tl.minimum(tl.maximum(before, 0), clusters - 1)
        equal += ((label[:, None] == before[None, :]) & (own[None, :] < at[:, None])).to(tl.int32)
    rank = tl.sum(equal, 1)
    cluster = group * clusters + label
    place = tl.load(ends + cluster, mask=inside, other=0) - tl.load(sizes + cluster, mask=inside, other=0)
    place += tl.load(earlier + (group * chunks + chunk) * clusters + label, mask=inside, other=0)
    tl.store(order + group * length + place + rank, at, mask=inside)


def counting_sort_triton(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel; see :func:`vlm_budget.ops.counting_sort`.

    Raises:
        KernelInputError: Element types, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_labels(labels, clusters)
    require_rows(labels=labels)
    batch, heads, length = labels.shape
    chunks, groups = blocks(length, CHUNK), batch * heads
    require_int32(tokens=chunks * CHUNK, padded_clusters=clusters + 64)
    if groups > MOST_GROUPS:
        raise KernelInputError(f"the kernel takes up to {MOST_GROUPS} samples times heads, got {batch} times {heads}")
    order = torch.empty(labels.shape, dtype=torch.int32, device=labels.device)
    sizes = torch.empty(batch, heads, clusters, dtype=torch.int32, device=labels.device)
    if not order.numel():
        return order, sizes.zero_()
    counted = torch.zeros(groups, chunks, clusters, dtype=torch.int32, device=labels.device)
    numbers = (length, clusters, chunks, heads, *labels.stride()[:2])
    _counts.launch((chunks, groups), labels, counted, *numbers, CHUNK=CHUNK)
    _earlier.launch((blocks(clusters, 64), groups), counted, sizes, clusters, chunks, ROWS=32, COLUMNS=64)
    ends = sizes.cumsum(-1, dtype=torch.int32)
    tiles = blocks(length, TILE)
    _placed.launch((tiles, groups), labels, counted, ends, sizes, order, *numbers, CHUNK=CHUNK, TILE=TILE, STEP=STEP)
    return order, sizes


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    for length in (2880, 111):
        labels = torch.zeros(1, 2, length, dtype=torch.int32)
        yield f"{length} tokens", partial(counting_sort_triton, labels, 10)
