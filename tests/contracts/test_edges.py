"""Corners where two features meet."""

from __future__ import annotations

import threading

import pytest
import torch

import tiny_models
import vlm_budget
from tiny_parts import Tiny
from vlm_budget import LayoutError, PatchError
from vlm_budget.layout import VisualItem
from vlm_budget.patching import find_family, layout_of
from vlm_budget.pruner import Context, Pruner, Selection

from .patched import encode, generate, unpatched_or_skip
from .reference import language_model


def test_features_of_another_method_are_refused(llava: Tiny) -> None:
    text = {name: llava.clone()[name] for name in ("input_ids", "attention_mask")}
    for earlier, later in (("uniform", "hired"), ("cls_topk", "hired")):
        with vlm_budget.patch(llava.model, earlier, 0.3):
            encoded = encode(llava.model, llava.clone())
        if not hasattr(encoded["image"], "pooler_output"):
            pytest.skip("this version of transformers takes no encoded features")
        with (
            vlm_budget.patch(llava.model, later, 0.3),
            torch.no_grad(),
            pytest.raises(LayoutError, match="under another patch"),
        ):
            llava.model(**text, mm_encoder_outputs=encoded)


@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_a_new_picture_in_a_chunked_second_turn(name: str) -> None:
    tiny = tiny_models.build(name)
    ids, mask = tiny.inputs["input_ids"], tiny.inputs["attention_mask"]
    pixels = {key: value for key, value in tiny.clone().items() if key not in ("input_ids", "attention_mask")}

    def second(chunk: int | None) -> list[list[int]]:
        first = tiny.model.generate(**tiny.clone(), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        more = torch.cat([first.sequences, ids], 1)
        gap = torch.ones(len(ids), first.sequences.shape[1] - ids.shape[1], dtype=mask.dtype)
        whole = {"input_ids": more, "attention_mask": torch.cat([mask, gap, mask], 1), **pixels}
        options = {} if chunk is None else {"prefill_chunk_size": chunk}
        return generate(tiny.model, whole, past_key_values=first.past_key_values, **options)

    unpatched_or_skip(lambda: second(16), second(None), "a new picture in a chunked second turn")
    with vlm_budget.patch(tiny.model, "hired", 0.4):
        assert second(16) == second(None)


def test_pixels_by_position_are_pruned_too(llava: Tiny) -> None:
    inputs = llava.clone()
    with vlm_budget.patch(llava.model, "hired", 0.3) as handle, torch.no_grad():
        by_name = llava.model.model(**inputs).last_hidden_state
        promised = handle.report().plan
        mask = inputs["attention_mask"]
        by_place = llava.model.model(inputs["input_ids"], inputs["pixel_values"], attention_mask=mask).last_hidden_state
        assert handle.report().plan == promised
    assert not handle.report().text_only
    assert torch.equal(by_name, by_place)


def test_undo_is_refused_while_another_thread_runs_the_model(llava: Tiny) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert go_on.wait(20)

    expected: list[list[list[int]]] = []
    found: list[list[list[int]]] = []
    handle = vlm_budget.patch(llava.model, "hired", 0.3)
    expected.append(generate(llava.model, llava.clone()))
    hook = language_model(llava.model).layers[0].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(generate(llava.model, llava.clone())))
    thread.start()
    try:
        assert inside.wait(20)
        for attempt in (handle.undo, lambda: vlm_budget.patch(llava.model, "random", 0.3)):
            with pytest.raises(PatchError, match="other thread"):
                attempt()
        assert handle.active
    finally:
        go_on.set()
        thread.join()
        hook.remove()
    assert found == expected
    handle.undo()
    assert not handle.active


def test_a_forward_after_generate_has_an_account_of_its_own(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, "hired", 0.3) as handle, torch.no_grad():
        generate(llava.model, llava.clone())
        assert handle.report().decode_steps > 0
        llava.model(**llava.clone())
        assert handle.report().decode_steps == 0


class Unfaithful(Pruner):
    """Overrides what the base checks, and keeps one token too many."""

    def shares(self, budget: vlm_budget.Budget, items: list[VisualItem]) -> list[int]:
        """Two tokens each."""
        return [2] * len(items)

    def select(self, ctx: Context, k: int) -> Selection:
        """The first tokens, one more than asked for."""
        return Selection(torch.arange(k + 1, device=ctx.device))


def test_the_engine_counts_what_a_method_kept(llava: Tiny) -> None:
    with (
        vlm_budget.patch(llava.model, Unfaithful(), 0.3),
        torch.no_grad(),
        pytest.raises(vlm_budget.SelectionError, match="promised"),
    ):
        llava.model(**llava.clone())


def test_padded_shares_are_floors_per_image() -> None:
    tiny = tiny_models.build("llava_next")
    with vlm_budget.patch(tiny.model, "hired", 0.2, budget_base="padded") as handle:
        plan = handle.plan(**tiny.clone())
    _, base, family = find_family(tiny.model)
    items = [item for row in layout_of(base, family, tiny.clone()).rows for item in row]
    grids = [sum(grid.rows * grid.cols for grid in item.partitions) for item in items]
    assert [item.keep for item in plan.items] == [int(0.2 * grid) for grid in grids]
