"""A forward inside ``generate`` that is about other prompts is like any forward outside, and ``generate`` goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import vlm_budget
from tiny_models import Tiny
from vlm_budget import SelectionError
from vlm_budget.engine.prompts import Prompts
from vlm_budget.pruners.fastv import FastV

from .conftest import fresh
from .patched import SAMPLE, TOLERANCE


def other_prompts(tiny: Tiny) -> dict[str, Any]:
    """Of the same shape, but without padding and mirrored: what fits the one looks as if it fitted the other."""
    inputs = tiny.clone()
    padding = inputs["attention_mask"] == 0
    assert padding.any()
    inputs["input_ids"][padding], inputs["attention_mask"][padding] = 9, 1
    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    return inputs


def clones(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in inputs.items()}


def positions(handle: vlm_budget.PatchHandle) -> list[Any]:
    return [(item.row, item.positions, item.steps) for item in handle.kept()]


class Verifier:
    """A logits processor that asks the model about other prompts, and lets everything pass."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.seen: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.model(**clones(self.inputs)).logits)
        return scores


@pytest.mark.parametrize("method", ["hired", "random", FastV(k=1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["cache", "no cache", "beams"])
def test_a_forward_inside_generate_equals_one_outside(method: Any, options: dict[str, Any], llava: Tiny) -> None:
    check_inside(llava, method, options)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_a_forward_inside_generate_equals_one_outside_on_other_families(name: str) -> None:
    check_inside(fresh(name), "hired", {})


def check_inside(tiny: Tiny, method: Any, options: dict[str, Any]) -> None:
    model, other = tiny.model, other_prompts(tiny)
    with torch.no_grad():
        plain = model.generate(**tiny.clone(), **SAMPLE, **options)
        disturbed = model.generate(**tiny.clone(), **SAMPLE, **options, logits_processor=[Verifier(model, other)])
    if not torch.equal(plain, disturbed):  # Qwen-VL keeps what its last prompts added to positions on itself
        pytest.skip(f"the unpatched model of transformers {transformers.__version__} itself goes on otherwise")
    with torch.no_grad(), vlm_budget.patch(model, method, 0.4) as handle:
        outside = model(**clones(other)).logits
        alone = model.generate(**tiny.clone(), **SAMPLE, **options)
        kept = positions(handle)
        verifier = Verifier(model, other)
        verified = model.generate(**tiny.clone(), **SAMPLE, **options, logits_processor=[verifier])
        assert positions(handle) == kept, "the report is about the prompts of generate"
    assert torch.equal(alone, verified)
    assert len(verifier.seen) == SAMPLE["max_new_tokens"]
    for inside in verifier.seen:
        torch.testing.assert_close(inside, outside, **TOLERANCE)


@pytest.mark.parametrize("method", ["hired", FastV(k=1)], ids=str)
def test_a_generate_inside_generate_equals_one_outside(method: Any, llava: Tiny) -> None:
    model, other = llava.model, other_prompts(llava)
    seen: list[torch.Tensor] = []

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(model.generate(**clones(other), **SAMPLE))
        return scores

    with torch.no_grad(), vlm_budget.patch(model, method, 0.4) as handle:
        outside = model.generate(**clones(other), **SAMPLE)
        alone = model.generate(**llava.clone(), **SAMPLE)
        kept = positions(handle)
        assert torch.equal(model.generate(**llava.clone(), **SAMPLE, logits_processor=[ask]), alone)
        assert positions(handle) == kept
    assert all(torch.equal(inside, outside) for inside in seen)


def test_an_interrupted_forward_inside_generate_leaves_nothing_behind(llava: Tiny) -> None:
    model, other = llava.model, other_prompts(llava)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def ask(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        boom = model.model.language_model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(**clones(other))
        boom.remove()
        return scores

    with torch.no_grad(), vlm_budget.patch(model, "hired", 0.4):
        outside = model(**clones(other)).logits
        alone = model.generate(**llava.clone(), **SAMPLE)
        assert torch.equal(model.generate(**llava.clone(), **SAMPLE, logits_processor=[ask]), alone)
        torch.testing.assert_close(model(**clones(other)).logits, outside, **TOLERANCE)


def test_tokens_are_never_cut_off_silently(llava: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever makes the host believe that rows are shorter than they are."""
    right = Prompts.lengths

    def wrong(*args: Any) -> Any:
        rows = right(*args)
        assert rows is not None
        rows.lengths[0] -= 1
        return rows

    monkeypatch.setattr(Prompts, "lengths", wrong)
    with (
        torch.no_grad(),
        vlm_budget.patch(llava.model, "hired", 0.4),
        pytest.raises(SelectionError, match=r"rows .* were taken to hold \[\d+, \d+\] tokens and kept"),
    ):
        llava.model(**llava.clone())
