"""Mistakes that show only when a prompt arrives: a typed error, an unharmed model, and the next good call works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vlm_budget
from fingerprint import changes, fingerprint
from tiny_models import SETUPS, build
from tiny_parts import Tiny, row_inputs
from vlm_budget import BudgetError, LayoutError, PatchError, Plan, PlanError
from vlm_budget.plan import ItemPlan

NAMES = [name for name in SETUPS if not name.endswith("right_padded")]


@pytest.fixture(params=NAMES)
def tiny(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    """Every set-up, checked to be untouched at the end."""
    made = build(request.param)
    run(made, made.clone())
    before = fingerprint(made.model)
    run(made, made.clone())
    own = changes(before, fingerprint(made.model))
    yield made
    assert [name for name in changes(before, fingerprint(made.model)) if name not in own] == []


@pytest.fixture
def llava() -> Tiny:
    return build("llava")


def run(tiny: Tiny, inputs: dict[str, Any]) -> list[list[int]]:
    """A short generation."""
    with torch.no_grad():
        return tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False).tolist()


def visual_tokens(tiny: Tiny, row: int) -> int:
    """Placeholders of one prompt."""
    return int(torch.isin(tiny.inputs["input_ids"][row], torch.tensor([120, 121])).sum())


def images(tiny: Tiny, row: int) -> int:
    """Items of one prompt, from the plan that keeps all."""
    with vlm_budget.patch(tiny.model, "uniform", 1.0) as handle:
        return sum(item.row == row for item in handle.plan(**tiny.clone()).items)


def test_more_tokens_than_a_prompt_has(tiny: Tiny) -> None:
    fewest, most = sorted(visual_tokens(tiny, row) for row in (0, 1))
    with vlm_budget.patch(tiny.model, "hired", most + 1) as handle:
        for call in (lambda: run(tiny, tiny.clone()), lambda: handle.plan(**tiny.clone())):
            with pytest.raises(BudgetError, match=rf"asks for {most + 1} .*has only \d+\..*nearest feasible") as caught:
                call()
            assert str(fewest) in str(caught.value) or str(most) in str(caught.value)
    with vlm_budget.patch(tiny.model, "hired", fewest) as handle:
        run(tiny, tiny.clone())
        assert handle.report().kept_tokens == 2 * fewest


def test_the_next_good_call_works_after_a_refused_one(tiny: Tiny) -> None:
    rows = sorted((0, 1), key=lambda row: visual_tokens(tiny, row))
    few, many = (visual_tokens(tiny, row) for row in rows)
    if few == many:
        pytest.skip("both prompts of this set-up have the same number of visual tokens")
    small, large = (row_inputs(tiny, row) for row in rows)
    with vlm_budget.patch(tiny.model, "hired", many - 1) as handle:
        want = run(tiny, {name: value.clone() for name, value in large.items()})
        with pytest.raises(BudgetError):
            run(tiny, small)
        with pytest.raises(BudgetError), torch.no_grad():
            tiny.model(**row_inputs(tiny, rows[0]))
        assert run(tiny, large) == want
        assert handle.report().kept_tokens == many - 1


def test_less_than_one_token_per_image(tiny: Tiny) -> None:
    row = max((0, 1), key=lambda index: images(tiny, index))
    count = images(tiny, row)
    if count == 1:
        budget: Any = 0.4 / visual_tokens(tiny, row)
        message = r"leaves 0 of \d+ visual tokens for 1 image"
    else:
        budget, message = count - 1, rf"leaves {count - 1} of \d+ visual tokens for {count} image"
    with vlm_budget.patch(tiny.model, "hired", budget):
        with pytest.raises(BudgetError, match=message) as caught:
            run(tiny, row_inputs(tiny, row))
        assert f"nearest feasible budget is {count} token{'s' * (count > 1)} (or" in str(caught.value)
    with vlm_budget.patch(tiny.model, "hired", count) as handle:
        run(tiny, row_inputs(tiny, row))
        assert [item.keep for item in handle.report().plan.items] == [1] * count


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video_image", "llava_onevision"])
def test_newlines_that_leave_no_room_for_a_patch(name: str) -> None:
    tiny = build(name)
    inputs = row_inputs(tiny, 1)
    before = fingerprint(tiny.model)
    with vlm_budget.patch(tiny.model, "uniform", 3, newline="keep_all"):
        with pytest.raises(
            BudgetError, match=r"newline='keep_all' keeps (\d+) row separators.*newline='drop'"
        ) as caught:
            run(tiny, inputs)
        feasible = int(str(caught.value).split("nearest feasible count is ")[1].split(";")[0])
    with vlm_budget.patch(tiny.model, "uniform", feasible, newline="keep_all") as handle:
        run(tiny, inputs)
        (item,) = handle.kept()
        assert sum(int(item.item.partition[p]) >= 0 for p in item.positions) == 1
    assert "vlm_budget" not in str(changes(before, fingerprint(tiny.model)))


def test_a_plan_for_other_prompts(tiny: Tiny) -> None:
    with vlm_budget.patch(tiny.model, "hired", 0.5) as handle:
        plan = handle.plan(**row_inputs(tiny, 0))
        fitting = handle.plan(**tiny.clone())
    with vlm_budget.patch(tiny.model, "hired", plan=plan) as handle:
        for call in (lambda: run(tiny, tiny.clone()), lambda: handle.plan(**tiny.clone())):
            with pytest.raises(PlanError, match=r"the plan was made for items of .* the input has .* handle\.plan"):
                call()
        run(tiny, row_inputs(tiny, 0))
        assert handle.report().plan == plan
    with vlm_budget.patch(tiny.model, "hired", plan=fitting) as handle:
        run(tiny, tiny.clone())
        assert handle.report().plan == fitting


def test_a_plan_with_a_row_that_does_not_exist(llava: Tiny) -> None:
    items = (ItemPlan(0, "image", 36, 9), ItemPlan(5, "image", 36, 9))
    with pytest.raises(PlanError):
        plan = Plan("Uniform()", "25%", items, 1)
        with vlm_budget.patch(llava.model, "uniform", plan=plan):
            run(llava, row_inputs(llava, 1))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 9, "items": []}'])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_a_report_before_any_prompt(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, "hired", 0.2) as handle, pytest.raises(PatchError, match="no prompt"):
        handle.report()


def test_prompts_and_pixels_that_do_not_fit(llava: Tiny) -> None:
    inputs = llava.clone()
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with vlm_budget.patch(llava.model, "hired", 0.5) as handle:
        with pytest.raises(LayoutError, match="the prompts hold"):
            handle.plan(**inputs)
        with pytest.raises(ValueError, match="do not match"):  # transformers' own check comes first
            run(llava, inputs)
        run(llava, llava.clone())


def test_a_layout_without_what_the_processor_gives() -> None:
    tiny = build("llava_next")
    with vlm_budget.patch(tiny.model, "hired", 0.5) as handle:
        with pytest.raises(LayoutError, match="needs the processor's input_ids"):
            handle.plan(pixel_values=tiny.inputs["pixel_values"])
        inputs = tiny.clone()
        inputs.pop("image_sizes")
        with pytest.raises(LayoutError, match="'image_sizes'"):
            handle.plan(**inputs)
