"""PruMerge and PruMerge+: top attention, neighbours added by attention, one token for the dropped."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Attention, Context
from vlm_budget.pruners.prumerge import PruMerge, PruMergePlus, adaptive_ratio

SCORES, KEYS = Attention(23, "joint_cls"), Attention(23, "keys")
BOTH = pytest.mark.parametrize("cls", [PruMerge, PruMergePlus])


def scene(item: VisualItem, seed: int = 0, levels: int | None = None) -> Context:
    return make.context(item, make.random_attention(PruMerge(), item, seed, levels=levels))


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def naive_grid(
    ctx: Context, tokens: list[int], count: int, neighbours: int, attended: float = 1.0
) -> dict[int, list[float]]:
    """Value per kept token of one partition, token by token."""
    assert ctx.hidden is not None
    attention, keys = ctx.token_scores(SCORES).tolist(), ctx.in_token_order(KEYS).tolist()
    ranked = sorted(tokens, key=lambda token: -attention[token])
    stay = count - 1 if 1 < count < len(tokens) else count
    top = math.floor(attended * stay + 0.5)
    rest = sorted(ranked[top:])
    spread = [rest[(2 * i + 1) * len(rest) // (2 * (stay - top))] for i in range(stay - top)]
    kept = ranked[:top] + spread
    values = {}
    for token in kept:
        others = sorted((t for t in tokens if t != token), key=lambda t: -cosine(keys[token], keys[t]))
        value = ctx.hidden[token].clone()
        for other in others[:neighbours]:
            value += attention[other] * ctx.hidden[other]
        values[token] = (value * value.abs()).tolist()
    dropped = [token for token in ranked if token not in kept]
    if stay < count:
        value = sum((attention[token] * ctx.hidden[token] for token in dropped), torch.zeros(ctx.hidden.shape[1]))
        values[dropped[0]] = (value * value.abs()).tolist()
    return values


def check(ctx: Context, pruner: PruMerge, k: int, counts: list[int], attended: float = 1.0) -> None:
    want: dict[int, list[float]] = {}
    for index, count in enumerate(counts):
        tokens = (ctx.item.partition == index).nonzero().flatten().tolist()
        want |= naive_grid(ctx, tokens, count, pruner.neighbours, attended)
    selection = pruner.select(ctx, k)
    assert selection.keep.tolist() == sorted(want)
    wanted = torch.tensor([want[token] for token in sorted(want)])
    torch.testing.assert_close(selection.values, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rows", "cols"), [(7, 9), (1, 7), (11, 11)])
@pytest.mark.parametrize("neighbours", [0, 3, 32])
def test_a_grid_is_merged_by_the_formula(rows: int, cols: int, neighbours: int) -> None:
    ctx, size = scene(make.single(rows, cols)), rows * cols
    for k in {1, 2, 3, size // 3, size - 1, size}:
        check(ctx, PruMerge(neighbours=neighbours), k, [k])
        check(ctx, PruMergePlus(neighbours=neighbours), k, [k], 0.25)
        check(ctx, PruMergePlus(neighbours=neighbours, attended=0.6), k, [k], 0.6)


def test_neighbours_that_tie_are_taken_in_order() -> None:
    keys = torch.eye(4)[[0, 1, 2, 1, 3, 1]]  # all others are equally far from the first
    scores = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    ctx = make.context(make.single(1, 6), {SCORES: [scores], KEYS: [keys]})
    assert ctx.hidden is not None
    value = PruMerge(neighbours=3).select(ctx, 1).values
    want = ctx.hidden[0] + (scores[1:4, None] * ctx.hidden[1:4]).sum(0)
    torch.testing.assert_close(value, make.signed_square(want)[None])


@BOTH
def test_partitions_are_merged_each_on_its_own_in_proportion_to_their_tokens(cls: type[PruMerge]) -> None:
    attended = 0.25 if cls is PruMergePlus else 1.0
    check(scene(make.frames(3, 4, 5)), cls(neighbours=4), 36, [12, 12, 12], attended)
    item = make.anyres(1, 3, side=4, pad=(0, 2))  # 16 tokens, and crops of 8, 16 and 8
    check(scene(item), cls(neighbours=4), 24, [8, 4, 8, 4], attended)


def test_plus_keeps_the_attended_quarter_and_spreads_the_rest() -> None:
    ctx = make.context(make.single(1, 21), {SCORES: [torch.arange(21.0, 0, -1)], KEYS: [torch.randn(21, 8)]})
    assert PruMerge().select(ctx, 9).keep.tolist() == list(range(9))
    # Eight stay: two by attention, six at even places among the other 19; the ninth stands for the dropped.
    assert PruMergePlus().select(ctx, 9).keep.tolist() == [0, 1, 2, 3, 6, 9, 13, 16, 19]


@BOTH
@given(item=make.items(), data=st.data(), seed=st.integers(0, 3))
def test_ties_and_odd_shapes_keep_counts(cls: type[PruMerge], item: VisualItem, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(1, item.size))
    selection = cls().select(scene(item, seed, levels=1), k)
    assert selection.values is not None and len(selection.keep) == k and selection.values.isfinite().all()


@BOTH
def test_kept_separators_keep_their_features(cls: type[PruMerge]) -> None:
    item = make.anyres(2, 2, side=4)
    ctx = scene(item)
    selection = cls(newline="keep_all").select(ctx, 30)
    separator = item.partition[selection.keep] < 0
    assert selection.values is not None and int(separator.sum()) == 8
    assert torch.equal(selection.values[separator], ctx.features[selection.keep[separator]])


def test_the_last_layer_ranks_with_its_heads_joined() -> None:
    assert PruMerge().needs(make.CLIP) == (SCORES, KEYS)
    assert PruMerge(layer=4).needs(make.CLIP) == (Attention(4, "joint_cls"), Attention(4, "keys"))
    assert PruMergePlus().needs(make.SIGLIP) == (Attention(26, "received"), Attention(26, "keys"))


def test_the_papers_ratio_is_the_share_of_outliers() -> None:
    attention = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 100])  # quartiles 3 and 7, fence 13
    assert adaptive_ratio(attention) == pytest.approx(1 / 9)
    assert adaptive_ratio(torch.ones(576)) == 0
    attention = torch.cat([torch.arange(1.0, 21), torch.tensor([35.0, 90, 33.5])])  # quartiles 6.5 and 17.5, fence 34
    assert adaptive_ratio(attention) == pytest.approx(2 / 23)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (PruMerge, {"neighbours": -1}, "neighbours must be an int of at least 0, got -1"),
        (PruMerge, {"neighbours": None}, "neighbours must be an int of at least 0, got None"),
        (PruMerge, {"layer": "last"}, "layer must be an int or None, got 'last'"),
        (PruMergePlus, {"attended": 1.5}, r"attended must lie in \[0, 1\], got 1.5"),
        (PruMergePlus, {"attended": True}, r"attended must be a number in \[0, 1\], got True"),
    ],
)
def test_fields_out_of_range_are_refused(cls: type[PruMerge], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cls(**fields)


@pytest.mark.gpu
def test_the_gpu_keeps_what_the_cpu_keeps() -> None:
    pruner = PruMergePlus()
    item = make.anyres(2, 2, side=12, pad=(3, 0))
    attention = make.random_attention(pruner, item)
    on_gpu = {need: [row.cuda() for row in rows] for need, rows in attention.items()}
    want = pruner.select(make.context(item, attention), 111)
    found = pruner.select(make.context(item, on_gpu, device="cuda"), 111)
    assert found.keep.is_cuda and torch.equal(found.keep.cpu(), want.keep)
    assert found.values is not None
    torch.testing.assert_close(found.values.cpu(), want.values, atol=1e-4, rtol=1e-4)
