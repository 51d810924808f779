"""Every mistake at ``patch`` is a typed error that says what to do, and nothing has changed in the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import vlm_budget
from fingerprint import changes, fingerprint
from tiny_models import SETUPS, build
from tiny_parts import Tiny
from vlm_budget import (
    BudgetError,
    OptionError,
    PatchError,
    Plan,
    PlanError,
    Pruner,
    UnknownNameError,
    UnsupportedModelError,
    VLMBudgetError,
)
from vlm_budget.plan import ItemPlan

PLAN = Plan("Uniform()", "25%", (ItemPlan(0, "image", 36, 9),), 1)


@pytest.fixture(scope="module")
def llava() -> Tiny:
    return build("llava")


def refused(tiny: Tiny, call: Callable[[], Any], error: type[Exception], *words: str) -> str:
    """Check the error's type and words, and that the model is what it was; returns the message."""
    before = fingerprint(tiny.model)
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, VLMBudgetError)
    assert changes(before, fingerprint(tiny.model)) == []
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


# --- models -----------------------------------------------------------------------------------------------------------


def test_an_unsupported_model_class_lists_the_supported() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    model = transformers.LlamaForCausalLM(config)
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError) as caught:
        vlm_budget.patch(model, "hired", 0.2)
    message = str(caught.value)
    assert "LlamaForCausalLM" in message
    for name in SETUPS:
        assert type(build(name).model).__name__ in message
    assert changes(before, fingerprint(model)) == []
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("model", [None, "llava-hf/llava-1.5-7b-hf", object(), 3])
def test_no_model_at_all(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"expected a model or a pipeline, got {type(model).__name__}"):
        vlm_budget.patch(model, "hired", 0.2)


def test_a_plain_module() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a supported model"):
        vlm_budget.patch(nn.Linear(2, 2), "hired", 0.2)


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"), [("hird", "hired"), ("HiRED", "hired"), ("cls-topk", "cls_topk"), ("unifrm", "uniform")]
)
def test_an_unknown_method_suggests(llava: Tiny, name: str, near: str) -> None:
    message = refused(
        llava, lambda: vlm_budget.patch(llava.model, name, 0.2), UnknownNameError, repr(name), f"Did you mean '{near}'"
    )
    for known in vlm_budget.list_methods():
        assert known in message


@pytest.mark.parametrize("method", [0.2, 128, "20%", "128 tokens", "80 ms", "0.2"])
def test_a_budget_in_the_place_of_the_method(llava: Tiny, method: Any) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, method), UnknownNameError, f"Did you mean budget={method!r}?")


@pytest.mark.parametrize("method", ["plan.json", "runs/plan.json", Path("plan.json"), Path("plan")])
def test_a_plans_path_in_the_place_of_the_method(llava: Tiny, method: Any) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, method), UnknownNameError, f"Did you mean plan={method!r}?")


def test_a_plan_in_the_place_of_the_method(llava: Tiny) -> None:
    patch: Any = vlm_budget.patch
    refused(llava, lambda: patch(llava.model, PLAN), UnknownNameError, "Did you mean plan=<Plan>?")


@pytest.mark.parametrize("method", ["hired", "sparsevlm", ["hired", "sparsevlm"]])
def test_a_ratio_is_a_budget_here(llava: Tiny, method: Any) -> None:
    patch = lambda: vlm_budget.patch(llava.model, method, ratio=0.2)  # noqa: E731
    refused(llava, patch, UnknownNameError, "no option 'ratio'", "The share that stays is the budget: budget=0.2.")


def test_a_method_without_any_likeness(llava: Tiny) -> None:
    message = refused(llava, lambda: vlm_budget.patch(llava.model, "xyzzy", 0.2), UnknownNameError, "Available: ")
    assert "Did you mean" not in message


@pytest.mark.parametrize(
    ("method", "named"), [(3, "int"), ([3], "int"), (["hired", None], "NoneType"), (0.2, "float"), (Pruner, "type")]
)
def test_a_method_of_the_wrong_type(llava: Tiny, method: Any, named: str) -> None:
    patch = lambda: vlm_budget.patch(llava.model, method, 0.2)  # noqa: E731
    refused(llava, patch, UnknownNameError, "a name or a Pruner", named)


@pytest.mark.parametrize("methods", [["hired", "random"], ["fastv", "vtw"], ["hired", "fastv", "vtw"]])
def test_two_methods_for_one_place(llava: Tiny, methods: list[str]) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, methods, 0.2), PatchError, "both act", "['hired', 'fastv']")


def test_no_method_in_a_list(llava: Tiny) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, [], 0.2), UnknownNameError, "no method")


def test_an_option_that_two_methods_have(llava: Tiny) -> None:
    patch = lambda: vlm_budget.patch(llava.model, ["cls_topk", "fastv"], 0.4, positions="weird")  # noqa: E731
    refused(llava, patch, PatchError, "'packed' or 'original'")
    patch = lambda: vlm_budget.patch(llava.model, ["cls_topk", "fastv"], 0.4, newline="keep_all", k="x")  # noqa: E731
    refused(llava, patch, OptionError)


