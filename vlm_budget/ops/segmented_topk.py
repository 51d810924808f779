"""Exact top-k per segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import KernelInputError
from ..triton_kernels.segmented_topk import segmented_topk_reference, segmented_topk_triton
from .dispatch import runs_kernel


@torch.library.custom_op("vlm_budget::segmented_topk", mutates_args=())
def _operator(scores: torch.Tensor, segment: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
    run = segmented_topk_triton if runs_kernel(scores) else segmented_topk_reference
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
        segment: [n] int64 or int32, the segment of each score; entries below 0 belong to none and are never taken.
        counts: How many to take from each segment; at most as many as it has. A list, or [S] int64 or int32 on the
            device of the scores, which the host then does not read.
        total: Their sum; needed where ``counts`` is a tensor.

    Returns:
        [total] int64 ascending indices into ``scores``; -1 at the end where the counts on the device add up to less
        than promised, or ask for more than a segment has.

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
        counts = torch.tensor(counts, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
    elif total is None:
        raise KernelInputError("counts on the device need total=, their sum: it is the length of what is returned")
    if not 0 <= total <= scores.numel():
        raise KernelInputError(f"cannot take {total} of {scores.numel()} scores")
    kept: torch.Tensor = _operator(scores, segment.to(device, non_blocking=True), counts, total)
    return kept
