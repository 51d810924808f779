"""Temporal non-maximum suppression: of frames close in time, only the best."""

from __future__ import annotations

import numpy as np


def peaks(times: np.ndarray, scores: np.ndarray, within: float) -> np.ndarray:
    """Which frames have no better one close by.

    Args:
        times: [N] seconds, ascending.
        scores: [N].
        within: What is close, in seconds.

    Returns:
        [N] bool.
    """
    peak = np.ones(len(times), dtype=bool)
    for step in range(1, len(times)):
        near = times[step:] - times[:-step] <= within
        if not near.any():
            break
        peak[step:] &= ~(near & (scores[:-step] > scores[step:]))
        peak[:-step] &= ~(near & (scores[step:] > scores[:-step]))
    return peak


def spaced(times: np.ndarray, order: np.ndarray, keep: int, apart: float) -> list[int]:
    """The first frames of an order that stand ``apart`` seconds from each other.

    Where fewer than ``keep`` do, the distance is halved, and more are added, until there are enough.

    Args:
        times: [N] seconds.
        order: [N] places of the frames, best first.
        keep: Frames wanted.
        apart: Seconds.

    Returns:
        ``min(keep, N)`` places, best first.
    """
    kept: list[int] = []
    while len(kept) < min(keep, len(order)):
        free = np.ones(len(times), dtype=bool)
        for place in kept:
            free &= np.abs(times - times[place]) >= apart
        free[kept] = False
        for place in order.tolist():
            if len(kept) == keep:
                break
            if free[place]:
                kept.append(place)
                free &= np.abs(times - times[place]) >= apart
                free[place] = False
        apart = apart / 2 if apart > 1e-3 else 0.0
    return kept
