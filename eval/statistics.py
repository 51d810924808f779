"""Means with standard errors that know which samples are alike, and paired comparisons of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

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


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Attributes:
        mean: The mean.
        se: Its standard error, clustered; NaN below two clusters.
        n: Number of samples.
    """

    mean: float
    se: float
    n: int


def estimate(values: Sequence[float], clusters: Sequence[str]) -> Estimate:
    """Mean of per-sample values, and its standard error where samples of a cluster are alike.

    Args:
        values: One per sample.
        clusters: What each sample shares with others.
    """
    if not values:
        return Estimate(float("nan"), float("nan"), 0)
    array, sums, sizes = _by_cluster(values, clusters)
    mean = float(array.mean())
    if len(sums) < 2:
        return Estimate(mean, float("nan"), len(array))
    spread = float(((sums - mean * sizes) ** 2).sum()) * len(sums) / (len(sums) - 1)
    return Estimate(mean, spread**0.5 / len(array), len(array))


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two methods on the same samples.

    Attributes:
        difference: Mean of first minus second.
        low: 2.5 % point of the bootstrap; NaN below two clusters, like ``high`` and ``p``.
        high: 97.5 % point.
        p: Two-sided: twice the share of draws on the other side of zero, at most 1.
        n: Number of samples both answered.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[str], draws: int = 2000, seed: int = 0
) -> Comparison:
    """Resample clusters with replacement and look at the mean paired difference.

    *An Introduction to the Bootstrap* (Efron and Tibshirani, 1993), chapter 13: percentile intervals. The same seed
    gives the same figures.

    Args:
        first: Per-sample values of one method.
        second: Those of the other, in the same order.
        clusters: What each sample shares with others; whole clusters are drawn.
        draws: Bootstrap draws.
        seed: Of the draws.
    """
    if not first:
        return Comparison(float("nan"), float("nan"), float("nan"), float("nan"), 0)
    array, sums, sizes = _by_cluster([a - b for a, b in zip(first, second, strict=True)], clusters)
    if len(sums) < 2:  # drawing the only one again and again would look like certainty
        return Comparison(float(array.mean()), float("nan"), float("nan"), float("nan"), len(array))
    taken = _draws(len(sums), draws, seed)
    found = taken @ sums / (taken @ sizes)
    low, high = np.quantile(found, [0.025, 0.975])
    beyond = min(float((found <= 0).mean()), float((found >= 0).mean()))
    return Comparison(float(array.mean()), float(low), float(high), min(1.0, 2 * beyond), len(array))


@lru_cache(maxsize=8)
def _draws(clusters: int, draws: int, seed: int) -> np.ndarray:
    """[draws, clusters] float64, how often each cluster is drawn; the same for every comparison of one size."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), draws).astype(float)


def _by_cluster(values: Sequence[float], clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values, and per cluster their sum and number."""
    array = np.asarray(values, float)
    _, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    return array, np.bincount(index, array), np.bincount(index).astype(float)
