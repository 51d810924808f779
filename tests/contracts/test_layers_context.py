"""What a method is shown of a prompt at a decoder layer is what the model itself computes there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vlm_budget
from vlm_budget.decoder import DecoderContext

from .layered import Layered, layered
from .patched import DECODED
from .reference import language_model
from .schedules import KINDS, SEEN, Attended, OwnAttended, Scheduled, forward_inputs, fresh, full_rows


def shown(name: str, method: Scheduled) -> tuple[list[Layered], dict[tuple[int, int, int], DecoderContext]]:
    """The reference prompts, and what was shown of each, by layer, prompt and item."""
    tiny, full = fresh(name), full_rows(name)
    SEEN.clear()
    with vlm_budget.patch(tiny.model, method) as handle, torch.no_grad():
        tiny.model(**forward_inputs(tiny))
        kept = handle.kept()
    items = [
        (index, order)
        for index in range(len(full))
        for order, _ in enumerate(item for item in kept if item.row == index)
    ]
    keys = [(layer, *item) for layer, _ in method.shares for item in items]
    eager = fresh(name).model
    eager.set_attn_implementation("eager")
    rows = [replace(row, model=eager) for row in full]
    return layered(rows, kept, vision_packed=False, packed=False), dict(zip(keys, SEEN, strict=True))


def above(prompt: Layered, layer: int) -> Layered:
    """The prompt with what is dropped above a layer only."""
    return replace(prompt, drops=tuple(drop for drop in prompt.drops if drop.layer < layer))


@pytest.mark.parametrize("method", [Attended(), OwnAttended()], ids=["previous", "own"])
@pytest.mark.parametrize("name", KINDS)
def test_attention_is_that_of_the_model(name: str, method: Scheduled) -> None:
    prompts, contexts = shown(name, method)
    for (layer, index, _), ctx in contexts.items():
        maps = above(prompts[index], layer).attention()
        seen = maps[layer - 1 if method.scores == "previous" else layer]
        assert ctx.captured is not None
        every = torch.arange(seen.shape[1])
        torch.testing.assert_close(ctx.captured.attention(every), seen, **DECODED)
        torch.testing.assert_close(ctx.attention(ctx.last), seen[:, -1:, ctx.columns], **DECODED)


@pytest.mark.parametrize("name", KINDS)
def test_columns_and_hidden_states_are_those_of_the_prompt(name: str) -> None:
    prompts, contexts = shown(name, Attended())
    for (layer, index, order), ctx in contexts.items():
        prompt = above(prompts[index], layer)
        row, here = prompt.row, torch.tensor(prompt.left)
        visual = row.visual[here].nonzero().flatten()
        assert ctx.layer == layer
        assert ctx.order == order
        assert torch.equal(ctx.visual, visual)
        assert torch.equal(ctx.text, (~row.visual[here]).nonzero().flatten())
        last = int(row.visual.nonzero().max())
        assert torch.equal(ctx.instruction, ctx.text[here[ctx.text] > last])
        assert torch.equal(ctx.embeds, row.embeds[here])
        torch.testing.assert_close(ctx.hidden, prompt.hidden_states()[layer], **DECODED)
        mine = [other.columns for key, other in contexts.items() if key[:2] == (layer, index)]
        assert torch.equal(torch.cat(mine), visual), "the items are not all there, or not in order"
        assert len(ctx.alive) == len(ctx.columns)


@pytest.mark.parametrize("name", KINDS)
def test_rotary_embeddings_are_shown_where_positions_have_one_axis(name: str) -> None:
    prompts, contexts = shown(name, Attended())
    for (layer, index, _), ctx in contexts.items():
        captured, prompt = ctx.captured, above(prompts[index], layer)
        assert captured is not None
        if prompt.row.multi_axis:
            assert captured.cos is captured.sin is None
            continue
        decoder: Any = language_model(prompt.row.model)
        positions = forward_inputs(fresh(name))["position_ids"][index].max() + 1 - prompt.row.length
        cos, sin = decoder.rotary_emb(ctx.hidden[None], torch.tensor(prompt.left)[None] + positions)
        torch.testing.assert_close(captured.cos, cos[0])
        torch.testing.assert_close(captured.sin, sin[0])
        assert (captured.visible is not None) == (name == "paligemma")


def test_the_final_norm_is_the_models_own() -> None:
    prompts, contexts = shown("llava", Attended())
    ctx = next(iter(contexts.values()))
    decoder: Any = language_model(prompts[0].row.model)
    with torch.no_grad():
        torch.testing.assert_close(ctx.norm(ctx.hidden), decoder.norm(ctx.hidden))
