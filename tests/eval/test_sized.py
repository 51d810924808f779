"""The model that speed is measured on: its prompts fit it, whatever the grid of crops."""

import pytest
import torch

import vlm_budget
from vlm_budget.eval.sized import PROMPT, PrefillClock, Timer, build, build_inputs


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2)])
def test_prompts_hold_what_the_encoder_makes(grid: tuple[int, int]) -> None:
    model = build("small", "cpu", torch.float32, grid)
    inputs = build_inputs(model, "cpu", torch.float32, 2)
    side = 8
    visual = side * side + grid[0] * side * (grid[1] * side + 1)
    assert inputs["input_ids"].shape == (2, visual + PROMPT + 1)
    clock = PrefillClock(model, Timer("cpu"))
    with torch.no_grad(), vlm_budget.patch(model, "uniform", 0.5) as handle:
        ms, _ = Timer("cpu")(lambda: model(**inputs, logits_to_keep=1))
        assert handle.report().visual_tokens == 2 * visual
    assert 0 < clock.ms < ms
    clock.remove()
    assert not model.model.language_model._forward_hooks


def test_a_model_is_the_same_every_time() -> None:
    one, other = (build("small", "cpu", torch.float32).lm_head.weight for _ in range(2))
    assert torch.equal(one, other)
