"""VisionZip: dominant tokens as they are, contextual tokens made of what is left, counts exact."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Attention, Context
from vlm_budget.pruners.visionzip import VisionZip

SCORES, KEYS = Attention(22, "cls"), Attention(22, "mean_keys")


def scene(item: VisualItem, seed: int = 0, levels: int | None = None) -> Context:
    return make.context(item, make.random_attention(VisionZip(), item, seed, levels=levels))


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def naive_grid(ctx: Context, tokens: list[int], dominant: int, contextual: int) -> dict[int, list[float]]:
    """Value per kept token of one partition, token by token."""
    assert ctx.hidden is not None
    scores, keys = ctx.token_scores(SCORES).tolist(), ctx.in_token_order(KEYS).tolist()
    ranked = sorted(tokens, key=lambda token: -scores[token])
    values = {token: ctx.features[token].tolist() for token in ranked[:dominant]}
    rest = sorted(ranked[dominant:])
    step = len(rest) // contextual if contextual else 1
    targets = [rest[i * step] for i in range(contextual)]
    groups: dict[int, list[int]] = {target: [] for target in targets}
    for token in rest if targets else []:
        if token not in groups:
            groups[max(targets, key=lambda target: cosine(keys[target], keys[token]))].append(token)
    for target, group in groups.items():
        value = ctx.hidden[target].clone()
        if group:
            value += torch.stack([ctx.hidden[token] for token in group]).mean(0)
        values[target] = (value * value.abs()).tolist()
    return values


def check(ctx: Context, pruner: VisionZip, k: int, counts: list[tuple[int, int]]) -> None:
    want: dict[int, list[float]] = {}
    for index, (dominant, contextual) in enumerate(counts):
        want |= naive_grid(ctx, (ctx.item.partition == index).nonzero().flatten().tolist(), dominant, contextual)
    selection = pruner.select(ctx, k)
    assert selection.keep.tolist() == sorted(want)
    torch.testing.assert_close(selection.values, torch.tensor([want[token] for token in sorted(want)]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rows", "cols", "k", "contextual"),
    [
        (24, 24, 64, 10),
        (24, 24, 128, 20),
        (24, 24, 192, 30),
        (7, 9, 32, 5),
        (7, 9, 1, 0),
        (7, 9, 3, 0),
        (7, 9, 4, 1),
        (7, 9, 62, 10),
        (7, 9, 63, 10),
        (1, 1, 1, 0),
    ],
)
def test_a_grid_is_zipped_by_the_formula(rows: int, cols: int, k: int, contextual: int, seed: int) -> None:
    check(scene(make.single(rows, cols), seed), VisionZip(), k, [(k - contextual, contextual)])


def test_partitions_are_zipped_each_on_its_own_with_equal_shares() -> None:
    check(scene(make.frames(3, 4, 5)), VisionZip(), 39, [(11, 2)] * 3)
    item = make.anyres(1, 3, side=4, pad=(0, 4))  # the outer crops show padding only
    check(scene(item), VisionZip(contextual=0.5), 13, [(3, 4), (0, 0), (3, 3), (0, 0)])


@pytest.mark.parametrize(("share", "contextual"), [(0.0, 0), (0.5, 10), (1.0, 20)])
def test_contextual_is_the_share_of_merged_tokens(share: float, contextual: int) -> None:
    check(scene(make.single(6)), VisionZip(contextual=share), 20, [(20 - contextual, contextual)])


@given(make.items(), st.data(), st.floats(0, 1), st.integers(0, 3))
def test_ties_and_odd_shapes_keep_counts_and_dominant_features(
    item: VisualItem, data: st.DataObject, share: float, seed: int
) -> None:
    ctx = scene(item, seed, levels=1)
    k = data.draw(st.integers(1, len(item.candidates)))
    selection = VisionZip(contextual=share).select(ctx, k)
    assert selection.values is not None and len(selection.keep) == k and selection.values.isfinite().all()
    whole = VisionZip(contextual=share).select(ctx, len(item.candidates))
    assert whole.values is not None  # nothing is left over to merge
    torch.testing.assert_close(whole.values, ctx.features[item.candidates])


def test_kept_separators_keep_their_features() -> None:
    item = make.anyres(2, 2, side=4)
    ctx = scene(item)
    selection = VisionZip(newline="keep_all").select(ctx, 30)
    separator = item.partition[selection.keep] < 0
    assert selection.values is not None and int(separator.sum()) == 8
    assert torch.equal(selection.values[separator], ctx.features[selection.keep[separator]])


def test_heads_of_keys_are_averaged_and_attention_is_the_class_tokens() -> None:
    assert VisionZip().needs(make.CLIP) == (SCORES, KEYS)
    assert VisionZip(layer=5).needs(make.SIGLIP) == (Attention(5, "received"), Attention(5, "mean_keys"))


def test_values_have_the_dtype_of_the_features() -> None:
    ctx = scene(make.single(6))
    assert ctx.hidden is not None
    half = replace(ctx, features=ctx.features.bfloat16(), hidden=ctx.hidden.bfloat16())
    values = VisionZip().select(half, 20).values
    assert values is not None and values.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contextual": -0.1}, r"contextual must lie in \[0, 1\], got -0.1"),
        ({"contextual": math.nan}, "contextual"),
        ({"contextual": "30"}, r"contextual must be a number in \[0, 1\], got '30'"),
        ({"layer": 2.0}, "layer must be an int or None, got 2.0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        VisionZip(**fields)


@pytest.mark.gpu
def test_the_gpu_keeps_what_the_cpu_keeps() -> None:
    pruner = VisionZip()
    item = make.anyres(2, 2, side=12, pad=(3, 0))
    attention = make.random_attention(pruner, item)
    on_gpu = {need: [row.cuda() for row in rows] for need, rows in attention.items()}
    want = pruner.select(make.context(item, attention), 111)
    found = pruner.select(make.context(item, on_gpu, device="cuda"), 111)
    assert found.keep.is_cuda and torch.equal(found.keep.cpu(), want.keep)
    assert found.values is not None
    torch.testing.assert_close(found.values.cpu(), want.values, atol=1e-4, rtol=1e-4)
