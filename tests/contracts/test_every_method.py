"""What every registered method must keep on every registered family."""

from __future__ import annotations

import pytest
import torch

import vlm_budget
from tiny_models import Tiny, row_inputs

from .conftest import Case
from .patched import SAMPLE, TOLERANCE, forward, generate, kept_per_row
from .reference import greedy, rows

METHODS = vlm_budget.list_methods()
BUDGET = 0.4


def position_modes(multi_axis: bool) -> list[str]:
    return ["original"] if multi_axis else ["packed", "original"]


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_is_bit_identical(tiny: Tiny, method: str) -> None:
    with torch.no_grad():
        before = tiny.model(**tiny.clone()).logits
        tokens = tiny.model.generate(**tiny.clone(), **SAMPLE)
    with vlm_budget.patch(tiny.model, method, 1.0) as handle, torch.no_grad():
        assert torch.equal(tiny.model(**tiny.clone()).logits, before)
        assert torch.equal(tiny.model.generate(**tiny.clone(), **SAMPLE), tokens)
        report = handle.report()
    assert report.kept_tokens == report.visual_tokens > 0


@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_token_by_number_is_bit_identical_too(llava: Tiny, method: str) -> None:
    inputs = row_inputs(llava, 1)
    count = int((inputs["input_ids"] == 120).sum())
    with torch.no_grad():
        before = llava.model(**inputs).logits
        with vlm_budget.patch(llava.model, method, count):
            assert torch.equal(llava.model(**inputs).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_the_hand_compacted_reference(any_case: Case, method: str) -> None:
    tiny, full = any_case.tiny, any_case.full
    right = not bool(tiny.inputs["attention_mask"][:, -1].all())
    for mode in position_modes(full[0].multi_axis):
        packed = mode == "packed"
        with vlm_budget.patch(tiny.model, method, BUDGET, positions=mode) as handle:
            prefill = forward(handle, tiny.clone(), full)
            tokens = generate(tiny.model, tiny.clone()) if not right else None
        for index, (row, columns) in enumerate(zip(full, prefill.columns, strict=True)):
            alone = row.compact(columns, packed)
            torch.testing.assert_close(prefill.logits[index][columns], alone.logits(), **TOLERANCE)
            if tokens is not None:
                assert tokens[index] == greedy(alone, SAMPLE["max_new_tokens"])


@pytest.mark.parametrize("method", METHODS)
def test_counts_promised_are_counts_kept_and_text_stays_in_order(any_case: Case, method: str) -> None:
    tiny, full = any_case.tiny, any_case.full
    with vlm_budget.patch(tiny.model, method, BUDGET) as handle:
        promised = handle.plan(**tiny.clone())
        prefill = forward(handle, tiny.clone(), full)
        assert handle.report().plan == promised
        kept = kept_per_row(handle, len(full))
    assert promised.total == sum(int(row.visual.sum()) for row in full)
    for row, columns, count in zip(full, prefill.columns, kept, strict=True):
        visual = int(row.visual.sum())
        assert count == int(BUDGET * visual + 0.5)
        assert columns == sorted(set(columns))
        assert int(row.visual[columns].sum()) == count
        assert set((~row.visual).nonzero().flatten().tolist()) <= set(columns), "a text token was dropped"


@pytest.mark.parametrize("method", METHODS)
def test_dropped_columns_repeat_the_last_kept_one(any_case: Case, method: str) -> None:
    tiny, full = any_case.tiny, any_case.full
    with vlm_budget.patch(tiny.model, method, BUDGET) as handle:
        prefill = forward(handle, tiny.clone(), full)
    for row, columns, logits in zip(full, prefill.columns, prefill.logits, strict=True):
        source = [max((kept for kept in columns if kept <= column), default=columns[0]) for column in range(row.length)]
        assert torch.equal(logits, logits[source])


@pytest.mark.parametrize("method", METHODS)
def test_batch_of_ragged_prompts_equals_single_runs(any_case: Case, method: str) -> None:
    tiny, full = any_case.tiny, any_case.full
    # Recorded on their own: the vision tower's rounding depends on how many images it sees at once.
    singles = [rows(tiny.model, row_inputs(tiny, index))[0] for index in range(len(full))]
    with vlm_budget.patch(tiny.model, method, BUDGET) as handle:
        batch = forward(handle, tiny.clone(), full)
        for index, row in enumerate(singles):
            alone = forward(handle, row_inputs(tiny, index), [row])
            assert alone.columns[0] == batch.columns[index]
            torch.testing.assert_close(alone.logits[0], batch.logits[index], **TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_the_cache_holds_what_was_kept(generating_case: Case, method: str) -> None:
    tiny, full = generating_case.tiny, generating_case.full
    with vlm_budget.patch(tiny.model, method, BUDGET) as handle, torch.no_grad():
        output = tiny.model.generate(**tiny.clone(), **SAMPLE, return_dict_in_generate=True)
        report, kept = handle.report(), kept_per_row(handle, len(full))
    longest = max(row.length - int(row.visual.sum()) + keep for row, keep in zip(full, kept, strict=True))
    steps = SAMPLE["max_new_tokens"] - 1
    cache = output.past_key_values
    assert {layer.keys.shape[2] for layer in cache.layers} == {longest + steps}
    assert cache.get_seq_length() == tiny.inputs["input_ids"].shape[1] + steps
    per_column = sum(
        2 * layer.keys.numel() // layer.keys.shape[2] * layer.keys.element_size() for layer in cache.layers
    )
    assert report.kv_bytes == longest * per_column
    assert report.kv_bytes_unpruned == tiny.inputs["input_ids"].shape[1] * per_column
    assert report.decode_steps == steps
