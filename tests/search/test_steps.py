"""Schedules that are steps, and schedules that are none: FastV's and the unpatched model's values, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from tiny_parts import row_inputs
from vlm_budget.pruner import Pruner
from vlm_budget.registry import PRUNERS

FAMILIES = [name for name in tiny_models.SETUPS if name != "gemma3"]
LAYERS = 3


def outputs(model: Any, inputs: dict[str, torch.Tensor], *patching: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of the prompt, and six greedy tokens."""
    with torch.no_grad(), vlm_budget.patch(model, *patching):
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return logits, ids[0].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("r", [0.5, 0.75])
def test_a_step_reproduces_fastv_bit_for_bit(name: str, r: float) -> None:
    tiny = tiny_models.build(name)
    for row in (0, 1):
        inputs = row_inputs(tiny, row)
        fastv = PRUNERS.get("fastv")(k=2, r=r)
        with vlm_budget.patch(tiny.model, fastv) as handle:
            plan = handle.plan(**inputs)
        counts = plan.row_tokens(0, LAYERS)
        assert counts[2] < counts[1]
        rate = counts[2] / plan.total
        steps: list[Pruner] = [
            PRUNERS.get("gsearch")(rates=(1, 1, rate), queries="last"),
            PRUNERS.get("psigmoid")(beta=1e6, t0=1.5 / (LAYERS - 1), low=rate, queries="last"),
        ]
        expected = outputs(tiny.model, inputs, fastv)
        for step in steps:
            logits, tokens = outputs(tiny.model, inputs, step)
            assert torch.equal(logits, expected[0])
            assert tokens == expected[1]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma"])
def test_the_instruction_ranks_otherwise_than_the_last_token(name: str) -> None:
    tiny = tiny_models.build(name)
    inputs = row_inputs(tiny, 1)
    found = [
        outputs(tiny.model, inputs, PRUNERS.get("gsearch")(rates=(1, 1, 0.3), queries=q))[0]
        for q in ("instruction", "last")
    ]
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", FAMILIES)
def test_rates_of_one_leave_the_model_bit_identical(name: str) -> None:
    tiny = tiny_models.build(name)
    inputs = row_inputs(tiny, 0)
    with torch.no_grad():
        expected = tiny.model(**inputs).logits
    assert torch.equal(outputs(tiny.model, inputs, PRUNERS.get("gsearch")(rates=(1,) * LAYERS))[0], expected)
    assert torch.equal(outputs(tiny.model, inputs, PRUNERS.get("psigmoid")(), 1.0)[0], expected)
