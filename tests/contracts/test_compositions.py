"""One registered method before the language model and one inside it, together, on real model classes.

Pairs are spread over the families, so that every family meets a pair, and every method inside the language model and
most of those before it stand in one; the contracts of each method alone are in ``test_every_method`` and
``test_layers``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from fingerprint import changes, fingerprint
from tiny_models import Tiny, row_inputs
from vlm_budget import PatchError
from vlm_budget.pruner import Pruner
from vlm_budget.registry import FAMILIES, PRUNERS
from vlm_budget.report import KeptItem

from .patched import DECODED, generate
from .schedules import LAYERS, forward_inputs, fresh
from .test_layers import right_padded, unpatched

# Set-up, before, inside: merging methods and a merging stage among the first, every scoring place among the second.
PAIRS = [
    ("llava", "divprune", "pyramiddrop"),
    ("llava", "uniform", "gsearch"),
    ("llava", "prumerge", "dart"),
    ("llava", "hired merged", "fastv"),
    ("llava_right_padded", "visionzip", "fastv"),
    ("llava_next", "hired", "fastv"),
    ("llava_next", "holov", "psigmoid"),
    ("llava_next_video", "random", "vtw"),
    ("llava_next_video_image", "hiprune", "sparsevlm"),
    ("llava_onevision", "pool", "pyramiddrop"),
    ("llava_onevision_multi", "segpruner", "fastv"),
    ("llava_onevision_video", "quota", "pyramiddrop"),
    ("internvl", "quota", "fastv"),
    ("qwen2_vl", "segpruner", "dart"),
    ("llava_onevision_video", "uniform", "dart"),
    ("internvl", "visionzip", "sparsevlm"),
    ("qwen2_vl", "divprune", "pyramiddrop"),
    ("qwen2_vl_video", "uniform", "gsearch"),
    ("qwen2_5_vl", "vispruner", "sparsevlm"),
    ("qwen3_vl", "cdpruner", "vtw"),
    ("qwen3_vl_video", "hired", "fastv"),
    ("smolvlm", "mmtok", "psigmoid"),
    ("idefics3", "prumerge_plus", "vtw"),
    ("paligemma", "cls_topk", "gsearch"),
]
NAMES = ["-".join(pair) for pair in PAIRS]
BUDGET = 0.5  # mean over LAYERS layers, of which the first two may have to see what enters


def members(vision: str, decoder: str) -> list[Pruner]:
    """Fresh instances of a pair."""
    name, _, merged = vision.partition(" ")
    options: dict[str, Any] = {"merge": vlm_budget.registry.MERGES.get("token_transforming")()} if merged else {}
    return [PRUNERS.get(name)(**options), PRUNERS.get(decoder)()]


def test_the_pairs_have_every_family_and_every_method_inside() -> None:
    families = {tiny_models.build(setup).family for setup, _, _ in PAIRS}
    assert families == set(FAMILIES) - {"gemma3"}, "gemma3 refuses methods inside; see the last test"
    inside = {decoder for _, _, decoder in PAIRS}
    assert inside == {name for name in PRUNERS if PRUNERS.get(name).stage == "decoder"}
    before = {vision.partition(" ")[0] for _, vision, _ in PAIRS}
    assert before == {name for name in PRUNERS if PRUNERS.get(name).stage == "vision"}


@pytest.mark.parametrize(("setup", "vision", "decoder"), PAIRS, ids=NAMES)
def test_a_full_budget_is_bit_identical_and_undo_is_exact(setup: str, vision: str, decoder: str) -> None:
    tiny, logits, tokens = unpatched(setup)
    before = fingerprint(tiny.model)
    with vlm_budget.patch(tiny.model, members(vision, decoder), 1.0) as handle:
        assert changes(before, fingerprint(tiny.model))
        assert handle.plan(**tiny.clone()).drop_layers == []
    assert changes(before, fingerprint(tiny.model)) == []
    with vlm_budget.patch(tiny.model, members(vision, decoder), 1.0) as handle, torch.no_grad():
        assert torch.equal(tiny.model(**tiny.clone()).logits, logits)
        assert handle.report().kept_tokens == handle.report().visual_tokens > 0
        if tokens is not None:
            assert generate(tiny.model, tiny.clone()) == tokens
    with torch.no_grad():
        assert torch.equal(tiny.model(**tiny.clone()).logits, logits)


@pytest.mark.parametrize(("setup", "vision", "decoder"), PAIRS, ids=NAMES)
def test_dropping_in_both_places_keeps_every_contract(setup: str, vision: str, decoder: str) -> None:
    tiny, logits, _ = unpatched(setup)
    valid = tiny.inputs["attention_mask"].bool()
    with vlm_budget.patch(tiny.model, members(vision, decoder), BUDGET) as handle, torch.no_grad():
        promised = handle.plan(**tiny.clone())
        check_both_places_share_the_budget(promised)
        output = tiny.model(**forward_inputs(tiny), use_cache=True)
        check_counts_promised_are_counts_kept(handle, promised, output.past_key_values, tiny)
        kept = handle.kept()
        for index in range(len(valid)):
            alone = tiny.model(**row_inputs(tiny, index)).logits[0]
            assert [seen(item) for item in handle.kept()] == [seen(item) for item in kept if item.row == index]
            torch.testing.assert_close(alone, output.logits[index][valid[index]], **DECODED)
        if not right_padded(tiny):
            tokens = generate(tiny.model, tiny.clone())
            assert handle.report().plan == promised
            assert all(len(row) for row in tokens)
    with torch.no_grad():
        assert torch.equal(tiny.model(**tiny.clone()).logits, logits), "undo left something behind"


def check_both_places_share_the_budget(promised: vlm_budget.Plan) -> None:
    """Less enters than there is, less reaches the end than enters, and the mean keeps to the budget."""
    assert promised.drop_layers
    for row in range(promised.rows):
        mine = [item for item in promised.items if item.row == row]
        total, per_layer = sum(item.total for item in mine), promised.row_tokens(row, LAYERS)
        assert total > per_layer[0] > per_layer[-1]
        assert sum(per_layer) <= int(BUDGET * total + 0.5) * LAYERS
        assert sum(per_layer) > 0.7 * BUDGET * total * LAYERS, "far less is kept than the budget allows"


def seen(item: KeptItem) -> list[tuple[int, ...]]:
    """Positions of the item that every decoder layer sees."""
    steps = {0: item.positions, **dict(item.steps)}
    return [steps[max(start for start in steps if start <= layer)] for layer in range(LAYERS)]


def check_counts_promised_are_counts_kept(handle: Any, promised: vlm_budget.Plan, cache: Any, tiny: Tiny) -> None:
    """What was promised is what the handle tells and every layer's cache holds."""
    assert handle.report().plan == promised
    left = [[0] * LAYERS for _ in range(promised.rows)]
    for item, plan in zip(handle.kept(), promised.items, strict=True):
        counts = [len(positions) for positions in seen(item)]
        assert promised.joint or counts == [plan.tokens_at(layer) for layer in range(LAYERS)]
        left[item.row] = [before + count for before, count in zip(left[item.row], counts, strict=True)]
        for outer, inner in pairwise(seen(item)):
            assert set(inner) <= set(outer)
    assert left == [promised.row_tokens(row, LAYERS) for row in range(promised.rows)]
    text = tiny.inputs["attention_mask"].sum(1).tolist()
    for item in promised.items:
        text[item.row] -= item.total
    widths = [
        max(count + promised.row_tokens(row, LAYERS)[layer] for row, count in enumerate(text))
        for layer in range(LAYERS)
    ]
    assert [layer.keys.shape[2] for layer in cache.layers] == widths


def test_sliding_windows_refuse_the_pair_and_stay_untouched() -> None:
    tiny = fresh("gemma3")
    before = fingerprint(tiny.model)
    with pytest.raises(PatchError, match="sliding_attention"):
        vlm_budget.patch(tiny.model, ["hired", "fastv"], BUDGET)
    assert changes(before, fingerprint(tiny.model)) == []
