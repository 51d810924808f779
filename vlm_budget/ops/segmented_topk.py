"""Exact top-k per segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import KernelInputError
from ..transfer import counts_on, moved
from ..triton_kernels.segmented_topk import require_segments, segmented_topk_reference, segmented_topk_triton
from .dispatch import mode, operator, runs_kernel


@operator("segmented_topk")
def _operator(scores: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
    require_segments(scores, segment, counts, total)
    ranked = scores.is_floating_point() or mode() == "triton"  # the reference ranks whole numbers, too
    run = segmented_topk_triton if ranked and runs_kernel(scores) else segmented_topk_reference
    return run(scores, segment, counts, total)


@_operator.register_fake
def _fake(scores: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
    return scores.new_empty(total, dtype=torch.int64)


def segmented_topk(
    scores: torch.Tensor, segment: torch.Tensor, counts: Sequence[int] | torch.Tensor, total: int | None = None
) -> torch.Tensor:
    """The highest scores of every segment, with a count of its own per segment.

    Args:
        scores: [n] scores; ties go to the lower index, not-a-number counts as the highest.
        segment: [n] int64 or int32, the segment of each score; entries below 0 belong to none and are never taken. Like
            ``counts`` it is brought to the device of the scores.
        counts: How many to take from each segment; at most as many as it has. A list, or [S] int64 or int32, which the
            host then does not read where they are on the device of the scores.
        total: Their sum; needed where ``counts`` is a tensor.

    Returns:
        [total] int64 ascending indices into ``scores``, on their device; -1 at the end where the counts on the device
        add up to less than promised, or ask for more than a segment has.

    Raises:
        KernelInputError: Counts that the scores cannot meet, as far as the host knows them; ``total`` missing.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    device = scores.device
    if not isinstance(counts, torch.Tensor):
        counts = [int(count) for count in counts]
        if counts and min(counts) < 0:
            raise KernelInputError(f"counts must be at least 0, got {counts}")
        total = sum(counts)
        counts = counts_on(device, counts)
    elif total is None:
        raise KernelInputError("counts on the device need total=, their sum: it is the length of what is returned")
    if not 0 <= total <= scores.numel():
        raise KernelInputError(f"cannot take {total} of {scores.numel()} scores")
    kept: torch.Tensor = _operator(scores, moved(segment, device), moved(counts, device), total)
    return kept
