"""Figures of a few clips with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def of_clips(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation, least and greatest of one figure per clip, and the figures."""
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": statistics.fmean(finite) if finite else None,
        "sd": statistics.stdev(finite) if len(finite) > 1 else None,
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "clips": [value if math.isfinite(value) else None for value in values],
    }


def of_pairs(ours: Sequence[float | None], others: Sequence[float | None]) -> dict[str, Any]:
    """Differences clip by clip: as :func:`of_clips`, with the standard error and how many are above 0."""
    both = [a - b for a, b in zip(ours, others, strict=True) if a is not None and b is not None]
    found = of_clips(both)
    spread = found["sd"]
    return {
        **found,
        "se": None if spread is None else spread / math.sqrt(len(both)),
        "above": sum(difference > 0 for difference in both),
    }
