"""Metrics against their formulas."""

from typing import Any

import pytest
import torch

from vlm_budget.errors import OptionError
from vlm_budget.search.metrics import Metric


@pytest.mark.parametrize("name", ["accuracy", "agreement"])
def test_an_answer_counts_when_every_token_is_the_most_likely(name: str) -> None:
    metric = Metric(name, 3)  # type: ignore[arg-type]
    logits = torch.zeros(3, 7)
    logits[[0, 1, 2], [4, 2, 6]] = 1.0
    assert metric.value(logits, torch.tensor([4, 2, 6])) == 1.0
    assert metric.value(logits, torch.tensor([4, 2, 5])) == 0.0


def test_kl_is_minus_the_divergence_from_the_full_model() -> None:
    full, pruned = torch.randn(1, 11), torch.randn(1, 11)
    p, q = full.double().softmax(-1)[0].tolist(), pruned.double().softmax(-1)[0].tolist()
    expected = -sum(a * (torch.tensor(a).log() - torch.tensor(b).log()).item() for a, b in zip(p, q, strict=True))
    assert Metric("kl").value(pruned, full) == pytest.approx(expected, abs=1e-6)
    assert Metric("kl").value(full, full) == 0.0


def test_tolerance_is_a_share_of_the_quality_and_nats_for_kl() -> None:
    assert Metric("accuracy").floor(0.8, 0.25) == pytest.approx(0.6)
    assert Metric("kl").floor(0.0, 0.02) == -0.02
    assert (Metric("agreement").default_tolerance, Metric("kl").default_tolerance) == (0.01, 0.02)


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("f1", 1, "metric must be one of accuracy, agreement, kl, got 'f1'"),
        ("accuracy", 0, "answer_tokens must be a number from 1 on"),
        ("accuracy", True, "answer_tokens must be a number from 1 on"),
        ("kl", 2, "first answer token only"),
    ],
)
def test_what_is_no_metric_is_refused(name: str, tokens: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Metric(name, tokens)  # type: ignore[arg-type]


def test_a_tolerance_is_a_share_below_one_and_any_number_of_nats() -> None:
    assert Metric("accuracy").allowed(None) == 0.01
    assert Metric("accuracy").allowed(0.999) == 0.999
    assert Metric("kl").allowed(5) == 5.0
    for value in (1, 1.0, 5.0):
        for name in ("accuracy", "agreement"):
            with pytest.raises(OptionError, match=f"share of the full model's {name} that may be lost, below 1"):
                Metric(name).allowed(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1%", [0.1]])
@pytest.mark.parametrize("name", ["accuracy", "kl"])
def test_what_is_no_tolerance_is_refused(name: Any, value: Any) -> None:
    with pytest.raises(OptionError, match="tolerance must be a number above 0"):
        Metric(name).allowed(value)
