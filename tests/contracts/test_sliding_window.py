"""Gemma 3 with a window shorter than the prompt: the prompt's window counts original columns, decoding kept ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import vlm_budget
from tiny_parts import Tiny, row_inputs
from vlm_budget import PatchError

from .conftest import BUDGET, METHOD, TOKENS, fresh
from .patched import SAMPLE, TOLERANCE, forward, generate
from .reference import Row, language_model, rows
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


def test_a_new_picture_behind_a_full_window_is_refused(gemma: Tiny) -> None:
    with vlm_budget.patch(gemma.model, METHOD, BUDGET):
        first = first_turn(gemma.model, row_inputs(gemma, 1))
        later, _ = with_new_picture(gemma, first, 1)
        past = first.past_key_values.get_seq_length()
        chunk = {name: later[name][:, past:] for name in ("input_ids", "token_type_ids")}
        rest: dict[str, Any] = {"attention_mask": later["attention_mask"], "past_key_values": first.past_key_values}
        with pytest.raises(PatchError, match="sliding-window cache of .* Start from a new cache"), torch.no_grad():
            gemma.model(**chunk, **rest, pixel_values=later["pixel_values"])
        assert first.past_key_values.get_seq_length() == past


def test_a_static_cache_with_a_short_window_is_refused_or_right(gemma: Tiny) -> None:
    full = rows(gemma.model, gemma.clone())
    with vlm_budget.patch(gemma.model, METHOD, BUDGET) as handle:
        found = forward(handle, gemma.clone(), full)
        want = [
            greedy(row.compact(columns, packed=True), TOKENS) for row, columns in zip(full, found.columns, strict=True)
        ]
        try:
            tokens = generate(gemma.model, gemma.clone(), cache_implementation="static")
        except PatchError as error:
            assert "default dynamic cache" in str(error)
        else:
            assert tokens == want
    assert language_model(gemma.model).config.sliding_window == WINDOW
    assert transformers.__version__
