"""Exact top-k of every segment, each segment with a count of its own that may live on the device.

A segment is what a budget was split over: an image, a crop, a frame. Two launches: one program per segment finds its
k-th largest score by radix selection, and where among the equal ones it ends; then one program walks over all scores
and writes the positions of those that stay, in order. Nothing is sorted, and the host is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from vlm_budget.errors import KernelInputError

from ._launch import (
    FLOATS,
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

BLOCK = 1024
"""Scores read at a time."""


def segmented_topk_reference(
    scores: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, total: int
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.segmented_topk`."""
    segment = torch.where(segment < len(counts), segment.long(), -1).clamp_min(-1)
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[segment[by_score].argsort(stable=True)]
    grouped = segment[order] + 1  # those that belong nowhere come first
    size = torch.zeros(len(counts) + 1, dtype=torch.long, device=scores.device)
    size.scatter_add_(0, grouped, torch.ones_like(grouped))
    start = size.cumsum(0) - size
    rank = torch.arange(len(order), device=scores.device) - start[grouped]
    quota = torch.cat([counts.new_zeros(1, dtype=torch.long), counts.long()])
    taken = torch.zeros(len(order), dtype=torch.bool, device=scores.device)
    taken.scatter_(0, order, rank < quota[grouped])
    slot = torch.where(taken, taken.cumsum(0) - 1, total).clamp_max(total)  # behind the last slot: not returned
    kept = scores.new_full((total + 1,), -1, dtype=torch.long)
    return kept.scatter_(0, slot, torch.arange(len(order), device=scores.device))[:total]


@device_function
def _sortable(scores):
    """Unsigned numbers in the order of float32 scores; equal where they are equal, not-a-number above all."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # minus zero equals zero
    bits = scores.to(tl.uint32, bitcast=True)
    ordered = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(scores != scores, 0xFFFFFFFF, ordered).to(tl.uint32)


@kernel(Config(warps=4), sizes=("n",))
def _thresholds(scores, segment, counts, thresholds, cutoffs, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """The k-th largest score of one segment, and the position of the last of its equals that still belongs."""
    own = tl.program_id(0)
    k = tl.minimum(tl.maximum(tl.load(counts + own), 0), n).to(tl.int32)
    bins = tl.arange(0, BINS)
    prefix = tl.zeros((), tl.uint32)  # the digits of the k-th largest found so far, where ``known`` has ones
    known = tl.zeros((), tl.uint32)
    left = k  # how many are still to be found among the scores that begin with them
    for digit in range(0, 4):
        shift = 24 - 8 * digit
        counted = tl.zeros((BINS,), tl.int32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            key = _sortable(tl.load(scores + at.to(tl.int64), mask=inside, other=0.0).to(tl.float32))
            mine = tl.load(segment + at.to(tl.int64), mask=inside, other=-1) == own
            mine = mine & (((key ^ prefix) & known) == 0)
            bin_of = tl.where(mine, (key >> shift) & 0xFF, BINS - 1).to(tl.int32)
            counted += tl.histogram(bin_of, BINS)
            counted -= tl.where(bins == BINS - 1, tl.sum((~mine).to(tl.int32), 0), 0)
        above = tl.sum(counted, 0) - tl.cumsum(counted, 0)  # scores in higher bins
        here = (above < left) & (above + counted >= left)
        # Too few in all: every one stays, from the lowest on.
        found = tl.maximum(tl.max(tl.where(here, bins, -1), 0), 0)
        left -= tl.sum(tl.where(bins == found, above, 0), 0)
        prefix = prefix | (found.to(tl.uint32) << shift)
        known = known | (tl.full((), 0xFF, tl.uint32) << shift)
    cutoff = tl.full((), -1, tl.int32)
    seen = tl.zeros((), tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        key = _sortable(tl.load(scores + at.to(tl.int64), mask=inside, other=0.0).to(tl.float32))
        equal = (tl.load(segment + at.to(tl.int64), mask=inside, other=-1) == own) & (key == prefix)
        rank = seen + tl.cumsum(equal.to(tl.int32), 0)
        cutoff = tl.maximum(cutoff, tl.max(tl.where(equal & (rank <= left), at, -1), 0))
        seen += tl.sum(equal.to(tl.int32), 0)
    # Without a count nothing lies above the highest key, and nothing equals it before position 0.
    tl.store(thresholds + own, tl.where(k > 0, prefix, 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True))
    tl.store(cutoffs + own, tl.where(k > 0, cutoff, -1))


@kernel(Config(warps=8), sizes=("n", "segments", "total"))
def _positions(scores, segment, thresholds, cutoffs, kept, n, segments, total, BLOCK: tl.constexpr):
    """Positions of the scores that stay, ascending; what is left of the slots is -1."""
    written = tl.zeros((), tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        key = _sortable(tl.load(scores + at.to(tl.int64), mask=inside, other=0.0).to(tl.float32))
        own = tl.load(segment + at.to(tl.int64), mask=inside, other=-1)
        known = (own >= 0) & (own < segments)
        least = tl.load(thresholds + own, mask=known, other=-1).to(tl.uint32, bitcast=True)
        until = tl.load(cutoffs + own, mask=known, other=-1)
        stays = known & ((key > least) | ((key == least) & (at <= until)))
        slot = written + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(kept + slot, at.to(tl.int64), mask=stays & (slot < total))
        written += tl.sum(stays.to(tl.int32), 0)
    for start in range(0, total, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(kept + slot, tl.full((BLOCK,), -1, tl.int64), mask=(slot >= written) & (slot < total))


def require_segments(scores: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, total: int) -> None:
    """Refuse what neither half can rank.

    Raises:
        KernelInputError: Shapes, devices, sizes, or whole numbers that are none.
    """
    require_dtype((torch.int64, torch.int32), segment=segment, counts=counts)
    require_same_device(scores=scores, segment=segment, counts=counts)
    require_shape((None,), scores=scores, counts=counts)
    n, segments = scores.numel(), counts.numel()
    require_int32(scores=n, segments=segments, total=total)
    if segment.shape != scores.shape:
        raise KernelInputError(f"segment must name one segment per score, got {list(segment.shape)} for {n} scores")


def segmented_topk_triton(
    scores: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, total: int
) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.segmented_topk`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype(FLOATS, scores=scores)
    require_segments(scores, segment, counts, total)
    require_rows(scores=scores, segment=segment, counts=counts)
    n, segments = scores.numel(), counts.numel()
    kept = torch.empty(total, dtype=torch.int64, device=scores.device)
    if not total:
        return kept
    thresholds = torch.empty(max(segments, 1), dtype=torch.int32, device=scores.device)
    cutoffs = torch.empty_like(thresholds)
    if segments:
        _thresholds.launch((segments,), scores, segment, counts, thresholds, cutoffs, n, BLOCK=BLOCK, BINS=256)
    _positions.launch((1,), scores, segment, thresholds, cutoffs, kept, n, segments, total, BLOCK=BLOCK)
    return kept


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    counts = torch.ones(5, dtype=torch.int32)
    for dtype, whole in ((torch.float32, torch.int64), (torch.float32, torch.int32), (torch.bfloat16, torch.int64)):
        scores, segment = torch.zeros(2880, dtype=dtype), torch.zeros(2880, dtype=whole)
        call = partial(segmented_topk_triton, scores, segment, counts, 5)
        yield f"{dtype} scores, {whole} segments", call
