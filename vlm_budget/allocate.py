"""Exact integer shares: who gets how many tokens when a total is split.

Every split in the library goes through :func:`split`, so that a promised count is a kept count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import BudgetError


def split(total: int, weights: Sequence[float], caps: Sequence[int], floors: Sequence[int] | None = None) -> list[int]:
    """Split ``total`` in proportion to ``weights`` by largest remainder, within caps and floors, exactly.

    Shares outside their bounds are set to them, and the rest is poured over the others in proportion to their weights,
    until all fit: every share is within one of its clamped proportion. Zero weights get their floor, and what is left
    once every share of positive weight is full. Equal remainders go to the earlier share, so the result depends on
    nothing but the arguments.

    Args:
        total: Whole units to give away.
        weights: Finite and non-negative; all zero means "in proportion to the caps".
        caps: The most each share can take.
        floors: The least each share must get (default 0).

    Returns:
        One int per weight, summing to ``total``, with ``floors[i] <= share[i] <= caps[i]``.

    Raises:
        BudgetError: ``total`` lies outside [sum(floors), sum(caps)].
        ValueError: Lengths differ, or a weight, floor or cap is not usable.
    """
    total, caps = int(total), [int(cap) for cap in caps]
    weights = [float(w) for w in weights]
    lows = [0] * len(weights) if floors is None else [int(low) for low in floors]
    if not len(weights) == len(caps) == len(lows):
        raise ValueError(f"weights, caps and floors must match: {len(weights)}, {len(caps)}, {len(lows)}")
    if any(not math.isfinite(w) or w < 0 for w in weights):
        raise ValueError(f"weights must be finite and non-negative, got {weights}")
    if any(low < 0 or low > cap for low, cap in zip(lows, caps, strict=True)):
        raise ValueError(f"need 0 <= floor <= cap, got floors {lows} and caps {caps}")
    if not sum(lows) <= total <= sum(caps):
        raise BudgetError(
            f"cannot split {total} tokens: the shares take between {sum(lows)} and {sum(caps)}. "
            f"The nearest feasible total is {min(max(total, sum(lows)), sum(caps))}."
        )
    shares = list(lows)
    heavy = [i for i, w in enumerate(weights) if w > 0]
    light = [i for i, w in enumerate(weights) if w == 0]
    room = total - sum(lows[i] for i in light)
    _pour(min(room, sum(caps[i] for i in heavy)), heavy, _whole_numbers(weights), lows, caps, shares)
    _pour(total - sum(shares[i] for i in heavy), light, caps, lows, caps, shares)
    return shares


def _pour(
    total: int, open_: list[int], weights: list[int], lows: list[int], caps: list[int], shares: list[int]
) -> None:
    """Fill ``shares[open_]`` with ``total``, in proportion to ``weights`` where the bounds allow it."""
    while whole := sum(weights[i] for i in open_):
        # Integers throughout: a share's proportion is part[i] / whole, and ties are ties on every machine.
        part = {i: total * weights[i] for i in open_}
        over = {i: part[i] - caps[i] * whole for i in open_ if part[i] > caps[i] * whole}
        under = {i: lows[i] * whole - part[i] for i in open_ if part[i] < lows[i] * whole}
        if not over and not under:
            break
        # The side that bends the total more is final: pinning the other cannot bring it back within its bounds.
        pinned, bounds = (over, caps) if sum(over.values()) >= sum(under.values()) else (under, lows)
        for i in pinned:
            shares[i] = bounds[i]
            total -= bounds[i]
        open_ = [i for i in open_ if i not in pinned]
    if whole:
        for i in open_:
            shares[i] = part[i] // whole
        by_remainder = sorted(open_, key=lambda i: -(part[i] % whole))  # stable: ties to the earlier
        for i in by_remainder[: total - sum(shares[i] for i in open_)]:
            shares[i] += 1


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Integers in the same proportion: every float is a whole number of some power of two."""
    ratios = [w.as_integer_ratio() for w in weights]
    finest = max((below for _, below in ratios), default=1)
    return [above * (finest // below) for above, below in ratios]
