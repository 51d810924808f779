"""Qwen3-VL with the three deepstack levels of the released models: no layer that is still given features may drop."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from tiny_models import Tiny, row_inputs
from vlm_budget import BudgetError, PatchError
from vlm_budget.registry import PRUNERS

from .layered import layered
from .patched import DECODED, generate
from .reference import rows
from .schedules import LAYERS, Recording, forward_inputs

LEVELS = 3
# Fields where the method's own number of a layer is too early.
LATER: dict[str, dict[str, Any]] = {"fastv": {"k": 3}, "dart": {"layer": 3}}
METHODS = [name for name in vlm_budget.list_methods() if PRUNERS.get(name).stage == "decoder"]
BUDGET = 0.7


@cache
def built() -> Tiny:
    """A model of its own that is always left unpatched."""
    with torch.random.fork_rng(devices=[]), tiny_models.decoder_layers(LAYERS):
        torch.manual_seed(0)
        return tiny_models.qwen("Qwen3VL", levels=LEVELS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_the_reference(method: str) -> None:
    tiny = built()
    full = rows(tiny.model, tiny.clone())
    assert len(full[0].deepstack) == LEVELS
    recording = Recording(inner=PRUNERS.get(method)(**LATER.get(method, {})), values={})
    singles = []
    with vlm_budget.patch(tiny.model, recording, BUDGET) as handle, torch.no_grad():
        promised = handle.plan(**tiny.clone())
        logits = tiny.model(**forward_inputs(tiny)).logits
        kept, report = handle.kept(), handle.report()
        tokens = generate(tiny.model, tiny.clone())
        for index in range(len(full)):
            recording.values.clear()
            alone = tiny.model(**row_inputs(tiny, index)).logits[0]
            singles.append((alone, [item.steps for item in handle.kept()], dict(recording.values)))
            assert generate(tiny.model, row_inputs(tiny, index)) == tokens[index : index + 1]
    assert report.plan == promised and min(promised.drop_layers) >= LEVELS
    valid = tiny.inputs["attention_mask"].bool()
    prompts = layered(full, kept, vision_packed=False, packed=False, values=[values for *_, values in singles])
    for index, (prompt, (alone, steps, _)) in enumerate(zip(prompts, singles, strict=True)):
        mine = logits[index][valid[index]]
        assert [item.steps for item in kept if item.row == index] == steps
        torch.testing.assert_close(alone, mine, **DECODED)
        torch.testing.assert_close(mine[prompt.left], prompt.logits(), **DECODED)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["1%", "1% flops", "1% kv", "2 tokens"])
def test_the_budget_that_is_named_runs(method: str, budget: str) -> None:
    tiny, options = built(), LATER.get(method, {})
    with (
        vlm_budget.patch(tiny.model, method, budget, **options) as handle,
        pytest.raises(BudgetError, match="nearest feasible budget is '") as caught,
    ):
        handle.plan(**tiny.clone())
    named = str(caught.value).split("nearest feasible budget is '")[1].split("'")[0]
    with vlm_budget.patch(tiny.model, method, named, **options) as handle, torch.no_grad():
        tiny.model(**tiny.clone())
        assert min(handle.report().plan.drop_layers) >= LEVELS


@pytest.mark.parametrize(
    ("method", "options", "advice"),
    [
        ("fastv", {}, "Pass k=3, or more."),
        ("fastv", {"r": 0.5}, "Pass k=3, or more."),
        ("dart", {}, "Pass layer=3, or more."),
        ("vtw", {"layer": 2}, "Pass layer=3, or more."),
        ("gsearch", {"rates": (1, 1, *[0.5] * (LAYERS - 2))}, "Pass rates that are 1 for the first 3 layers."),
    ],
)
def test_a_numbered_layer_that_is_too_early_is_named_with_its_field(
    method: str, options: dict[str, Any], advice: str
) -> None:
    tiny = built()
    budget = BUDGET if not PRUNERS.get(method)(**options).fixed else None
    for spend in {budget, "1% flops" if budget else None}:
        with vlm_budget.patch(tiny.model, method, spend, **options) as handle, torch.no_grad():
            for run in (lambda: handle.plan(**tiny.clone()), lambda: tiny.model(**tiny.clone())):
                with pytest.raises(
                    PatchError, match="adds visual features behind each of its first 3 layers"
                ) as caught:
                    run()
                assert str(caught.value).endswith(advice)


@pytest.mark.parametrize("method", METHODS)
def test_everything_kept_is_bit_identical_at_the_defaults(method: str) -> None:
    tiny = built()
    with torch.no_grad():
        plain = tiny.model(**tiny.clone()).logits
        with vlm_budget.patch(tiny.model, method, 1.0):
            assert torch.equal(tiny.model(**tiny.clone()).logits, plain)


def test_two_methods_share_a_budget_behind_the_levels() -> None:
    tiny = built()
    with vlm_budget.patch(tiny.model, ["uniform", "sparsevlm"], 0.4) as handle, torch.no_grad():
        tiny.model(**tiny.clone())
        plan = handle.report().plan
    assert plan.keep < plan.total and plan.mean_tokens(LAYERS) <= 0.4 * plan.total + 1
    assert plan.drop_layers and min(plan.drop_layers) >= LEVELS
