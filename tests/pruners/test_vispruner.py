"""VisPruner: the most attended tokens, and of the rest those that resemble others least."""

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
from vlm_budget.pruners.vispruner import VisPruner, distinct

NEED = Attention(22, "cls")


def slowly_distinct(features: torch.Tensor, count: int, step: int) -> list[int]:
    """Rounds of dropping even tokens with the best match among the odd ones."""
    left = list(range(len(features)))
    while len(left) > count:
        even, odd = left[0::2], left[1::2]
        match = {a: max(float(torch.cosine_similarity(features[a], features[b], dim=0)) for b in odd) for a in even}
        ranked = sorted(even, key=lambda a: (-match[a], -a))  # the best match first, of equal ones the later
        dropped = ranked[: min(step, len(left) - count)]
        left = [token for token in left if token not in dropped]
    return left


def slowly(ctx: Context, pruner: VisPruner, groups: list[list[int]], counts: list[int]) -> list[int]:
    scores = ctx.token_scores(NEED).tolist()
    assert ctx.hidden is not None
    kept: list[int] = []
    for tokens, count in zip(groups, counts, strict=True):
        ranked = sorted(tokens, key=lambda token: (-scores[token], token))
        important = int(count * pruner.important_ratio)
        rest = ranked[important:]
        kept += ranked[:important]
        if count > important:
            hidden = ctx.hidden[rest].double()
            kept += [rest[place] for place in slowly_distinct(hidden, count - important, pruner.step)]
    return sorted(kept)


def scored(item: VisualItem) -> Context:
    return make.context(item, make.random_attention(VisPruner(), item), width=16)


@pytest.mark.parametrize("ratio", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("step", [1, 3, 8])
@pytest.mark.parametrize("side", [1, 3, 7])
def test_a_single_grid_follows_the_formula(side: int, step: int, ratio: float) -> None:
    item = make.single(side)
    ctx, pruner = scored(item), VisPruner(important_ratio=ratio, step=step)
    every = list(range(side * side))
    for k in {1, len(every) // 5 or 1, len(every) // 2 or 1, len(every) - 1 or 1}:
        assert pruner.select(ctx, k).keep.tolist() == slowly(ctx, pruner, [every], [k])


def test_every_partition_is_on_its_own_or_all_are_one() -> None:
    item = make.anyres(1, 3, side=4, pad=(0, 3))  # 16 in the thumbnail, 4, 16 and 4 in the crops
    ctx = scored(item)
    groups = [(item.partition == index).nonzero().flatten().tolist() for index in range(4)]
    for k, counts in ((10, [3, 3, 2, 2]), (28, [10, 4, 10, 4])):
        assert VisPruner().select(ctx, k).keep.tolist() == slowly(ctx, VisPruner(), groups, counts)
        whole = VisPruner(scope="item")
        assert whole.select(ctx, k).keep.tolist() == slowly(ctx, whole, [item.candidates.tolist()], [k])


@given(st.integers(1, 40), st.data(), st.integers(1, 9))
def test_exactly_so_many_distinct_tokens_remain(size: int, data: st.DataObject, step: int) -> None:
    count = data.draw(st.integers(0, size))
    kinds = data.draw(st.integers(1, size))
    features = torch.eye(size)[torch.arange(size) % kinds]  # copies, whose similarity is exactly 1, or else 0
    kept = distinct(features, count, step).tolist()
    assert kept == (slowly_distinct(features, count, step) if count else [])
    assert len(kept) == count


def test_of_two_copies_one_stays() -> None:
    features = torch.randn(10, 16, generator=torch.Generator().manual_seed(3))
    features[[1, 3, 5, 7, 9]] = features[[0, 2, 4, 6, 8]]
    assert distinct(features, 5, 8).tolist() == [1, 3, 5, 7, 9]


def test_attention_alone_at_ratio_one() -> None:
    item = make.single(6)
    ctx = scored(item)
    best = ctx.token_scores(NEED).topk(11).indices.sort().values
    assert torch.equal(VisPruner(important_ratio=1).select(ctx, 11).keep, best)
    other = replace(ctx, hidden=torch.randn(36, 16))
    assert torch.equal(VisPruner(important_ratio=1).select(other, 11).keep, best)
    assert not torch.equal(VisPruner().select(other, 11).keep, VisPruner().select(ctx, 11).keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"important_ratio": 1.5}, r"important_ratio must lie in \[0, 1\], got 1.5"),
        ({"important_ratio": "half"}, "important_ratio must be a number.*got 'half'"),
        ({"important_ratio": True}, "important_ratio must be a number.*got True"),
        ({"step": 0}, "step must be an int of at least 1, got 0"),
        ({"step": 8.0}, "step must be an int of at least 1, got 8.0"),
        ({"scope": "image"}, "scope must be 'partition' or 'item', got 'image'"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        VisPruner(**options)


def test_it_asks_for_attention_and_for_features_before_the_projector() -> None:
    assert VisPruner().needs(make.CLIP) == (Attention(22, "cls"),)
    assert VisPruner().needs(make.SIGLIP) == (Attention(26, "received"),)
    assert VisPruner().wants_hidden and not VisPruner().reads_text
