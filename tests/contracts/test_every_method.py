"""What every registered method that acts before the language model must keep on every registered family.

One patched model serves all checks of a set-up and a method; what does not depend on the method is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from tiny_models import Tiny, row_inputs

from .conftest import BUDGET, VISION, expected, fresh
from .patched import SAMPLE, TOLERANCE, Prefill, forward, kept_per_row
from .reference import Row, rows


@dataclass(frozen=True)
class Unpatched:
    """What a set-up does without a patch.

    Attributes:
        tiny: A model that is patched and unpatched again.
        logits: Of a forward.
        sequences: What ``generate`` returns; None where prompts are right-padded.
        full: The prompts.
        singles: The prompts, each encoded on its own: the vision tower rounds by how many images it sees at once.
    """

    tiny: Tiny
    logits: torch.Tensor
    sequences: torch.Tensor | None
    full: list[Row]
    singles: list[Row]


@cache
def unpatched(name: str) -> Unpatched:
    """Computed once per set-up."""
    tiny = fresh(name)
    full = expected(name).full
    singles = [rows(tiny.model, row_inputs(tiny, index))[0] for index in range(len(full))]
    right = not bool(tiny.inputs["attention_mask"][:, -1].all())
    with torch.no_grad():
        logits = tiny.model(**tiny.clone()).logits
        sequences = None if right else tiny.model.generate(**tiny.clone(), **SAMPLE)
    return Unpatched(tiny, logits, sequences, full, singles)


@pytest.mark.parametrize("method", VISION)
@pytest.mark.parametrize("name", list(tiny_models.SETUPS))
def test_keeping_all_is_bit_identical(name: str, method: str) -> None:
    known = unpatched(name)
    tiny = known.tiny
    with vlm_budget.patch(tiny.model, method, 1.0) as handle, torch.no_grad():
        assert torch.equal(tiny.model(**tiny.clone()).logits, known.logits)
        if known.sequences is not None:
            assert torch.equal(tiny.model.generate(**tiny.clone(), **SAMPLE), known.sequences)
        report = handle.report()
    assert report.kept_tokens == report.visual_tokens > 0


@pytest.mark.parametrize("method", VISION)
def test_keeping_every_token_by_number_is_bit_identical_too(llava: Tiny, method: str) -> None:
    inputs = row_inputs(llava, 1)
    count = int((inputs["input_ids"] == 120).sum())
    with torch.no_grad():
        before = llava.model(**inputs).logits
        with vlm_budget.patch(llava.model, method, count):
            assert torch.equal(llava.model(**inputs).logits, before)


@pytest.mark.parametrize("method", VISION)
@pytest.mark.parametrize("name", list(tiny_models.SETUPS))
def test_dropping_keeps_every_contract(name: str, method: str) -> None:
    known = unpatched(name)
    tiny, full = known.tiny, known.full
    with vlm_budget.patch(tiny.model, method, BUDGET) as handle:
        promised = handle.plan(**tiny.clone())
        found = forward(handle, tiny.clone(), full)
        packed = handle.report().positions == "packed"
        check_counts_promised_are_counts_kept(handle, promised, found)
        check_dropped_columns_repeat_the_last_kept_one(found)
        check_a_batch_of_ragged_prompts_equals_single_runs(handle, known, found)
        tokens = None if known.sequences is None else check_the_cache_holds_what_was_kept(handle, known, found)
    check_the_hand_compacted_reference(found, packed, tokens)
    if full[0].multi_axis:
        return
    with vlm_budget.patch(tiny.model, method, BUDGET, positions="original" if packed else "packed") as handle:
        again = forward(handle, tiny.clone(), full)
    assert again.columns == found.columns, "positions changed the choice"
    check_the_hand_compacted_reference(again, not packed, None)


def check_counts_promised_are_counts_kept(handle: Any, promised: vlm_budget.Plan, found: Prefill) -> None:
    """Exact counts, and text tokens all there and in order."""
    assert handle.report().plan == promised
    assert promised.total == sum(int(row.visual.sum()) for row in found.rows)
    kept = kept_per_row(handle, len(found.rows))
    for row, columns, count in zip(found.rows, found.columns, kept, strict=True):
        assert count == int(BUDGET * int(row.visual.sum()) + 0.5)
        assert columns == sorted(set(columns))
        assert int(row.visual[columns].sum()) == count
        assert set((~row.visual).nonzero().flatten().tolist()) <= set(columns), "a text token was dropped"


def check_dropped_columns_repeat_the_last_kept_one(found: Prefill) -> None:
    """So that the token behind them is predicted from the right state."""
    for row, columns, logits in zip(found.rows, found.columns, found.logits, strict=True):
        source = [max((kept for kept in columns if kept <= column), default=columns[0]) for column in range(row.length)]
        assert torch.equal(logits, logits[source])


def check_a_batch_of_ragged_prompts_equals_single_runs(handle: Any, known: Unpatched, found: Prefill) -> None:
    """The same tokens are kept, and the same is predicted."""
    for index, row in enumerate(known.singles):
        alone = forward(handle, row_inputs(known.tiny, index), [row])
        assert alone.columns[0] == found.columns[index]
        torch.testing.assert_close(alone.logits[0], found.logits[index], **TOLERANCE)


def check_the_cache_holds_what_was_kept(handle: Any, known: Unpatched, found: Prefill) -> list[list[int]]:
    """What ``generate`` leaves in the cache and in the report. Returns the new tokens."""
    with torch.no_grad():
        output = handle.model.generate(**known.tiny.clone(), **SAMPLE, return_dict_in_generate=True)
    report, cache, prompt = handle.report(), output.past_key_values, known.tiny.inputs["input_ids"].shape[1]
    longest, steps = max(map(len, found.columns)), SAMPLE["max_new_tokens"] - 1
    assert {layer.keys.shape[2] for layer in cache.layers} == {longest + steps}
    assert cache.get_seq_length() == prompt + steps
    column = sum(2 * layer.keys[:, :, :1].numel() * layer.keys.element_size() for layer in cache.layers)
    assert (report.kv_bytes, report.kv_bytes_unpruned) == (longest * column, prompt * column)
    assert report.decode_steps == steps
    tokens: list[list[int]] = output.sequences[:, prompt:].tolist()
    return tokens


def check_the_hand_compacted_reference(found: Prefill, packed: bool, tokens: list[list[int]] | None) -> None:
    """Logits are the reference's, and every generated token is the one it would have chosen next."""
    for index, (row, columns) in enumerate(zip(found.rows, found.columns, strict=True)):
        alone = row.compact(columns, packed)
        mine = tokens[index] if tokens is not None else [0]
        logits = alone.then(mine[:-1]).logits()
        torch.testing.assert_close(found.logits[index][columns], logits[: alone.length], **TOLERANCE)
        if tokens is not None:
            chosen = logits[alone.length - 1 :]
            chosen[:, SAMPLE["suppress_tokens"]] = -torch.inf
            assert mine == chosen.argmax(-1).tolist()
