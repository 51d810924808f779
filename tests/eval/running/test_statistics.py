"""Errors and paired comparisons against what can be computed by hand or by brute force."""

import math

import numpy as np
import pytest

from vlm_budget.eval.statistics import clustered, estimate, paired_bootstrap


def test_without_clusters_the_error_is_the_usual_one() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    found = estimate(values, [str(i) for i in range(7)])
    assert found.mean == pytest.approx(5 / 7)
    assert found.se == pytest.approx(np.std(values, ddof=1) / math.sqrt(7))
    assert found.n == 7


def test_a_cluster_of_equal_samples_counts_once() -> None:
    once = estimate([0.0, 1.0, 1.0, 0.0], ["a", "b", "c", "d"])
    thrice = estimate([0.0, 1.0, 1.0, 0.0] * 3, ["a", "b", "c", "d"] * 3)
    assert thrice.mean == once.mean
    assert thrice.se == pytest.approx(once.se)


def test_the_table_of_nano_uses_the_same_formula() -> None:
    rng = np.random.default_rng(0)
    values, mask = rng.integers(0, 2, (9, 4)).astype(float), rng.random((9, 4)) < 0.7
    rows = [(values[i, j], str(i)) for i in range(9) for j in range(4) if mask[i, j]]
    found, known = estimate(*map(list, zip(*rows, strict=True))), clustered(values, mask)
    assert (round(found.mean, 5), round(found.se, 5), found.n) == (known["mean"], known["se"], known["n"])


def test_below_two_clusters_there_is_no_error() -> None:
    assert math.isnan(estimate([1.0, 0.0], ["a", "a"]).se)
    assert math.isnan(estimate([], []).mean)


def test_the_bootstrap_agrees_with_the_normal_law() -> None:
    rng = np.random.default_rng(1)
    first = (rng.random(400) < 0.7).astype(float).tolist()
    second = (rng.random(400) < 0.6).astype(float).tolist()
    clusters = [str(i // 2) for i in range(400)]
    found = paired_bootstrap(first, second, clusters, draws=4000)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    se = estimate(differences, clusters).se
    assert found.difference == pytest.approx(np.mean(differences))
    assert found.low == pytest.approx(found.difference - 1.96 * se, abs=0.25 * se)
    assert found.high == pytest.approx(found.difference + 1.96 * se, abs=0.25 * se)
    assert found.p == pytest.approx(math.erfc(found.difference / se / math.sqrt(2)), abs=0.03)
    assert paired_bootstrap(first, second, clusters, draws=4000) == found


def test_equal_methods_do_not_differ() -> None:
    found = paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], ["a", "b", "c"])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_one_cluster_proves_nothing() -> None:
    found = paired_bootstrap([1.0, 1.0], [0.0, 0.0], ["a", "a"])
    assert (found.difference, found.n) == (1, 2)
    assert all(math.isnan(number) for number in (found.low, found.high, found.p))


def test_the_sign_is_first_minus_second() -> None:
    found = paired_bootstrap([1.0] * 20, [0.0] * 20, [str(i) for i in range(20)])
    assert (found.difference, found.low, found.high, found.p) == (1, 1, 1, 0)
