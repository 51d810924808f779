"""The same tokens on every attention backend, and under ``torch.compile``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlm_budget
from tiny_parts import row_inputs

from .conftest import BUDGET, VISION, Case, case
from .patched import DECODED, TOLERANCE, forward, generate, unpatched_or_skip
from .reference import rows

FLASH = "flash_attention_2"


def flash_stand_in(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention's contract on the CPU: a 2-D padding mask as long as the keys, or packed sequences, or nothing."""
    assert attention_mask is None or attention_mask.shape == (len(key), key.shape[2])
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    rows, columns = query.shape[2], key.shape[2]
    seen = torch.ones(rows, columns, dtype=torch.bool)
    if module.is_causal if is_causal is None else is_causal:
        seen = seen.tril(columns - rows)
    ends = kwargs.get("cu_seq_lens_q")
    if ends is not None:
        part = torch.bucketize(torch.arange(rows), ends[1:], right=True)
        seen = seen & (part[:, None] == part)
    seen = seen[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, :]
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return output.nan_to_num().transpose(1, 2).contiguous(), None


def use_flash(model: Any) -> None:
    """Set the name without the check for a GPU."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            module.config._attn_implementation_internal = FLASH


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where transformers looks for the kernel."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, FLASH, flash_stand_in)


def flash_or_skip(known: Case) -> None:
    """Switch to flash; it cannot do prefix or blockwise masks, which PaliGemma and Gemma 3 would need."""
    tiny = known.tiny

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return tiny.model(**tiny.clone()).logits[tiny.inputs["attention_mask"].bool()]

    want = logits()
    use_flash(tiny.model)
    unpatched_or_skip(lambda: torch.testing.assert_close(logits(), want, **DECODED), None, "flash attention")


def test_eager(generating_case: Case) -> None:
    generating_case.tiny.model.set_attn_implementation("eager")
    with generating_case.patch():
        assert generate(generating_case.tiny.model, generating_case.tiny.clone()) == generating_case.pruned


def test_two_dimensional_masks(generating_case: Case, flash: None) -> None:
    flash_or_skip(generating_case)
    with generating_case.patch():
        assert generate(generating_case.tiny.model, generating_case.tiny.clone()) == generating_case.pruned


def test_dropping_with_two_dimensional_masks_equals_the_reference_on_the_same_backend(
    any_case: Case, flash: None
) -> None:
    tiny = any_case.tiny
    use_flash(tiny.model)
    full = rows(tiny.model, tiny.clone())
    with any_case.patch() as handle:
        found = forward(handle, tiny.clone(), full)
    for row, columns, logits in zip(full, found.columns, found.logits, strict=True):
        want = row.compact(columns, packed=not row.multi_axis).logits()
        torch.testing.assert_close(logits[columns], want, **TOLERANCE)


def test_beams_on_two_dimensional_masks(generating_case: Case, flash: None) -> None:
    tiny = generating_case.tiny

    def beams() -> list[list[int]]:
        return generate(tiny.model, row_inputs(tiny, 1), num_beams=2)

    unpatched_or_skip(beams, None, "beams")
    with generating_case.patch():
        expected = beams()
    flash_or_skip(generating_case)
    with generating_case.patch():
        assert beams() == expected


def test_gaps_behind_a_cache_are_refused_where_flash_attention_would_misread_them(
    llava_case: Case, flash: None
) -> None:
    tiny = llava_case.tiny
    use_flash(tiny.model)
    inputs = row_inputs(tiny, 1)
    for positions in ("packed", "original"):
        with vlm_budget.patch(tiny.model, "uniform", BUDGET, positions=positions), torch.no_grad():
            first = tiny.model(**inputs, use_cache=True)  # without a cache, one sequence with gaps is still one
            later = {**inputs, "attention_mask": torch.ones(1, 2 * inputs["input_ids"].shape[1], dtype=torch.long)}
            if positions == "packed":
                tiny.model(**later, past_key_values=first.past_key_values)
                continue
            with pytest.raises(vlm_budget.PatchError, match="Use positions='packed'"):
                tiny.model(**later, past_key_values=first.past_key_values)


@pytest.mark.parametrize("method", VISION)
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_every_method_keeps_the_same_tokens_on_every_backend(name: str, method: str, flash: None) -> None:
    tiny = case(name).tiny
    kept = []
    for use in (
        lambda: None,
        lambda: tiny.model.set_attn_implementation("eager"),
        lambda: use_flash(tiny.model),
    ):
        use()
        with vlm_budget.patch(tiny.model, method, BUDGET) as handle, torch.no_grad():
            tiny.model(**tiny.clone())
            kept.append([item.positions for item in handle.kept()])
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl"])
def test_flex_attention(name: str) -> None:
    known = case(name)
    tiny = known.tiny

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return tiny.model(**tiny.clone()).logits[:, -1]

    with known.patch():
        want = logits()

    def use_flex() -> None:
        tiny.model.set_attn_implementation("flex_attention")
        logits()

    # Its compilation takes a minute on one core; the contract is about masks, which eager reads alike.
    with torch.compiler.set_stance("force_eager"):
        unpatched_or_skip(use_flex, None, "flex attention on the CPU")
        with known.patch():
            torch.testing.assert_close(logits(), want, **TOLERANCE)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_compiled_with_graph_breaks(name: str) -> None:
    known = case(name)
    tiny = known.tiny
    torch._dynamo.reset()
    compiled = torch.compile(tiny.model, backend="eager", fullgraph=False)
    with known.patch(), torch.no_grad():
        want = tiny.model(**tiny.clone()).logits
        torch.testing.assert_close(compiled(**tiny.clone()).logits, want, **TOLERANCE)
        if name == "llava":
            assert generate(compiled, tiny.clone()) == known.pruned
    torch._dynamo.reset()


def test_a_model_that_has_run_compiled_can_be_patched(llava_case: Case) -> None:
    tiny = llava_case.tiny
    torch._dynamo.reset()
    compiled = torch.compile(tiny.model, backend="eager", fullgraph=False)
    with torch.no_grad():
        before = compiled(**tiny.clone()).logits
        with vlm_budget.patch(compiled, "hired", BUDGET) as handle:
            assert handle.model is tiny.model
            logits = compiled(**tiny.clone()).logits
            assert handle.report().kept_tokens < handle.report().visual_tokens
        valid = tiny.inputs["attention_mask"].bool()
        for part, mask, want in zip(logits, valid, llava_case.prefill.logits, strict=True):
            torch.testing.assert_close(part[mask], want, **TOLERANCE)
        torch.testing.assert_close(compiled(**tiny.clone()).logits, before, **TOLERANCE)
    torch._dynamo.reset()


def test_patching_forgets_compiled_code_of_compiled_models_only(
    llava_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    with llava_case.patch():
        assert not resets
    llava_case.tiny.model.compile(backend="eager")
    with llava_case.patch():
        assert len(resets) == 1


@pytest.mark.parametrize("method", VISION)
def test_half_precision(llava_case: Case, method: str) -> None:
    tiny = llava_case.tiny
    model = tiny.model.to(torch.bfloat16)
    inputs = tiny.clone()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        before = model(**inputs).logits
        with vlm_budget.patch(model, method, 1.0):
            assert torch.equal(model(**inputs).logits, before)
        with vlm_budget.patch(model, method, BUDGET):
            logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert logits[tiny.inputs["attention_mask"].bool()].isfinite().all()
