"""HoloV: quotas per chunk by attention and variety, exact on every shape."""

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
from vlm_budget.pruners.holov import HoloV, chunk_quotas, similarity_variance

NEED = Attention(22, "cls")


def scene(item: VisualItem, seed: int = 0, levels: int | None = None) -> Context:
    return make.context(item, make.random_attention(HoloV(), item, seed, levels=levels))


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def naive(ctx: Context, k: int, chunks: int, alpha: float) -> list[int]:
    """One partition without padding; every chunk larger than its quota."""
    n = ctx.item.size
    attention, features = ctx.token_scores(NEED).tolist(), ctx.features.tolist()
    bounds = [math.ceil(i * n / chunks) for i in range(chunks + 1)]
    parts = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    variance = [0.0] * n
    for part in parts:
        for token in part:
            similar = [cosine(features[token], features[other]) for other in part]
            mean = sum(similar) / len(similar)
            variance[token] = sum((value - mean) ** 2 for value in similar) / len(similar)
    scale = sum(1e3 * value for value in attention) / sum(variance)
    score = [1e3 * a + alpha * v * scale for a, v in zip(attention, variance, strict=True)]
    of_chunk = [sum(score[token] for token in part) / len(part) for part in parts]
    quotas = [math.floor(value / sum(of_chunk) * k) for value in of_chunk]
    largest = sorted(range(chunks), key=lambda i: -of_chunk[i])
    for index in largest[: k - sum(quotas)]:
        quotas[index] += 1
    kept = []
    for part, quota in zip(parts, quotas, strict=True):
        assert quota <= len(part)
        kept += sorted(part, key=lambda token: -attention[token])[:quota]
    return sorted(kept)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "cols", "chunks"), [(24, 24, 16), (9, 7, 16), (9, 7, 5), (5, 5, 1), (12, 12, 7)])
def test_a_grid_is_pruned_by_the_formula(rows: int, cols: int, chunks: int, seed: int) -> None:
    ctx = scene(make.single(rows, cols), seed)
    for alpha in (0.09, 2.0):
        for k in {1, rows * cols // 9, rows * cols // 3}:
            found = HoloV(chunks=chunks, alpha=alpha).select(ctx, k).keep.tolist()
            assert found == naive(ctx, k, chunks, alpha)


def test_variety_draws_tokens_where_attention_is_even() -> None:
    item = make.single(4, 8)
    features = torch.ones(32, 4)
    features[16:] = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    ctx = Context(item, {NEED: [torch.full((32,), 1 / 32)]}, features, 0, torch.device("cpu"))
    plain = HoloV(chunks=2, alpha=0).select(ctx, 12).keep
    varied = HoloV(chunks=2, alpha=1).select(ctx, 12).keep
    assert [int((keep >= 16).sum()) for keep in (plain, varied)] == [6, 9]  # 1 : 1, and 1 : 1 + 2


def test_within_a_chunk_attention_alone_decides() -> None:
    ctx = scene(make.single(6))
    keep = HoloV(chunks=1, alpha=50).select(ctx, 7).keep
    assert keep.tolist() == ctx.attention[NEED][0].topk(7).indices.sort().values.tolist()


def test_variance_is_over_the_tokens_of_the_chunk() -> None:
    features = torch.tensor([[1.0, 0], [0, 1], [1, 0], [2, 0], [-1, 0]])
    found = similarity_variance(features, torch.tensor([0, 0, 1, 1, 1]))
    torch.testing.assert_close(found, torch.tensor([0.25, 0.25, 8 / 9, 8 / 9, 8 / 9]))


@pytest.mark.parametrize(
    ("total", "weights", "caps", "quotas"),
    [
        (10, [3, 2, 1], [9, 9, 9], [6, 3, 1]),  # 5, 3.33 and 1.67 rounded down; the one left goes to the largest
        (10, [3.3, 3.3, 3.4], [9, 9, 9], [3, 3, 4]),
        (7, [1, 1, 1], [9, 9, 9], [3, 2, 2]),
        (10, [8, 1, 1], [4, 9, 9], [4, 3, 3]),
        (10, [1, 0, 0], [4, 5, 5], [4, 3, 3]),
        (4, [0, 0], [3, 3], [2, 2]),
        (6, [0, 5], [3, 3], [3, 3]),
    ],
)
def test_quotas_by_hand(total: int, weights: list[float], caps: list[int], quotas: list[int]) -> None:
    assert chunk_quotas(total, weights, caps) == quotas


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 9)), min_size=1, max_size=16), st.data())
def test_quotas_are_exact_and_within_their_chunks(chunks: list[tuple[float, int]], data: st.DataObject) -> None:
    weights, caps = (list(part) for part in zip(*chunks, strict=True))
    total = data.draw(st.integers(0, sum(caps)))
    quotas = chunk_quotas(total, weights, caps)
    assert sum(quotas) == total
    assert all(0 <= quota <= cap for quota, cap in zip(quotas, caps, strict=True))


@given(make.items(), st.data(), st.integers(1, 20))
def test_ties_and_odd_shapes_keep_counts(item: VisualItem, data: st.DataObject, chunks: int) -> None:
    k = data.draw(st.integers(1, item.size))
    assert len(HoloV(chunks=chunks).select(scene(item, levels=1), k).keep) == k


def test_partitions_share_in_proportion_to_their_tokens() -> None:
    item = make.anyres(1, 3, side=4, pad=(0, 2))  # 16 tokens, and crops of 8, 16 and 8
    assert make.per_partition(item, HoloV().select(scene(item), 24).keep) == [8, 4, 8, 4]


def test_attention_is_of_the_layer_the_language_model_reads() -> None:
    assert HoloV().needs(make.CLIP) == (NEED,)
    assert HoloV().needs(make.SIGLIP) == (Attention(26, "received"),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunks": 0}, "chunks must be an int of at least 1, got 0"),
        ({"chunks": 2.5}, "chunks"),
        ({"alpha": -1}, "alpha must be at least 0 and finite, got -1"),
        ({"alpha": math.nan}, "alpha"),
        ({"alpha": None}, "alpha must be a number, got None"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HoloV(**fields)


@pytest.mark.gpu
def test_the_gpu_keeps_what_the_cpu_keeps() -> None:
    pruner = HoloV()
    item = make.anyres(2, 2, side=12, pad=(3, 0))
    attention = make.random_attention(pruner, item)
    on_gpu = {need: [row.cuda() for row in rows] for need, rows in attention.items()}
    want = pruner.select(make.context(item, attention), 111)
    found = pruner.select(make.context(item, on_gpu, device="cuda"), 111)
    assert found.keep.is_cuda and torch.equal(found.keep.cpu(), want.keep)
