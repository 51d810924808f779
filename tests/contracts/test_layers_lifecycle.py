"""Patching, undoing, copying and failing, with hooks and probes on decoder layers; training, backends and refusals."""

from __future__ import annotations

import copy
import io
import threading
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import vlm_budget
from fingerprint import changes, fingerprint
from tiny_parts import FLOOR, row_inputs
from vlm_budget import PatchError, Plan, PlanError, SelectionError
from vlm_budget.decoder import DecoderContext

from .layered import Layered, layered
from .patched import DECODED, TOLERANCE, generate, unpatched_or_skip
from .reference import language_model, rows
from .schedules import GENERATING, KINDS, Attended, Case, OwnAttended, Recycled, Scheduled, case, fresh, unpruned
from .test_backends import flash, use_flash  # noqa: F401, a fixture
from .test_lifecycle import Thrown, assert_unchanged, assert_untouched_by_us, decoder_layer, warm
from .test_training import decoder_gradients, labelled

METHODS = [Scheduled(), Attended(), OwnAttended()]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Case:
    """One set-up of every kind."""
    return case(request.param)


@pytest.fixture
def llava() -> Case:
    """The plainest set-up."""
    return case("llava")


# --- undoing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.scores)
def test_undo_restores_every_object(kind: Case, method: Scheduled) -> None:
    before, own = warm(kind.tiny)
    handle = vlm_budget.patch(kind.tiny.model, [PRUNED_BEFORE, method], 0.3)
    assert changes(before, fingerprint(kind.tiny.model))
    generate(kind.tiny.model, kind.tiny.clone())
    handle.undo()
    assert_unchanged(kind.tiny, before, own)
    assert_untouched_by_us(kind.tiny.model)
    assert kind.run() == unpruned(kind.name)


PRUNED_BEFORE = "hired"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.scores)
def test_an_exception_in_a_layer_leaves_the_patch_whole(kind: Case, method: Scheduled) -> None:
    model = kind.tiny.model
    with vlm_budget.patch(model, method) as handle:
        want = kind.run()

        def throw(*_: Any) -> None:
            raise Thrown

        hook = language_model(model).layers[3].register_forward_pre_hook(throw)
        for run in (kind.run, lambda: model(**kind.tiny.clone())):
            with pytest.raises(Thrown):
                run()
        hook.remove()
        dropper = handle._boundary.dropper
        assert dropper is not None and dropper.run is None
        assert not any(sink.wanted for sink in dropper.sinks.values())
        assert kind.run() == want


@dataclass(frozen=True, kw_only=True)
class Faulty(OwnAttended):
    """Breaks its promise in the way it is told."""

    fault: str = "raise"

    def pick(self, ctx: DecoderContext, k: int) -> Any:
        keep = torch.arange(k)
        return {
            "raise": lambda: 1 / 0,
            "count": lambda: torch.arange(k + 1),
            "twice": lambda: torch.cat([keep[:-1], keep[:1]]),
            "dtype": lambda: keep.float(),
            "range": lambda: keep + len(ctx.alive),
            "values": lambda: vlm_budget.Selection(keep, torch.zeros(k, 3)),
        }[self.fault]()


@pytest.mark.parametrize("fault", ["raise", "count", "twice", "dtype", "range", "values"])
def test_a_method_that_breaks_its_promise_is_caught(llava: Case, fault: str) -> None:
    model = llava.tiny.model
    error = ZeroDivisionError if fault == "raise" else SelectionError
    with vlm_budget.patch(model, Faulty(fault=fault)):
        for run in (llava.run, lambda: model(**llava.tiny.clone())):
            with pytest.raises(error, match=None if fault == "raise" else "promised .* distinct tokens .* at layer 2"):
                run()
    with llava.patch():
        assert llava.run() == llava.pruned


# --- copies ----------------------------------------------------------------------------------------------------------


def test_a_deepcopy_is_patched_by_an_owner_of_its_own(kind: Case) -> None:
    handle = vlm_budget.patch(kind.tiny.model, Attended())
    twin = copy.deepcopy(kind.tiny.model)
    want = kind.run()
    assert generate(twin, kind.tiny.clone()) == want
    handle.undo()
    assert kind.run() == unpruned(kind.name)
    assert generate(twin, kind.tiny.clone()) == want
    vlm_budget.unpatch(twin)
    assert_untouched_by_us(twin)
    assert generate(twin, kind.tiny.clone()) == unpruned(kind.name)


