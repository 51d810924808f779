"""Figures of a few clips with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

_DIGITS = 5


def of_clips(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation, least and greatest of one figure per clip, and the figures."""
    finite = [value for value in values if math.isfinite(value)]
    return {
        "mean": round(statistics.fmean(finite), _DIGITS) if finite else None,
        "sd": round(statistics.stdev(finite), _DIGITS) if len(finite) > 1 else None,
        "min": round(min(finite), _DIGITS) if finite else None,
        "max": round(max(finite), _DIGITS) if finite else None,
        "clips": [round(value, _DIGITS) if math.isfinite(value) else None for value in values],
    }


def of_pairs(ours: Sequence[float | None], others: Sequence[float | None]) -> dict[str, Any]:
    """Differences clip by clip: as :func:`of_clips`, with the standard error and how many are above 0."""
    both = [a - b for a, b in zip(ours, others, strict=True) if a is not None and b is not None]
    found = of_clips(both)
    spread = found["sd"]
    return {
        **found,
        "se": None if spread is None else round(spread / math.sqrt(len(both)), _DIGITS),
        "above": sum(difference > 0 for difference in both),
    }
