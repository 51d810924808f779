"""Patching, undoing, replacing, copying and saving: a patch leaves nothing behind and gets in nobody's way."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vlm_budget
from fingerprint import Fingerprint, changes, fingerprint
from tiny_parts import Tiny
from vlm_budget import PatchError, Plan
from vlm_budget.engine import boundary

from .conftest import BUDGET, EACH_ONCE, METHOD, Case, case, fresh
from .patched import SAMPLE, generate
from .reference import language_model


def warm(tiny: Tiny) -> tuple[Fingerprint, set[str]]:
    """A fingerprint after runs, and the names a run changes by itself (``rope_deltas``, recording hooks)."""
    generate(tiny.model, tiny.clone())
    first = fingerprint(tiny.model)
    generate(tiny.model, tiny.clone())
    after = fingerprint(tiny.model)
    return after, set(changes(first, after))


def assert_unchanged(tiny: Tiny, before: Fingerprint, own: set[str]) -> None:
    assert [name for name in changes(before, fingerprint(tiny.model)) if name not in own] == []


def test_undo_restores_every_object(generating_case: Case) -> None:
    tiny = generating_case.tiny
    before, own = warm(tiny)
    handle = generating_case.patch()
    assert handle.active
    assert changes(before, fingerprint(tiny.model))
    assert generate(tiny.model, tiny.clone()) == generating_case.pruned
    handle.undo()
    assert not handle.active
    assert_unchanged(tiny, before, own)
    assert generate(tiny.model, tiny.clone()) == generating_case.unpruned
    handle.undo()
    assert_unchanged(tiny, before, own)


def test_undo_without_a_run_in_between(any_case: Case) -> None:
    before = fingerprint(any_case.tiny.model)
    with any_case.patch():
        pass
    assert changes(before, fingerprint(any_case.tiny.model)) == []


def test_undo_keeps_hooks_that_others_added_meanwhile(llava_case: Case) -> None:
    tiny, seen = llava_case.tiny, []
    decoder = language_model(tiny.model)
    early = decoder.register_forward_pre_hook(lambda *_: seen.append("early"))
    with llava_case.patch():
        late = decoder.register_forward_pre_hook(lambda *_: seen.append("late"))
    generate(tiny.model, tiny.clone(), max_new_tokens=1)
    assert seen == ["early", "late"]
    early.remove()
    late.remove()


def test_a_method_the_user_replaced_on_the_instance_is_called_and_stays(llava_case: Case) -> None:
    tiny, calls = llava_case.tiny, []
    original = tiny.model.generate

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    tiny.model.generate = mine
    with llava_case.patch():
        assert generate(tiny.model, tiny.clone()) == llava_case.pruned
    assert len(calls) == 1
    assert tiny.model.generate is mine


# --- exceptions ------------------------------------------------------------------------------------------------------


class Thrown(Exception):
    """Raised by the tests in the middle of a forward."""


def vision_layer(model: Any) -> nn.Module:
    """A layer somewhere in the vision tower."""
    base = model.model
    tower = next(getattr(base, name) for name in ("vision_tower", "vision_model", "visual") if hasattr(base, name))
    return next(
        module for name, module in tower.named_modules() if name.endswith(".1") and len(list(module.children())) > 2
    )


def decoder_layer(model: Any) -> nn.Module:
    """A layer in the middle of the language model."""
    return language_model(model).layers[1]


@pytest.mark.parametrize("place", [vision_layer, decoder_layer])
@pytest.mark.parametrize(("name", "method"), EACH_ONCE)
def test_an_exception_inside_a_forward_leaves_the_patch_whole(
    name: str, method: str, place: Callable[[Any], nn.Module]
) -> None:
    tiny = fresh(name)
    before, own = warm(tiny)
    runs = (lambda: generate(tiny.model, tiny.clone()), lambda: tiny.model(**tiny.clone()))

    def fail(run: Callable[[], Any]) -> None:
        def throw(*_: Any) -> None:
            raise Thrown

        hook = place(tiny.model).register_forward_pre_hook(throw)
        with pytest.raises(Thrown):
            run()
        hook.remove()

    for run in runs:
        fail(run)
    own |= set(changes(before, fingerprint(tiny.model)))  # what 4.x itself leaves behind: wrapped forwards of layers
    with vlm_budget.patch(tiny.model, method, BUDGET):
        want = generate(tiny.model, tiny.clone())
        inside = fingerprint(tiny.model)
        for run in runs:
            fail(run)
            assert [name for name in changes(inside, fingerprint(tiny.model)) if name not in own] == []
            assert generate(tiny.model, tiny.clone()) == want
    assert_unchanged(tiny, before, own)


def test_an_exception_while_decoding_leaves_the_cache_whole(llava_case: Case) -> None:
    tiny = llava_case.tiny
    layer = decoder_layer(tiny.model)
    with llava_case.patch(), torch.no_grad():
        output = tiny.model.generate(**tiny.clone(), **SAMPLE, return_dict_in_generate=True)
        cache = output.past_key_values
        length = cache.get_seq_length()

        def throw(*_: Any) -> None:
            raise Thrown

        hook = language_model(tiny.model).layers[0].register_forward_pre_hook(throw)
        step = {"input_ids": output.sequences[:, -1:], "past_key_values": cache}
        mask = torch.nn.functional.pad(tiny.inputs["attention_mask"], (0, SAMPLE["max_new_tokens"]), value=1)
        with pytest.raises(Thrown):
            tiny.model(**step, attention_mask=mask)
        hook.remove()
        assert cache.get_seq_length() == length
        assert layer is decoder_layer(tiny.model)
        assert tiny.model(**step, attention_mask=mask).logits.isfinite().all()


def test_an_exception_in_a_with_block_undoes(llava_case: Case) -> None:
    before = fingerprint(llava_case.tiny.model)
    with pytest.raises(Thrown), llava_case.patch():
        raise Thrown
    assert changes(before, fingerprint(llava_case.tiny.model)) == []


@pytest.mark.parametrize("failing", range(8))
def test_a_failure_while_patching_rolls_back(llava_case: Case, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of the installation in turn: hooks, taps, probes."""
    from vlm_budget import patching
    from vlm_budget.engine import observe, taps

    tiny, steps = llava_case.tiny, [0]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            steps[0] += 1
            if steps[0] == failing + 1:
                raise Thrown
            return original(*args, **kwargs)

        return step

    before = fingerprint(tiny.model)
    monkeypatch.setattr(observe, "attach", counted(observe.attach))
    monkeypatch.setattr(taps.Tap, "attach", counted(taps.Tap.attach))
    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", counted(nn.Module.register_forward_pre_hook))
    monkeypatch.setattr(nn.Module, "register_forward_hook", counted(nn.Module.register_forward_hook))
    with pytest.raises(Thrown):
        llava_case.patch()
    assert changes(before, fingerprint(tiny.model)) == []
    monkeypatch.undo()
    assert patching.find_family(tiny.model)
    assert generate(tiny.model, tiny.clone()) == llava_case.unpruned


