"""Operations that methods share, each with one meaning on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def segmented_topk(scores: torch.Tensor, segment: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The highest scores of every segment, with a count of its own per segment.

    Args:
        scores: [n] scores; ties go to the lower index.
        segment: [n] int64 segment of each score; entries below 0 belong to none and are never taken.
        counts: How many to take from each segment; at most as many as it has.

    Returns:
        [sum(counts)] int64 ascending indices into ``scores``.
    """
    segment = segment.to(scores.device)
    by_score = scores.argsort(descending=True, stable=True)
    order = by_score[segment[by_score].argsort(stable=True)]
    grouped = segment[order]
    size = torch.bincount(segment + 1, minlength=len(counts) + 1)
    start = size.cumsum(0) - size
    rank = torch.arange(len(order), device=scores.device) - start[grouped + 1]
    quota = torch.tensor([0, *counts], device=scores.device)
    return order[rank < quota[grouped + 1]].sort().values
