"""Means with standard errors that know which questions share a page."""

from __future__ import annotations

import numpy as np


def clustered(values: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Mean over the questions of a group, and its standard error clustered by page.

    Args:
        values: [N, Q] per question: right or wrong, or a paired difference.
        mask: [N, Q] bool, which questions count.

    Returns:
        ``mean``, ``se`` and the number of questions ``n``; mean and error are NaN below two pages.
    """
    asked, sums = mask.sum(1), (values * mask).sum(1)
    total, pages = int(asked.sum()), int((asked > 0).sum())
    if pages < 2:
        return {"mean": float("nan"), "se": float("nan"), "n": total}
    mean = sums.sum() / total
    spread = float(((sums - mean * asked) ** 2).sum()) * pages / (pages - 1)
    return {"mean": round(float(mean), 5), "se": round(spread**0.5 / total, 5), "n": total}