# --- replacing -------------------------------------------------------------------------------------------------------


def test_patching_twice_replaces_and_undo_restores_the_unpatched_model(generating_case: Case) -> None:
    tiny = generating_case.tiny
    before, own = warm(tiny)
    first = vlm_budget.patch(tiny.model, "uniform", 0.8)
    second = generating_case.patch()
    assert not first.active
    assert second.active
    assert generate(tiny.model, tiny.clone()) == generating_case.pruned
    first.undo()
    assert second.active
    assert generate(tiny.model, tiny.clone()) == generating_case.pruned
    second.undo()
    assert_unchanged(tiny, before, own)


def test_a_failed_second_patch_leaves_the_first(generating_case: Case) -> None:
    tiny = generating_case.tiny
    before, own = warm(tiny)
    first = generating_case.patch()
    with pytest.raises(PatchError, match="no layer 99"):
        vlm_budget.patch(tiny.model, "hired", BUDGET, final_layer=99)
    assert first.active
    assert generate(tiny.model, tiny.clone()) == generating_case.pruned
    first.undo()
    assert_unchanged(tiny, before, own)


def test_patching_the_inner_model_replaces_a_patch_of_the_outer(llava_case: Case) -> None:
    tiny = llava_case.tiny
    before, own = warm(tiny)
    outer = vlm_budget.patch(tiny.model, "uniform", 0.8)
    inner = vlm_budget.patch(tiny.model.model, METHOD, BUDGET)
    assert not outer.active
    assert generate(tiny.model, tiny.clone()) == llava_case.pruned
    vlm_budget.unpatch(tiny.model)
    assert not inner.active
    assert_unchanged(tiny, before, own)


def test_two_models_patched_differently_at_once() -> None:
    llava, qwen, other = case("llava"), case("qwen2_5_vl"), case("llava")
    budget = 0.8
    with llava.patch(), qwen.patch(), vlm_budget.patch(other.tiny.model, "uniform", budget) as third:
        assert generate(llava.tiny.model, llava.tiny.clone()) == llava.pruned
        tokens = generate(other.tiny.model, other.tiny.clone())
        assert generate(qwen.tiny.model, qwen.tiny.clone()) == qwen.pruned
        assert generate(llava.tiny.model, llava.tiny.clone()) == llava.pruned
        assert generate(other.tiny.model, other.tiny.clone()) == tokens
        assert third.report().kept_tokens > BUDGET * third.report().visual_tokens
    assert generate(llava.tiny.model, llava.tiny.clone()) == llava.unpruned


# --- copies ----------------------------------------------------------------------------------------------------------


def test_a_deepcopy_is_patched_by_an_owner_of_its_own(generating_case: Case) -> None:
    tiny = generating_case.tiny
    before, own = warm(tiny)
    handle = generating_case.patch()
    twin = copy.deepcopy(tiny.model)
    assert generate(twin, tiny.clone()) == generating_case.pruned
    hooks = [hook for module in twin.modules() for hook in module._forward_pre_hooks.values()]
    owners = {hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), boundary.Boundary)}
    (owner,) = owners
    assert owner.base is twin.model
    handle.undo()
    assert_unchanged(tiny, before, own)
    assert generate(tiny.model, tiny.clone()) == generating_case.unpruned
    assert generate(twin, tiny.clone()) == generating_case.pruned
    vlm_budget.unpatch(twin)
    assert generate(twin, tiny.clone()) == generating_case.unpruned
    assert_untouched_by_us(twin)


