"""Budgets in real units that cannot be met, on real models: refused with one that can, and nothing is left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from fingerprint import changes, fingerprint
from tiny_models import Tiny
from vlm_budget import BudgetError

METHODS: dict[str, Any] = {"vision": "hired", "decoder": "fastv", "composed": ["uniform", "pyramiddrop"]}


@pytest.fixture(autouse=True)
def no_calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_BUDGET_CACHE", str(tmp_path))


@pytest.fixture(scope="module", params=["llava_next", "qwen2_5_vl"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return tiny_models.build(request.param)


def nearest(error: BudgetError) -> str:
    return str(error).split("nearest feasible budget is '")[1].split("'")[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["0.1% flops", "5 kflops", "0.1% kv", "64 B kv", "1 kB"])
def test_an_impossible_budget_names_the_nearest_and_that_runs(tiny: Tiny, method: str, budget: str) -> None:
    with vlm_budget.patch(tiny.model, METHODS[method], budget) as handle:
        with pytest.raises(BudgetError, match="allows .* but the prompt costs at least .*") as planned:
            handle.plan(**tiny.clone())
        with pytest.raises(BudgetError) as met, torch.no_grad():
            tiny.model(**tiny.clone())
    assert str(met.value) == str(planned.value)
    with vlm_budget.patch(tiny.model, METHODS[method], nearest(met.value)) as handle, torch.no_grad():
        tiny.model(**tiny.clone())
        report = handle.report()
    assert report.plan.mean_tokens(3) < report.plan.total
    promise = report.forecast.promise  # type: ignore[union-attr]
    assert promise is not None and promise.planned <= promise.allowed


@pytest.mark.parametrize("budget", ["80 ms", "0.5 s", "50% ms", "30% time"])
def test_milliseconds_without_a_calibration_leave_the_model_alone(tiny: Tiny, budget: str, tmp_path: Path) -> None:
    before = fingerprint(tiny.model)
    with pytest.raises(BudgetError, match=r"not calibrated on this machine.*vlm_budget\.calibrate\(model\)") as caught:
        vlm_budget.patch(tiny.model, "uniform", budget)
    assert str(tmp_path) in str(caught.value)
    assert changes(before, fingerprint(tiny.model)) == []


def test_an_earlier_patch_survives_a_refused_one(tiny: Tiny) -> None:
    with vlm_budget.patch(tiny.model, "uniform", 0.5) as handle:
        with pytest.raises(BudgetError):
            vlm_budget.patch(tiny.model, "uniform", "80 ms")
        assert handle.active
        with torch.no_grad():
            tiny.model(**tiny.clone())
        assert handle.report().kept_tokens < handle.report().visual_tokens


def test_a_prompt_longer_than_the_calibration_is_refused_with_the_length_it_needs() -> None:
    tiny = tiny_models.build("llava_next")
    vlm_budget.calibrate(tiny.model, longest=64, repeats=1)
    with (
        vlm_budget.patch(tiny.model, "uniform", "80 ms") as handle,
        pytest.raises(BudgetError, match=r"longer than what was calibrated \(64\).*longest=") as caught,
    ):
        handle.plan(**tiny.clone())
    assert int(str(caught.value).split("longest=")[1].rstrip(").")) == int(tiny.inputs["attention_mask"][0].sum())
    vlm_budget.calibrate(tiny.model, longest=1024, repeats=1)
    with vlm_budget.patch(tiny.model, "uniform", "10 s") as handle:
        plan = handle.plan(**tiny.clone())
    assert plan.keep == plan.total