def test_torch_save_keeps_the_patch(kind: Case) -> None:
    used = kind.tiny.model
    # A forward of transformers 5.x may leave recording hooks that cannot be pickled: take a model that never ran.
    model = type(used)(used.config).eval()
    model.load_state_dict(used.state_dict())
    model.generation_config = used.generation_config
    with vlm_budget.patch(model, Scheduled()):
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert generate(loaded, kind.tiny.clone()) == kind.pruned
    vlm_budget.unpatch(loaded)
    assert generate(loaded, kind.tiny.clone()) == unpruned(kind.name)


def test_threads_do_not_see_each_other(llava: Case) -> None:
    tiny, found = llava.tiny, {}
    with vlm_budget.patch(tiny.model, Attended()):
        want = [generate(tiny.model, row_inputs(tiny, row)) for row in (0, 1)]

        def run(row: int) -> None:
            found[row] = [generate(tiny.model, row_inputs(tiny, row)) for _ in range(3)]

        threads = [threading.Thread(target=run, args=(row,)) for row in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {row: [want[row]] * 3 for row in (0, 1)}


def test_a_plan_is_replayed(kind: Case) -> None:
    tiny = kind.tiny
    with kind.patch() as handle:
        promised = handle.plan(**tiny.clone())
    carried = Plan.from_json(promised.to_json())
    with vlm_budget.patch(tiny.model, Scheduled(shares=()), plan=carried) as handle:
        assert kind.run() == kind.pruned
        assert handle.report().plan == promised


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_hidden_states_come_back_in_the_callers_columns(kind: Case) -> None:
    tiny = kind.tiny
    if FLOOR and tiny.family == "qwen3_vl":
        pytest.skip("4.x records Qwen3-VL's hidden states outside of every hook, around the outermost forward")
    with torch.no_grad():
        before = tiny.model(**tiny.clone(), output_hidden_states=True).hidden_states
        with kind.patch():
            output = tiny.model(**tiny.clone(), output_hidden_states=True)
    assert [h.shape for h in output.hidden_states] == [h.shape for h in before]
    valid = tiny.inputs["attention_mask"].bool()
    for index, prompt in enumerate(kind.prompts):
        for layer, want in enumerate(prompt.hidden_states()):
            if layer <= len(prompt.row.deepstack):
                continue  # recorded before visual features are added; Gemma's input before it is scaled, on 4.x
            above = [drop.columns for drop in prompt.drops if drop.layer < layer]
            left = above[-1] if above else list(range(prompt.row.length))
            torch.testing.assert_close(output.hidden_states[layer][index][valid[index]][left], want, **DECODED)


# --- training --------------------------------------------------------------------------------------------------------


def compacted_loss(prompts: list[Layered], labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over all labelled tokens of the batch, each prompt by hand."""
    total, count = torch.zeros(()), 0
    for prompt, mine, mask in zip(prompts, labels, valid, strict=True):
        logits = prompt.row.model.lm_head(prompt.graph()[-1][0]).float()
        wanted = mine[mask][prompt.left][1:]
        total = total + cross_entropy(logits[:-1], wanted, ignore_index=-100, reduction="sum")
        count += int((wanted != -100).sum())
    return total / count


@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_equal_the_compacted_ones(kind: Case, training: bool) -> None:
    tiny, model = kind.tiny, kind.tiny.model
    model.train(training)
    inputs = labelled(tiny)
    full = rows(model, inputs)
    with vlm_budget.patch(model, Recycled() if training else Attended()) as handle:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        kept = handle.kept()
    found = decoder_gradients(model)
    assert found
    if training:
        return  # what was put in has no reference here; it must have let gradients through
    want = compacted_loss(layered(full, kept, False, False), inputs["labels"], inputs["attention_mask"].bool())
    want.backward()
    torch.testing.assert_close(loss, want, **TOLERANCE)
    for name, gradient in decoder_gradients(model).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


def test_gradient_checkpointing(kind: Case) -> None:
    model = kind.tiny.model
    model.train()
    inputs = labelled(kind.tiny)
    with vlm_budget.patch(model, Attended()):
        plain = model(**inputs, use_cache=False).loss
        plain.backward()
        expected = decoder_gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if FLOOR:  # hooks run inside of what is checkpointed, and would run twice
            with pytest.raises(PatchError, match="gradient checkpointing off"):
                model(**inputs, use_cache=False)
            return
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
    torch.testing.assert_close(loss, plain, **TOLERANCE)
    for name, gradient in decoder_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], **TOLERANCE)


# --- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATING)
def test_eager(name: str) -> None:
    known = case(name)
    known.tiny.model.set_attn_implementation("eager")
    with known.patch():
        assert known.run() == known.pruned


@pytest.mark.parametrize("name", GENERATING)
def test_two_dimensional_masks(name: str, flash: None) -> None:  # noqa: F811
    known = case(name)
    with vlm_budget.patch(known.tiny.model, OwnAttended()):
        want = known.run()
    use_flash(known.tiny.model)
    unpatched_or_skip(known.run, unpruned(name), "flash attention")
    with known.patch():
        assert known.run() == known.pruned
    with vlm_budget.patch(known.tiny.model, OwnAttended()):
        assert known.run() == want


def test_the_backend_can_be_switched_while_patched(llava: Case) -> None:
    with vlm_budget.patch(llava.tiny.model, Attended()):
        want = llava.run()
        for backend in ("eager", "sdpa"):
            llava.tiny.model.set_attn_implementation(backend)
            assert llava.run() == want


def test_compiled_with_graph_breaks(llava: Case) -> None:
    tiny = llava.tiny
    torch._dynamo.reset()
    compiled = torch.compile(tiny.model, backend="eager", fullgraph=False)
    with vlm_budget.patch(tiny.model, Attended()) as handle, torch.no_grad():
        want = tiny.model(**tiny.clone()).logits
        kept = [item.steps for item in handle.kept()]
        torch.testing.assert_close(compiled(**tiny.clone()).logits, want, **TOLERANCE)
        assert [item.steps for item in handle.kept()] == kept
    torch._dynamo.reset()


def test_half_precision(llava: Case) -> None:
    model, inputs = llava.tiny.model.to(torch.bfloat16), llava.tiny.clone()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.no_grad(), vlm_budget.patch(model, Attended()):
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert logits[inputs["attention_mask"].bool()].isfinite().all()


# --- refusals --------------------------------------------------------------------------------------------------------


def test_sliding_windows_are_refused() -> None:
    model = fresh("gemma3").model
    before = fingerprint(model)
    with pytest.raises(PatchError, match="sliding_attention.*Drop before the language model instead"):
        vlm_budget.patch(model, Scheduled())
    assert changes(before, fingerprint(model)) == []


def test_flex_attention_is_refused_also_when_switched_to_later(llava: Case) -> None:
    model = llava.tiny.model
    handle = llava.patch()
    # The name alone: setting it asks for kernels this machine may lack.
    language_model(model).config._attn_implementation_internal = "flex_attention"
    with pytest.raises(PatchError, match="'flex_attention'.*attn_implementation='sdpa'"):
        llava.run()
    handle.undo()
    with pytest.raises(PatchError, match="'flex_attention'.*attn_implementation='sdpa'"):
        llava.patch()


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [("llava", 6, "layers 0 to 5. Drop at one of the layers 1 to 5"), ("qwen3_vl", 1, "Start at layer 2 or later")],
)
def test_layers_where_nothing_can_be_dropped_are_refused(name: str, layer: int, message: str) -> None:
    known = case(name)
    with vlm_budget.patch(known.tiny.model, Scheduled(shares=((layer, 0.5),))) as handle:
        for run in (lambda: handle.plan(**known.tiny.clone()), known.run):
            with pytest.raises(PatchError, match=message):
                run()
    with known.patch() as handle:
        plan = handle.plan(**known.tiny.clone())
    places = {2: layer, 4: layer + 7}
    items = [replace(item, steps=tuple((places[at], keep) for at, keep in item.steps)) for item in plan.items]
    moved = replace(plan, items=tuple(items))
    with pytest.raises(PatchError, match=message):
        vlm_budget.patch(known.tiny.model, Scheduled(), plan=moved)


def test_a_plan_with_steps_needs_a_method_inside(llava: Case) -> None:
    with llava.patch() as handle:
        plan = handle.plan(**llava.tiny.clone())
    with pytest.raises(PlanError, match="drops tokens at decoder layers \\[2, 4\\], and .* does not act inside"):
        vlm_budget.patch(llava.tiny.model, "uniform", plan=plan)


def test_an_exception_while_decoding_leaves_the_cache_whole(llava: Case) -> None:
    tiny = llava.tiny
    with llava.patch(), torch.no_grad():
        output = tiny.model.generate(**tiny.clone(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache, length = output.past_key_values, output.past_key_values.get_seq_length()

        def throw(*_: Any) -> None:
            raise Thrown

        hook = decoder_layer(tiny.model).register_forward_pre_hook(throw)
        mask = torch.nn.functional.pad(tiny.inputs["attention_mask"], (0, 3), value=1)
        with pytest.raises(Thrown):
            tiny.model(input_ids=output.sequences[:, -1:], attention_mask=mask, past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length(5) == length