def test_a_method_for_vision_transformers_on_a_vlm(llava: Tiny) -> None:
    message = refused(llava, lambda: vlm_budget.patch(llava.model, "token_transforming", 0.2), PatchError, "timm")
    assert "merge='token_transforming'" in message
    assert "merge=" not in refused(llava, lambda: vlm_budget.patch(llava.model, "tome", 0.2), PatchError, "timm")


def test_an_unknown_merging_stage_suggests(llava: Tiny) -> None:
    patch = lambda: vlm_budget.patch(llava.model, "hired", 0.2, merge="token_transform")  # noqa: E731
    refused(llava, patch, UnknownNameError, "Did you mean 'token_transforming'")


def test_options_without_a_method(llava: Tiny) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, budget=0.2, alpha=0.3), PatchError, "alpha", "name one")


def test_a_budget_beside_a_fixed_schedule(llava: Tiny) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, "fastv", 0.5, k=2, r=0.5), BudgetError, "nothing left")


def test_a_plan_without_its_method(llava: Tiny) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, plan=PLAN), PatchError, "Uniform()")


@pytest.mark.parametrize(
    "text", [None, "", "{", "{}", "[]", '{"kind": "recipe", "version": 1}', '{"version": 1, "items": [1]}']
)
def test_a_plan_file_that_is_none(llava: Tiny, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    refused(llava, lambda: vlm_budget.patch(llava.model, plan=str(path)), PlanError, str(path))


def test_an_unknown_option_suggests(llava: Tiny) -> None:
    refused(
        llava,
        lambda: vlm_budget.patch(llava.model, "hired", 0.2, alfa=0.3),
        UnknownNameError,
        "no option 'alfa'",
        "Did you mean 'alpha'",
        "final_layer",
    )


def test_options_beside_an_instance(llava: Tiny) -> None:
    from vlm_budget.pruners.hired import HiRED

    refused(
        llava,
        lambda: vlm_budget.patch(llava.model, HiRED(), 0.2, alpha=0.3),
        PatchError,
        "alpha",
        "configure the instance",
    )


@pytest.mark.parametrize("layer", [99, -1, 3])
@pytest.mark.parametrize("option", ["init_layer", "final_layer"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_a_vision_layer_that_does_not_exist(name: str, option: str, layer: int) -> None:
    tiny = build(name)
    refused(
        tiny,
        lambda: vlm_budget.patch(tiny.model, "hired", 0.2, **{option: layer}),
        PatchError,
        "layers 0 to 2",
        f"no layer {layer}",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"alpha": float("nan")},
        {"content": "guess"},
        {"count_top": 0},
        {"newline": "keep"},
        {"positions": "none"},
    ],
)
def test_an_option_out_of_range_names_it(llava: Tiny, options: dict[str, Any]) -> None:
    before = fingerprint(llava.model)
    with pytest.raises((ValueError, PatchError), match=next(iter(options))):
        vlm_budget.patch(llava.model, "hired", 0.2, **options)
    assert changes(before, fingerprint(llava.model)) == []


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 0.0, -1, -0.2, "0", "0%", "-5 tokens", "-20%"])
def test_nothing_or_less_than_nothing(llava: Tiny, budget: Any) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, "hired", budget), BudgetError, "above 0", "Try one of")


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), -float("inf"), "nan", "inf", "nan%"])
def test_no_finite_number(llava: Tiny, budget: Any) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, "hired", budget), BudgetError, "Try one of")


@pytest.mark.parametrize(("budget", "instead"), [(1.5, "2"), ("150%", "2"), (100.1, "100"), ("101%", "1")])
def test_more_than_everything(llava: Tiny, budget: Any, instead: str) -> None:
    message = refused(llava, lambda: vlm_budget.patch(llava.model, "hired", budget), BudgetError, "100%")
    assert re.search(rf"such as {instead}\b", message)


@pytest.mark.parametrize(
    "budget",
    [
        True,
        False,
        "5 bananas",
        "a fifth",
        "",
        "   ",
        "many",
        "20 %%",
        "1 2",
        [0.2],
        {"ratio": 0.2},
        b"0.2",
        1j,
        "0.5 tokens",
    ],
)
def test_not_a_budget(llava: Tiny, budget: Any) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, "hired", budget), BudgetError)


def test_neither_budget_nor_plan_or_both(llava: Tiny) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, "hired"), BudgetError, "either a budget", "or a plan")
    refused(llava, lambda: vlm_budget.patch(llava.model, "hired", 0.2, plan=PLAN), BudgetError, "either a budget")


@pytest.mark.parametrize("plan", [0.2, {"items": []}])
def test_a_plan_of_the_wrong_type(llava: Tiny, plan: Any) -> None:
    refused(llava, lambda: vlm_budget.patch(llava.model, "hired", plan=plan), PlanError, type(plan).__name__, "Plan")


