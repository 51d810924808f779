"""Merging on real model classes: stages behind a selector, and methods that merge on their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import vlm_budget
from tiny_models import Tiny
from vlm_budget.pruner import Attention, Context
from vlm_budget.pruners.hired import HiRED
from vlm_budget.pruners.token_transforming import TokenTransforming
from vlm_budget.registry import FAMILIES, PRUNERS

from .conftest import BUDGET, TOKENS, Case
from .patched import DECODED, TOLERANCE, forward, generate, kept_per_row
from .reference import greedy

METHODS = {name: PRUNERS.get(name) for name in vlm_budget.list_methods()}
MERGING = [name for name, cls in METHODS.items() if cls.merges and cls.stage == "vision"]


def test_a_stage_behind_a_selector_equals_the_reference(generating_case: Case) -> None:
    tiny, full = generating_case.tiny, generating_case.full
    with vlm_budget.patch(tiny.model, HiRED(merge=TokenTransforming()), BUDGET) as handle:
        found = forward(handle, tiny.clone(), full)
        kept = kept_per_row(handle, len(full))
        tokens = generate(tiny.model, tiny.clone())
    assert found.columns == generating_case.prefill.columns  # the selector chooses as it does alone
    assert kept == [int(row.visual[columns].sum()) for row, columns in zip(full, found.columns, strict=True)]
    for index, (row, columns) in enumerate(zip(found.rows, found.columns, strict=True)):
        assert not torch.equal(row.embeds, full[index].embeds)
        alone = row.compact(columns, packed=not row.multi_axis)
        torch.testing.assert_close(found.logits[index][columns], alone.logits(), **TOLERANCE)
        assert tokens[index] == greedy(alone, TOKENS)


def test_a_stage_that_changes_nothing_is_pruning(any_case: Case) -> None:
    tiny = any_case.tiny
    with vlm_budget.patch(tiny.model, HiRED(merge=TokenTransforming(self_weight=1.0)), BUDGET) as handle:
        found = forward(handle, tiny.clone(), any_case.full)
    for mine, want in zip(found.logits, any_case.prefill.logits, strict=True):
        torch.testing.assert_close(mine, want, **DECODED)  # the projector ran again, on fewer rows


@contextmanager
def key_projections(model: Any, layer: int) -> Iterator[list[torch.Tensor]]:
    """What the key projection of a CLIP layer returns."""
    seen: list[torch.Tensor] = []
    towers = [module for module in model.modules() if hasattr(module, "encoder")]
    projection: nn.Module = towers[0].encoder.layers[layer].self_attn.k_proj
    hook = projection.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
    try:
        yield seen
    finally:
        hook.remove()


def llava_contexts(tiny: Tiny, needs: tuple[Attention, ...], items: list[Any]) -> list[Context]:
    """What a method should see of every image, from what CLIP's own modules return."""
    model, pixels = tiny.model, tiny.inputs["pixel_values"]
    vision = model.config.vision_config
    heads, width = vision.num_attention_heads, vision.hidden_size
    seen: dict[Attention, torch.Tensor] = {}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        for need in needs:
            with key_projections(model, need.layer) as keys:
                model.model.vision_tower(pixels)
            if need.kind == "cls":
                seen[need] = output.attentions[need.layer].mean(1)[:, 0, 1:]
            elif need.kind == "keys":
                seen[need] = keys[0][:, 1:]
            elif need.kind == "mean_keys":
                seen[need] = keys[0][:, 1:].unflatten(-1, (heads, width // heads)).mean(2)
            else:
                assert need.kind == "joint_cls"
                layer = model.model.vision_tower
                layer = getattr(layer, "vision_model", layer).encoder.layers[need.layer]
                query = layer.self_attn.q_proj(layer.layer_norm1(output.hidden_states[need.layer]))[:, :1]
                seen[need] = (query @ keys[0].transpose(1, 2) * width**-0.5).softmax(-1)[:, 0, 1:]
        hidden = output.hidden_states[model.config.vision_feature_layer][:, 1:]
        project = model.model.multi_modal_projector
        return [
            Context(
                item,
                {need: [rows[index]] for need, rows in seen.items()},
                project(hidden[index]),
                index,
                torch.device("cpu"),
                hidden[index],
                project,
            )
            for index, item in enumerate(items)
        ]


@pytest.mark.parametrize("method", MERGING)
def test_merged_embeddings_are_made_of_what_clip_itself_returns(llava_case: Case, method: str) -> None:
    tiny, pruner = llava_case.tiny, METHODS[method]()
    with vlm_budget.patch(tiny.model, pruner, BUDGET) as handle:
        found = forward(handle, tiny.clone(), llava_case.full)
        plan, kept = handle.report().plan.items, handle.kept()
    tower = FAMILIES.get("llava")().tower(tiny.model.model)
    contexts = llava_contexts(tiny, pruner.needs(tower), [item.item for item in kept])
    with torch.no_grad():
        chosen = [pruner.select(ctx, item.keep) for ctx, item in zip(contexts, plan, strict=True)]
    assert [tuple(each.keep.tolist()) for each in chosen] == [item.positions for item in kept]
    for index, row in enumerate(found.rows):
        visual = row.embeds[[column for column in found.columns[index] if row.visual[column]]]
        mine = [each.values for each, item in zip(chosen, kept, strict=True) if item.row == index]
        torch.testing.assert_close(visual, torch.cat(mine), **TOLERANCE)