def test_undoing_a_copy_leaves_the_original_patched(llava_case: Case) -> None:
    tiny = llava_case.tiny
    with llava_case.patch() as handle:
        twin = copy.deepcopy(tiny.model)
        vlm_budget.unpatch(twin)
        assert_untouched_by_us(twin)
        assert generate(twin, tiny.clone()) == llava_case.unpruned
        assert handle.active
        assert generate(tiny.model, tiny.clone()) == llava_case.pruned


def test_a_copy_uses_its_own_weights(llava_case: Case) -> None:
    tiny = llava_case.tiny
    with llava_case.patch():
        twin = copy.deepcopy(tiny.model)
        for parameter in twin.model.multi_modal_projector.parameters():
            parameter.data.zero_()
        assert generate(twin, tiny.clone()) != llava_case.pruned
        with torch.no_grad():
            assert all(part.abs().max() == 0 for part in projected(twin, tiny))
        assert generate(tiny.model, tiny.clone()) == llava_case.pruned


def projected(model: Any, tiny: Tiny) -> list[torch.Tensor]:
    features = model.get_image_features(pixel_values=tiny.inputs["pixel_values"])
    return list(getattr(features, "pooler_output", features))


def assert_untouched_by_us(model: nn.Module) -> None:
    """No object of this library hangs on the model."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            held = [value, *(value.values() if isinstance(value, dict) else ())]
            for item in held:
                where = type(getattr(item, "__self__", item)).__module__
                assert not where.startswith("vlm_budget"), f"{path}.{name} holds {item}"


def test_an_undone_model_holds_nothing_of_ours(any_case: Case) -> None:
    with any_case.patch():
        pass
    assert_untouched_by_us(any_case.tiny.model)


def test_a_patched_model_that_is_dropped_is_freed() -> None:
    known = case("llava")
    handle = known.patch()
    generate(known.tiny.model, known.tiny.clone())
    gone = weakref.ref(known.tiny.model)
    del handle, known
    gc.collect()
    assert gone() is None


# --- saving ----------------------------------------------------------------------------------------------------------


def test_save_pretrained_saves_the_unpatched_model(generating_case: Case, tmp_path: Path) -> None:
    tiny = generating_case.tiny
    tiny.model.save_pretrained(tmp_path / "before")
    with generating_case.patch():
        keys = list(tiny.model.state_dict())
        tiny.model.save_pretrained(tmp_path / "patched")
        assert generate(tiny.model, tiny.clone()) == generating_case.pruned
    assert keys == list(tiny.model.state_dict())
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "patched" / file).read_text() == (tmp_path / "before" / file).read_text()
    loaded = type(tiny.model).from_pretrained(tmp_path / "patched").eval()
    assert_untouched_by_us(loaded)
    assert generate(loaded, tiny.clone()) == generating_case.unpruned


def test_torch_save_keeps_the_patch(generating_case: Case) -> None:
    used = generating_case.tiny.model
    # A forward of transformers 5.x may leave recording hooks that cannot be pickled: take a model that never ran.
    model = type(used)(used.config).eval()
    model.load_state_dict(used.state_dict())
    model.generation_config = used.generation_config
    with vlm_budget.patch(model, METHOD, BUDGET):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert generate(loaded, generating_case.tiny.clone()) == generating_case.pruned
    vlm_budget.unpatch(loaded)
    assert_untouched_by_us(loaded)
    assert generate(loaded, generating_case.tiny.clone()) == generating_case.unpruned


def test_the_backend_can_be_switched_while_patched(llava_case: Case) -> None:
    tiny = llava_case.tiny
    before, own = warm(tiny)
    with llava_case.patch():
        tiny.model.set_attn_implementation("eager")
        assert generate(tiny.model, tiny.clone()) == llava_case.pruned
        tiny.model.set_attn_implementation("sdpa")
        assert generate(tiny.model, tiny.clone()) == llava_case.pruned
    assert_unchanged(tiny, before, own)


def test_a_report_before_any_prompt_is_refused(llava_case: Case) -> None:
    with llava_case.patch() as handle, pytest.raises(PatchError, match="no prompt has run"):
        handle.report()


def test_a_plan_is_replayed(generating_case: Case) -> None:
    tiny = generating_case.tiny
    with generating_case.patch() as handle:
        promised = handle.plan(**tiny.clone())
    carried = Plan.from_json(promised.to_json())
    with vlm_budget.patch(tiny.model, METHOD, plan=carried) as handle:
        assert generate(tiny.model, tiny.clone()) == generating_case.pruned
        assert handle.report().plan == handle.plan(**tiny.clone()) == promised