# --- positions --------------------------------------------------------------------------------------------------------

MROPE = [name for name in SETUPS if name.startswith("qwen")]


@pytest.mark.parametrize("name", MROPE)
def test_packed_positions_with_mrope(name: str) -> None:
    tiny = build(name)
    refused(
        tiny, lambda: vlm_budget.patch(tiny.model, "hired", 0.2, positions="packed"), PatchError, "M-RoPE", "'original'"
    )
    with vlm_budget.patch(tiny.model, "hired", 0.2) as handle, torch.no_grad():
        tiny.model(**tiny.clone())
        assert handle.report().positions == "original"


def test_positions_that_do_not_exist(llava: Tiny) -> None:
    refused(
        llava,
        lambda: vlm_budget.patch(llava.model, "hired", 0.2, positions="middle"),
        PatchError,
        "'packed' or 'original'",
        "'middle'",
    )


# --- undoing ----------------------------------------------------------------------------------------------------------


def test_unpatching_an_unpatched_model(llava: Tiny) -> None:
    refused(llava, lambda: vlm_budget.unpatch(llava.model), PatchError, "not patched")
    vlm_budget.patch(llava.model, "hired", 0.2).undo()
    refused(llava, lambda: vlm_budget.unpatch(llava.model), PatchError, "not patched")


def test_unpatching_what_could_never_be_patched() -> None:
    with pytest.raises(UnsupportedModelError):
        vlm_budget.unpatch(nn.Linear(2, 2))


def test_a_refused_patch_leaves_an_earlier_one_in_place(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, "hired", 0.5) as handle:
        for call in (
            lambda: vlm_budget.patch(llava.model, "hird", 0.2),
            lambda: vlm_budget.patch(llava.model, "hired", 0),
            lambda: vlm_budget.patch(llava.model, "hired", 0.2, final_layer=99),
            lambda: vlm_budget.patch(llava.model, "hired", 0.2, positions="middle"),
        ):
            with pytest.raises(VLMBudgetError):
                call()
            assert handle.active
        with torch.no_grad():
            llava.model(**llava.clone())
        assert handle.report().kept_tokens == handle.report().visual_tokens // 2


# --- handles ----------------------------------------------------------------------------------------------------------


def test_a_handle_says_what_it_is(llava: Tiny) -> None:
    name = type(llava.model).__name__
    handle = vlm_budget.patch(llava.model, ["hired", "fastv"], "50% flops", alpha=0.3)
    assert repr(handle) == f"<PatchHandle HiRED(alpha=0.3) + FastV() at 50% flops on {name}, active>"
    handle.undo()
    assert repr(handle).endswith(", undone>")
    with vlm_budget.patch(llava.model, "fastv", r=0.5) as handle:
        assert repr(handle) == f"<PatchHandle FastV(r=0.5) on {name}, active>"
    with vlm_budget.patch(llava.model, "random", plan=PLAN) as handle:
        assert repr(handle) == f"<PatchHandle Random() with the counts of Uniform() at 25% on {name}, active>"


def test_a_replaced_handle_says_so_when_asked_for_a_report(llava: Tiny) -> None:
    first = vlm_budget.patch(llava.model, "hired", 0.2)
    with vlm_budget.patch(llava.model, "uniform", 0.2) as second, torch.no_grad():
        with pytest.raises(PatchError, match="no prompt has run"):
            second.report()
        llava.model(**llava.clone())
        with pytest.raises(PatchError, match="was undone, or replaced by a later one, before a prompt ran"):
            first.report()
        assert second.report().method == "Uniform()"
        assert second.kept()
    assert second.report().method == "Uniform()"  # what ran before the undoing is told behind it


def test_a_plan_replayed_with_another_method_is_told_in_the_report(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, "hired", 0.5) as handle:
        plan = handle.plan(**llava.clone())
    with vlm_budget.patch(llava.model, "uniform", plan=plan) as handle, torch.no_grad():
        llava.model(**llava.clone())
        assert str(handle.report()).splitlines()[0] == "Uniform() with the counts of HiRED() at 50%"


@pytest.mark.parametrize("method", ["fastv", "vtw", "psigmoid", "gsearch", "sparsevlm"])
@pytest.mark.parametrize("budget", [0.01, "1 token", "1% flops", "1% kv"])
def test_the_budget_named_for_a_batch_runs(llava: Tiny, method: str, budget: Any) -> None:
    with vlm_budget.patch(llava.model, method, budget) as handle, pytest.raises(BudgetError) as caught:
        handle.plan(**llava.clone())
    named = str(caught.value).split("nearest feasible budget is '")[1].split("'")[0]
    assert "PSigmoid" not in str(caught.value) or method == "psigmoid"
    with vlm_budget.patch(llava.model, method, named) as handle, torch.no_grad():
        llava.model(**llava.clone())
