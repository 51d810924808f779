"""DivPrune: tokens far from each other in the language model's space, whatever else the item holds."""

from dataclasses import replace

import pytest
import torch

import synthetic_items as make
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Context
from vlm_budget.pruners.divprune import DivPrune


def slowly(features: torch.Tensor, tokens: list[int], k: int) -> list[int]:
    """The formula, by loops over all pairs of tokens."""

    def distance(a: int, b: int) -> float:
        return 1.0 - float(torch.cosine_similarity(features[a].double(), features[b].double(), dim=0))

    nearest = {a: min((distance(a, b) for b in tokens if b != a), default=0.0) for a in tokens}
    chosen = [max(tokens, key=lambda token: nearest[token])]
    while len(chosen) < k:
        left = [token for token in tokens if token not in chosen]
        chosen.append(max(left, key=lambda token: min(distance(token, other) for other in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize(
    "item",
    [make.single(1), make.single(3, 5), make.anyres(1, 2, side=3, pad=(0, 1)), make.frames(3, 2, 3)],
    ids=lambda item: f"{item.size} tokens",
)
def test_the_choice_is_the_formulas(item: VisualItem) -> None:
    ctx = make.context(item, width=16)
    candidates = item.candidates.tolist()
    for k in {1, len(candidates) // 3 or 1, len(candidates) - 1 or 1, len(candidates)}:
        assert DivPrune().select(ctx, k).keep.tolist() == slowly(ctx.features, candidates, k)


def test_a_separator_is_no_candidate_however_different_it_is() -> None:
    item = make.anyres(1, 2, side=3)
    ctx = make.context(item, width=16)
    features = 1.0 + 0.1 * ctx.features
    features[item.separators] = -1.0  # opposite to every patch
    alike = replace(ctx, features=features)
    for k in (1, 5, 20):
        assert (item.partition[DivPrune().select(alike, k).keep] >= 0).all()
    without = replace(alike, features=features.index_fill(0, item.separators, 0.0))
    assert torch.equal(DivPrune().select(alike, 9).keep, DivPrune().select(without, 9).keep)


def test_one_of_each_group_of_copies_is_chosen_first() -> None:
    item = make.single(4)
    kinds = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    features = kinds[torch.arange(16) % 5]
    ctx = replace(make.context(item), features=features)
    assert sorted(DivPrune().pick(ctx, 5).remainder(5).tolist()) == [0, 1, 2, 3, 4]


def test_a_larger_budget_keeps_what_a_smaller_one_kept() -> None:
    ctx = make.context(make.anyres(2, 2, side=4), width=8)
    few, many = (set(DivPrune().select(ctx, k).keep.tolist()) for k in (10, 31))
    assert few < many


def test_features_are_all_it_needs() -> None:
    ctx = make.context(make.single(5), width=8)
    bare = Context(ctx.item, {}, ctx.features, 0, ctx.device)
    assert DivPrune().needs(make.CLIP) == () and not DivPrune().wants_hidden and not DivPrune().reads_text
    assert torch.equal(DivPrune().select(bare, 7).keep, DivPrune().select(ctx, 7).keep)
