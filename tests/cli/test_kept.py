"""``handle.kept()``: the kept positions per item, as many as the plan says."""

from typing import Any

import pytest
import torch

import vlm_budget
from tiny_models import SETUPS, build


@pytest.mark.parametrize("name", SETUPS)
def test_kept_positions_follow_the_plan(name: str) -> None:
    tiny = build(name)
    with vlm_budget.patch(tiny.model, "uniform", 0.3) as handle, torch.no_grad():
        tiny.model(**tiny.inputs)
        kept, plan = handle.kept(), handle.report().plan
    assert [(k.row, k.item.modality, k.item.size, len(k.positions)) for k in kept] == [
        (item.row, item.modality, item.total, item.keep) for item in plan.items
    ]
    for entry in kept:
        assert list(entry.positions) == sorted(set(entry.positions))
        assert set(entry.positions) <= set(range(entry.item.size))


def test_kept_positions_are_those_the_method_chose() -> None:
    tiny = build("llava")
    chosen: list[list[int]] = []

    class Spy(vlm_budget.Pruner):
        def pick(self, ctx: Any, k: int) -> torch.Tensor:
            chosen.append(list(range(ctx.order, ctx.order + k)))
            return torch.tensor(chosen[-1][::-1], device=ctx.device)

    with vlm_budget.patch(tiny.model, Spy(), 0.3) as handle, torch.no_grad():
        tiny.model(**tiny.inputs)
    assert [list(entry.positions) for entry in handle.kept()] == chosen


def test_everything_is_kept_at_a_full_budget_and_nothing_of_text() -> None:
    tiny = build("llava")
    with vlm_budget.patch(tiny.model, "random", 1.0) as handle, torch.no_grad():
        tiny.model(**tiny.inputs)
        assert all(list(entry.positions) == list(range(entry.item.size)) for entry in handle.kept())
        tiny.model(input_ids=torch.tensor([[5, 6, 7]]))
        assert handle.kept() == ()


def test_before_the_first_prompt_there_is_nothing_to_tell() -> None:
    handle = vlm_budget.patch(build("llava").model, "random", 0.5)
    with pytest.raises(vlm_budget.PatchError, match="nothing to report"):
        handle.kept()
