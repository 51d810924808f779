"""Exact integer shares: who gets how many tokens when a total is split.

Every split in the library goes through :func:`split`, so that a promised count is a kept count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import BudgetError


def split(total: int, weights: Sequence[float], caps: Sequence[int], floors: Sequence[int] | None = None) -> list[int]:
    """Split ``total`` in proportion to ``weights`` by largest remainder, within caps and floors, exactly.

    What a capped share cannot take is poured again over the others in proportion to their weights, until nothing is
    left. Once every share of positive weight is full, the rest goes to the zero weights. Equal remainders go to the
    earlier share, so the result depends on nothing but the arguments.

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
    n = len(weights)
    lows = [0] * n if floors is None else list(floors)
    if len(caps) != n or len(lows) != n:
        raise ValueError(f"weights, caps and floors must match: {n}, {len(caps)}, {len(lows)}")
    if any(not math.isfinite(w) or w < 0 for w in weights):
        raise ValueError(f"weights must be finite and non-negative, got {list(weights)}")
    if any(low < 0 or low > cap for low, cap in zip(lows, caps, strict=True)):
        raise ValueError(f"need 0 <= floor <= cap, got floors {lows} and caps {list(caps)}")
    if not sum(lows) <= total <= sum(caps):
        raise BudgetError(
            f"cannot split {total} tokens: the shares take between {sum(lows)} and {sum(caps)}. "
            f"The nearest feasible total is {min(max(total, sum(lows)), sum(caps))}."
        )
    shares = list(lows)
    live = [float(w) for w in weights] if any(w > 0 for w in weights) else [float(c) for c in caps]
    while (left := total - sum(shares)) > 0:
        open_ = [i for i in range(n) if shares[i] < caps[i]]
        pool = [i for i in open_ if live[i] > 0]
        if not pool:
            live = [float(c) for c in caps]
            continue
        for i, extra in zip(pool, _largest_remainder(left, [live[i] for i in pool]), strict=True):
            shares[i] = min(caps[i], shares[i] + extra)
    return shares


def _largest_remainder(total: int, weights: Sequence[float]) -> list[int]:
    # Scaling by the largest weight first keeps sums of huge or denormal weights finite and non-zero.
    top = max(weights)
    scaled = [w / top for w in weights]
    whole = sum(scaled)
    exact = [total * w / whole for w in scaled]
    shares = [math.floor(x) for x in exact]
    order = sorted(range(len(weights)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares
