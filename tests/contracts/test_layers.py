"""Dropping inside the language model gives what the reference gives layer by layer, for every family and method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import vlm_budget
from tiny_models import Tiny, row_inputs
from vlm_budget.registry import PRUNERS
from vlm_budget.report import KeptItem

from .layered import Layered, Values, layered
from .patched import DECODED, SAMPLE, generate
from .schedules import (
    LAYERS,
    SETUPS,
    Attended,
    OwnAttended,
    Recording,
    Recycled,
    Scheduled,
    forward_inputs,
    fresh,
    full_rows,
)

REGISTERED = [name for name in vlm_budget.list_methods() if PRUNERS.get(name).stage == "decoder"]
OURS = {"scheduled": Scheduled(), "attended": Attended(), "own": OwnAttended(), "recycled": Recycled()}
METHODS = [*OURS, *REGISTERED]
BUDGET = 0.5


def patch(model: Any, method: str, **options: Any) -> vlm_budget.PatchHandle:
    """Patch with a method of the tests or a registered one."""
    chosen = OURS.get(method) or PRUNERS.get(method)()
    recording = Recording(inner=chosen, values={}, positions=chosen.positions)
    return vlm_budget.patch(model, recording, None if chosen.fixed else BUDGET, **options)


def position_modes(name: str) -> list[str]:
    return ["original"] if full_rows(name)[0].multi_axis else ["original", "packed"]


def right_padded(tiny: Tiny) -> bool:
    return not bool(tiny.inputs["attention_mask"][:, -1].all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SETUPS)
def test_dropping_at_layers_equals_the_reference(name: str, method: str) -> None:
    tiny, full = unpatched(name)[0], full_rows(name)
    valid = tiny.inputs["attention_mask"].bool()
    for mode in position_modes(name):
        with patch(tiny.model, method, positions=mode) as handle, torch.no_grad():
            promised = handle.plan(**tiny.clone())
            output = tiny.model(**forward_inputs(tiny), use_cache=True)
            kept = handle.kept()
            check_counts(handle, promised, output.past_key_values, tiny)
            tokens = None if right_padded(tiny) else generate(tiny.model, tiny.clone())
            singles = [alone(handle, tiny, index) for index in range(len(full))]
        values = [single.values for single in singles]
        prompts = layered(full, kept, vision_packed=False, packed=mode == "packed", values=values)
        for index, (prompt, single) in enumerate(zip(prompts, singles, strict=True)):
            logits = output.logits[index][valid[index]]
            check_logits(prompt, logits, tokens[index] if tokens is not None else None)
            mine = [(item.positions, item.steps) for item in kept if item.row == index]
            assert [(item.positions, item.steps) for item in single.kept] == mine
            torch.testing.assert_close(single.logits, logits, **DECODED)


@dataclass(frozen=True)
class Single:
    """A prompt that ran by itself: its logits, what was kept of it, and the hidden states put in."""

    logits: torch.Tensor
    kept: tuple[KeptItem, ...]
    values: Values


def alone(handle: Any, tiny: Tiny, index: int) -> Single:
    """Run one prompt."""
    handle.method.values.clear()
    logits = handle.model(**row_inputs(tiny, index)).logits[0]
    return Single(logits, handle.kept(), dict(handle.method.values))


def check_logits(prompt: Layered, logits: torch.Tensor, tokens: list[int] | None) -> None:
    """Those of columns that reach the end are the reference's; a dropped column repeats the last one before it.

    Every generated token is the one that the reference would have chosen next.
    """
    left = prompt.left
    want = prompt.then((tokens or [0])[:-1]).logits()
    torch.testing.assert_close(logits[left], want[: len(left)], **DECODED)
    if tokens is not None:
        chosen = want[len(left) - 1 :]
        chosen[:, SAMPLE["suppress_tokens"]] = -torch.inf
        assert tokens == chosen.argmax(-1).tolist()
    source = [max((c for c in left if c <= column), default=left[0]) for column in range(prompt.row.length)]
    assert torch.equal(logits, logits[source])


def check_counts(handle: Any, promised: vlm_budget.Plan, cache: Any, tiny: Tiny) -> None:
    """What was promised is what every layer's cache holds, and what the report says."""
    report, kept = handle.report(), handle.kept()
    assert report.plan == promised
    assert promised.drop_layers
    for item, plan in zip(kept, promised.items, strict=True):
        assert tuple((layer, len(left)) for layer, left in item.steps) == plan.steps or not item.steps
        for (_, outer), (_, inner) in zip(((0, item.positions), *item.steps), item.steps, strict=False):
            assert set(inner) <= set(outer)
    text = [int(row.sum()) for row in tiny.inputs["attention_mask"]]
    text = [count - sum(item.total for item in promised.items if item.row == row) for row, count in enumerate(text)]
    widths = [
        max(count + promised.row_tokens(row, LAYERS)[layer] for row, count in enumerate(text))
        for layer in range(LAYERS)
    ]
    assert [layer.keys.shape[2] for layer in cache.layers] == widths
    assert cache.get_seq_length() == tiny.inputs["input_ids"].shape[1]
    column = 2 * cache.layers[0].keys[:, :, :1].numel() * cache.layers[0].keys.element_size()
    assert report.kv_bytes == column * sum(widths)
    assert report.kv_bytes_unpruned == column * LAYERS * tiny.inputs["input_ids"].shape[1]
    assert report.drop_ms > 0


@cache
def unpatched(name: str) -> tuple[Tiny, torch.Tensor, list[list[int]] | None]:
    """A set-up that is patched and unpatched again, with its logits and tokens before."""
    tiny = fresh(name)
    with torch.no_grad():
        logits = tiny.model(**tiny.clone()).logits
    return tiny, logits, None if right_padded(tiny) else generate(tiny.model, tiny.clone())


@pytest.mark.parametrize("method", [name for name in REGISTERED if not PRUNERS.get(name)().fixed])
@pytest.mark.parametrize("name", SETUPS)
def test_keeping_all_is_bit_identical(name: str, method: str) -> None:
    tiny, logits, tokens = unpatched(name)
    with vlm_budget.patch(tiny.model, method, 1.0) as handle, torch.no_grad():
        assert torch.equal(tiny.model(**tiny.clone()).logits, logits)
        assert handle.report().plan.drop_layers == []
        if tokens is not None:
            assert generate(tiny.model, tiny.clone()) == tokens
