"""Gemma 3 with a window shorter than the prompt: the prompt's window counts original columns, decoding kept ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vlm_budget
from tiny_parts import Tiny, row_inputs

from .conftest import BUDGET, METHOD, TOKENS, fresh
from .patched import DECODED, SAMPLE, TOLERANCE, forward, generate, unpatched_or_skip
from .reference import Row, kept_columns, language_model, recorded, rows
from .test_second_turn import QUESTION, first_turn, second_turn, with_new_picture

WINDOW = 12


@pytest.fixture
def gemma() -> Tiny:
    """A window of 12 tokens under prompts of 41 and 80."""
    tiny = fresh("gemma3")
    for module in tiny.model.modules():
        for owner in (module, getattr(module, "config", None)):
            if isinstance(getattr(owner, "sliding_window", None), int):
                owner.sliding_window = WINDOW
    return tiny


def then(row: Row, tokens: list[int]) -> Row:
    """The row followed by text, which sees the last ``WINDOW`` columns of the shortened row in sliding layers."""
    grown = row.then(tokens)
    assert grown.masks is not None
    sliding = grown.masks["sliding_attention"].clone()
    columns = torch.arange(grown.length)
    sliding[row.length :] &= columns[row.length :, None] - columns < WINDOW
    return replace(grown, masks={**grown.masks, "sliding_attention": sliding})


def greedy(row: Row, count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        logits = then(row, tokens).logits()[-1]
        logits[SAMPLE["suppress_tokens"]] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


def test_keeping_all_is_bit_identical(gemma: Tiny) -> None:
    before = generate(gemma.model, gemma.clone())
    full = rows(gemma.model, gemma.clone())
    assert before == [greedy(row, TOKENS) for row in full]
    with vlm_budget.patch(gemma.model, METHOD, 1.0):
        assert generate(gemma.model, gemma.clone()) == before


@pytest.mark.parametrize("positions", ["packed", "original"])
def test_dropping_equals_the_reference(gemma: Tiny, positions: str) -> None:
    full = rows(gemma.model, gemma.clone())
    with vlm_budget.patch(gemma.model, METHOD, BUDGET, positions=positions) as handle:
        found = forward(handle, gemma.clone(), full)
        tokens = generate(gemma.model, gemma.clone())
    for index, (row, columns) in enumerate(zip(full, found.columns, strict=True)):
        alone = row.compact(columns, positions == "packed")
        torch.testing.assert_close(found.logits[index][columns], alone.logits(), **TOLERANCE)
        assert tokens[index] == greedy(alone, TOKENS)


def test_a_second_turn_of_text(gemma: Tiny) -> None:
    full = rows(gemma.model, gemma.clone())
    with vlm_budget.patch(gemma.model, METHOD, BUDGET) as handle:
        found = forward(handle, gemma.clone(), full)
        first = first_turn(gemma.model, gemma.clone())
        tokens = first.sequences[:, gemma.inputs["input_ids"].shape[1] :].tolist()
        answers = second_turn(gemma.model, gemma.clone(), first)
    for index, (row, columns) in enumerate(zip(full, found.columns, strict=True)):
        context = then(row.compact(columns, packed=True), [*tokens[index], *QUESTION])
        assert answers[index] == greedy(context, TOKENS)


def picture_turn(tiny: Tiny) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A turn, then a forward of a new picture on its cache: the first output, the recorded call, the logits."""
    first = first_turn(tiny.model, row_inputs(tiny, 1))
    later, _ = with_new_picture(tiny, first, 1)
    past = first.past_key_values.get_seq_length()
    chunk = {name: later[name][:, past:] for name in ("input_ids", "token_type_ids")}
    with recorded(language_model(tiny.model)) as calls, torch.no_grad():
        output = tiny.model(
            **chunk,
            attention_mask=later["attention_mask"],
            past_key_values=first.past_key_values,
            pixel_values=later["pixel_values"],
        )
    return first, calls[0], output.logits[0]


def test_a_new_picture_behind_a_full_window(gemma: Tiny) -> None:
    inputs = row_inputs(gemma, 1)
    (full,) = rows(gemma.model, inputs)
    unpatched: list[Any] = []
    unpatched_or_skip(lambda: unpatched.extend(picture_turn(gemma)), None, "a new picture behind a full window")
    with vlm_budget.patch(gemma.model, METHOD, BUDGET) as handle:
        columns = forward(handle, inputs, [full]).columns[0]
        first, call, logits = picture_turn(gemma)
    tokens = first.sequences[0, full.length :].tolist()
    before = then(full.compact(columns, packed=True), tokens[:-1])
    # The new columns, as the unpatched model embeds them; where they stand in the caller's numbering and in ours.
    embeds = unpatched[1]["inputs_embeds"][0].clone()
    embeds[0] = gemma.model.get_input_embeddings()(torch.tensor(tokens[-1])).detach()
    chunk = kept_columns(replace(full, embeds=embeds), call["inputs_embeds"][0])
    start = full.length + len(tokens) - 1
    theirs = torch.tensor([*columns, *range(full.length, start), *(start + c for c in chunk)])
    ours = torch.arange(len(theirs))
    new = torch.arange(before.length, len(theirs))
    # Inside the chunk: as recorded. Before it: all, or what lies in the window and is still held.
    inside = {
        kind: mask[0, 0][:, -len(embeds) :][chunk][:, chunk] for kind, mask in unpatched[1]["attention_mask"].items()
    }
    masks = {}
    for kind, mask in (before.masks or {}).items():
        grown = torch.zeros(len(theirs), len(theirs), dtype=torch.bool)
        grown[: before.length, : before.length] = mask
        grown[before.length :, : before.length] = True
        if kind == "sliding_attention":
            grown[before.length :] &= theirs[new][:, None] - theirs < WINDOW
            grown[before.length :, : before.length] &= ours[: before.length] > before.length - WINDOW
        grown[before.length :, before.length :] = inside[kind]
        masks[kind] = grown
    want = replace(
        before,
        embeds=torch.cat([before.embeds, embeds[chunk]]),
        positions=torch.arange(len(theirs)),
        visual=torch.zeros(len(theirs), dtype=torch.bool),
        masks=masks,
    )
    torch.testing.assert_close(logits[chunk], want.logits()[before.length :], **DECODED)


def test_a_static_cache_with_a_short_window(gemma: Tiny) -> None:
    full = rows(gemma.model, gemma.clone())
    with vlm_budget.patch(gemma.model, METHOD, BUDGET) as handle:
        found = forward(handle, gemma.clone(), full)
        want = [
            greedy(row.compact(columns, packed=True), TOKENS) for row, columns in zip(full, found.columns, strict=True)
        ]
        assert generate(gemma.model, gemma.clone(), cache_implementation="static") == want
