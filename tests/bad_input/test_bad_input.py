"""What a user can get wrong: a typed error with a way out, and nothing changed in the model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import transformers

import tiny_models
import vlm_budget
from fingerprint import changes, fingerprint
from tiny_parts import Tiny
from tiny_parts import llama as llama_config
from vlm_budget import BudgetError, PatchError, Plan, PlanError, UnknownNameError, UnsupportedModelError

transformers.logging.set_verbosity_error()


@pytest.fixture
def tiny() -> Iterator[Tiny]:
    """A model that must be the same after the test as before, but for what runs change by themselves."""
    found = tiny_models.build("llava")
    run = {"max_new_tokens": 1, "do_sample": False}
    found.model.generate(**found.clone(), **run)
    first = fingerprint(found.model)
    found.model.generate(**found.clone(), **run)
    before = fingerprint(found.model)
    yield found
    assert set(changes(before, fingerprint(found.model))) <= set(changes(first, before))


@pytest.fixture
def untouched() -> Iterator[Tiny]:
    """A model that no run touches either: it must be the very same, object by object."""
    found = tiny_models.build("llava")
    before = fingerprint(found.model)
    yield found
    assert changes(before, fingerprint(found.model)) == []


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (0, "above 0"),
        (0.0, "above 0"),
        (-1, "above 0"),
        (-0.5, "above 0"),
        ("-5%", "above 0"),
        (math.nan, "finite"),
        (math.inf, "finite"),
        ("nan", "finite"),
        (1.5, "share"),
        ("150%", "share"),
        (True, "cannot read"),
        ([0.2], "cannot read"),
        ("", "cannot read"),
        ("a fifth", "cannot read"),
        ("5 bananas", "unknown unit"),
        ("1.5 tokens", "whole"),
        ("40% flops", "not yet"),
        ("80 ms", "not yet"),
        ("200 MB kv", "not yet"),
    ],
)
def test_impossible_budgets_are_refused_before_anything_happens(untouched: Tiny, budget: object, says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        vlm_budget.patch(untouched.model, "hired", budget)  # type: ignore[arg-type]


def test_neither_budget_nor_plan_is_refused(untouched: Tiny) -> None:
    with pytest.raises(BudgetError, match="either a budget"):
        vlm_budget.patch(untouched.model, "hired")


def test_budget_and_plan_together_are_refused(untouched: Tiny) -> None:
    with pytest.raises(BudgetError, match="either a budget"):
        vlm_budget.patch(untouched.model, "hired", 0.2, plan=Plan("HiRED()", "20%", (), 1))


def test_unsupported_model_lists_the_supported_ones() -> None:
    model = transformers.LlamaForCausalLM(llama_config())
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError) as error:
        vlm_budget.patch(model, "hired", 0.2)
    assert "LlamaForCausalLM" in str(error.value)
    for name in ("LlavaNextForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"):
        assert name in str(error.value)
    assert changes(before, fingerprint(model)) == []


@pytest.mark.parametrize("thing", ["llava-hf/llava-1.5-7b-hf", 7, None])
def test_something_that_is_no_model_is_refused(thing: object) -> None:
    with pytest.raises(UnsupportedModelError, match="expected a model"):
        vlm_budget.patch(thing, "hired", 0.2)


def test_unknown_method_suggests(untouched: Tiny) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'hired'"):
        vlm_budget.patch(untouched.model, "hierd", 0.2)


def test_unknown_option_suggests(untouched: Tiny) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'alpha'"):
        vlm_budget.patch(untouched.model, "hired", 0.2, alfa=0.3)


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"content": "weight"}, {"newline": "maybe"}, {"count_top": 0}])
def test_option_out_of_range_is_refused(untouched: Tiny, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        vlm_budget.patch(untouched.model, "hired", 0.2, **options)


def test_options_beside_an_instance_are_refused(untouched: Tiny) -> None:
    from vlm_budget.pruners.hired import HiRED

    with pytest.raises(PatchError, match="configure the instance"):
        vlm_budget.patch(untouched.model, HiRED(), 0.2, alpha=0.3)


def test_layer_that_does_not_exist_is_refused(untouched: Tiny) -> None:
    with pytest.raises(PatchError, match="there is no layer 99"):
        vlm_budget.patch(untouched.model, "hired", 0.2, final_layer=99)


def test_unknown_position_mode_is_refused(untouched: Tiny) -> None:
    with pytest.raises(PatchError, match="'packed' or 'original'"):
        vlm_budget.patch(untouched.model, "hired", 0.2, positions="dense")


def test_packed_positions_on_multi_axis_rope_are_refused() -> None:
    tiny = tiny_models.build("qwen2_5_vl")
    before = fingerprint(tiny.model)
    with pytest.raises(PatchError, match="M-RoPE"):
        vlm_budget.patch(tiny.model, "hired", 0.2, positions="packed")
    assert changes(before, fingerprint(tiny.model)) == []


def test_undoing_what_is_not_patched_is_refused(untouched: Tiny) -> None:
    with pytest.raises(PatchError, match="not patched"):
        vlm_budget.unpatch(untouched.model)


def test_report_before_any_prompt_is_refused(untouched: Tiny) -> None:
    with vlm_budget.patch(untouched.model, "hired", 0.2) as handle, pytest.raises(PatchError, match="no prompt"):
        handle.report()


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (10_000, "only"),  # more tokens than exist
        (1, "less than one each"),  # two images in the first prompt
        (0.001, "less than one each"),
    ],
)
def test_budget_that_an_input_cannot_meet_is_refused_and_the_next_call_works(
    tiny: Tiny, budget: float, says: str
) -> None:
    with vlm_budget.patch(tiny.model, "hired", 0.3), torch.no_grad():
        expected = tiny.model.generate(**tiny.clone(), max_new_tokens=3, do_sample=False)
    with vlm_budget.patch(tiny.model, "hired", budget) as handle:
        for run in (
            lambda: handle.plan(**tiny.clone()),
            lambda: tiny.model(**tiny.clone()),
            lambda: tiny.model.generate(**tiny.clone(), max_new_tokens=3, do_sample=False),
        ):
            with torch.no_grad(), pytest.raises(BudgetError, match=says) as error:
                run()
            assert "nearest feasible" in str(error.value)
    with vlm_budget.patch(tiny.model, "hired", 0.3), torch.no_grad():
        again = tiny.model.generate(**tiny.clone(), max_new_tokens=3, do_sample=False)
    assert torch.equal(again, expected)


def test_keeping_every_newline_without_room_for_a_patch_is_refused() -> None:
    tiny = tiny_models.build("llava_next")
    with (
        vlm_budget.patch(tiny.model, "hired", 0.02, newline="keep_all"),
        torch.no_grad(),
        pytest.raises(BudgetError, match="newline='keep_all'"),
    ):
        tiny.model(**tiny.clone())


def test_plan_for_another_input_is_refused(tiny: Tiny) -> None:
    with vlm_budget.patch(tiny.model, "hired", 0.3) as handle:
        plan = handle.plan(**tiny.clone())
    alone = tiny_models.row_inputs(tiny, 1)
    with (
        vlm_budget.patch(tiny.model, "hired", plan=plan) as handle,
        torch.no_grad(),
        pytest.raises(PlanError, match="plan was made for"),
    ):
        tiny.model(**alone)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 9, "items": []}'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_text_only_prompt_runs_unpruned_and_says_so(tiny: Tiny) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = tiny.model(input_ids=ids).logits
        with vlm_budget.patch(tiny.model, "hired", 0.2) as handle:
            got = tiny.model(input_ids=ids).logits
            report = handle.report()
    assert torch.equal(got, expected)
    assert report.text_only and report.visual_tokens == 0
    assert "text-only" in str(report)


def test_pixels_that_do_not_fit_the_prompt_are_refused(tiny: Tiny) -> None:
    inputs = tiny.clone()
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with (
        vlm_budget.patch(tiny.model, "hired", 0.2) as handle,
        pytest.raises(vlm_budget.LayoutError, match="prompts hold"),
    ):
        handle.plan(**inputs)
