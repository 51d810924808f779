"""MMTok: greedy coverage of the instruction and of the picture."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import synthetic_items as make
from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Context
from vlm_budget.pruners.mmtok import MMTok, shares


def softly(rows: torch.Tensor, tokens: torch.Tensor, temperature: float) -> list[list[float]]:
    """``softmax_j(cos / temperature) / m``, entry by entry."""
    result = []
    for row in rows:
        powers = [math.exp(float(torch.cosine_similarity(row, token, dim=0)) / temperature) for token in tokens]
        result.append([power / sum(powers) / len(rows) for power in powers])
    return result


def slowly(ctx: Context, pruner: MMTok, k: int) -> list[int]:
    """The formula, by loops."""
    candidates = ctx.item.candidates.tolist()
    assert ctx.text is not None and ctx.hidden is not None
    features, hidden = ctx.features[candidates].double(), ctx.hidden[candidates].double()
    rows = softly(ctx.text.double(), features, pruner.text_temperature)
    vision = softly(hidden, hidden, pruner.vision_temperature)
    rows += [[pruner.vision_weight * share for share in row] for row in vision]
    chosen: list[int] = []
    while len(chosen) < k:
        left = [token for token in range(len(candidates)) if token not in chosen]
        chosen.append(max(left, key=lambda token: sum(max(row[each] for each in [*chosen, token]) for row in rows)))
    return sorted(candidates[token] for token in chosen)


@pytest.mark.parametrize("pruner", [MMTok(), MMTok(text_temperature=0.3, vision_temperature=1, vision_weight=2)])
@pytest.mark.parametrize(
    "item",
    [make.single(1), make.single(3, 5), make.anyres(1, 2, side=3, pad=(0, 1)), make.frames(2, 2, 3)],
    ids=lambda item: f"{item.size} tokens",
)
def test_the_choice_is_the_formulas(item: VisualItem, pruner: MMTok) -> None:
    ctx = make.context(item, width=16)
    candidates = len(item.candidates)
    for k in {1, candidates // 3 or 1, candidates - 1 or 1, candidates}:
        assert pruner.select(ctx, k).keep.tolist() == slowly(ctx, pruner, k)


def test_all_shares_of_all_rows_sum_to_one() -> None:
    rows = torch.nn.functional.normalize(torch.randn(7, 8), dim=1)
    tokens = torch.nn.functional.normalize(torch.randn(33, 8), dim=1)
    found = shares(rows, tokens, 0.02)
    torch.testing.assert_close(found, torch.tensor(softly(rows.double(), tokens.double(), 0.02)).float())
    torch.testing.assert_close(found.sum(1), torch.full((7,), 1 / 7))


def test_what_the_instruction_names_is_chosen_first() -> None:
    item = make.single(4)
    ctx = make.context(item, width=16)
    for wanted in (3, 11):
        asked = replace(ctx, text=ctx.features[wanted : wanted + 1].clone())
        assert MMTok().pick(asked, 1).tolist() == [wanted]


def test_without_weight_on_the_picture_only_the_instruction_counts() -> None:
    ctx = make.context(make.single(5), width=16)
    other = replace(ctx, hidden=torch.randn(25, 16))
    pruner = MMTok(vision_weight=0)
    assert torch.equal(pruner.select(ctx, 9).keep, pruner.select(other, 9).keep)
    assert not torch.equal(MMTok().select(ctx, 9).keep, MMTok().select(other, 9).keep)


def test_identical_tokens_are_kept_from_the_first() -> None:
    ctx = make.context(make.single(4))
    same = replace(ctx, features=torch.ones(16, 4), hidden=torch.ones(16, 4))
    assert MMTok().select(same, 6).keep.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_temperature": 0}, "text_temperature must be positive and finite, got 0"),
        ({"vision_temperature": -1.0}, "vision_temperature must be positive and finite, got -1.0"),
        ({"vision_temperature": math.inf}, "vision_temperature must be positive and finite, got inf"),
        ({"vision_temperature": math.nan}, "vision_temperature must be positive and finite, got nan"),
        ({"vision_weight": -0.5}, "vision_weight must be non-negative and finite, got -0.5"),
        ({"vision_weight": "much"}, "vision_weight must be a number, got 'much'"),
        ({"text_temperature": True}, "text_temperature must be a number, got True"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MMTok(**options)


def test_it_asks_for_text_and_for_features_before_the_projector() -> None:
    assert MMTok().reads_text and MMTok().wants_hidden and MMTok().needs(make.CLIP) == ()
