"""CLS top-k: the most attended tokens, per partition or over the whole item."""

import pytest
import torch

import synthetic_items as make
from vlm_budget.errors import OptionError
from vlm_budget.pruner import Attention, Context
from vlm_budget.pruners.cls_topk import ClsTopK

NEED = Attention(22, "cls")


def scored(item: object, *rows: list[float]) -> Context:
    return make.context(item, {NEED: [torch.tensor(row) for row in rows]})  # type: ignore[arg-type]


def test_scores_come_from_the_feature_layer() -> None:
    assert ClsTopK().needs(make.CLIP) == (Attention(22, "cls"),)
    assert ClsTopK().needs(make.SIGLIP) == (Attention(26, "received"),)


@pytest.mark.parametrize("scope", ["partition", "item"])
def test_a_single_grid_keeps_its_highest_scores(scope: str) -> None:
    item = make.single(24)
    scores = torch.rand(576)
    keep = ClsTopK(scope=scope).select(make.context(item, {NEED: [scores]}), 115).keep  # type: ignore[arg-type]
    assert set(keep.tolist()) == set(scores.topk(115).indices.tolist())


def test_partitions_keep_equal_shares_however_they_score() -> None:
    item = make.frames(3, 2, 2)
    ctx = scored(item, [9, 8, 7, 6], [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0])
    assert ClsTopK().select(ctx, 3).keep.tolist() == [0, 7, 10]
    assert ClsTopK().select(ctx, 7).keep.tolist() == [
        0,
        1,
        2,
        6,
        7,
        8,
        10,
    ]  # the odd one to the first; ties to the left


def test_over_the_item_the_highest_scores_stay_wherever_they_are() -> None:
    ctx = scored(make.frames(3, 2, 2), [9, 8, 7, 6], [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0])
    assert ClsTopK(scope="item").select(ctx, 5).keep.tolist() == [0, 1, 2, 3, 10]


def test_a_partition_lost_to_padding_or_too_small_passes_its_share_on() -> None:
    item = make.anyres(1, 3, side=4, pad=(0, 4))  # the outer crops show padding only
    ctx = make.context(item, make.random_attention(ClsTopK(), item))
    assert make.per_partition(item, ClsTopK().select(ctx, 10).keep) == [5, 0, 5, 0]
    narrow = make.anyres(1, 3, side=4, pad=(0, 3))  # the outer crops show one column
    ctx = make.context(narrow, make.random_attention(ClsTopK(), narrow))
    assert make.per_partition(narrow, ClsTopK().select(ctx, 28).keep) == [10, 4, 10, 4]


@pytest.mark.parametrize("scope", ["partition", "item"])
@pytest.mark.parametrize("side", [1, 7, 24])
def test_of_equal_scores_the_earlier_token_stays(scope: str, side: int) -> None:
    item = make.single(side)
    ctx = make.context(item, {NEED: [torch.full((side * side,), 0.25)]})
    for k in {1, side, side * side}:
        assert ClsTopK(scope=scope).select(ctx, k).keep.tolist() == list(range(k))  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["partition", "item"])
def test_separators_are_never_ranked(scope: str) -> None:
    item = make.anyres(1, 2, side=2)
    ctx = make.context(item, {NEED: [torch.zeros(4)] * 3})
    keep = ClsTopK(scope=scope).select(ctx, 12).keep  # type: ignore[arg-type]
    assert (item.partition[keep] >= 0).all()


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(OptionError, match="scope must be 'partition' or 'item', got 'image'"):
        ClsTopK(scope="image")  # type: ignore[arg-type]
    assert str(ClsTopK(scope="item")) == "ClsTopK(scope='item')"
