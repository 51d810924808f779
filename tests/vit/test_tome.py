import math

import pytest
import torch

from tiny_vit import images, tiny_vit, written_out
from vlm_budget.engine.vit import patch_vit
from vlm_budget.errors import BudgetError, OptionError
from vlm_budget.pruners.tome import ToMe, merge_pairs, most_similar_pairs

MODELS = {
    "class token": {},
    "average, no prefix": {"class_token": False, "global_pool": "avg"},
    "average, class token and registers": {"reg_tokens": 2, "global_pool": "avg", "qk_norm": True},
    "average and maximum": {"global_pool": "avgmax", "init_values": 0.5},
}


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def naive(
    keys: torch.Tensor, tokens: torch.Tensor, sizes: torch.Tensor | None, r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One image, token by token: [N, d] keys, [N, C] tokens, [N] sizes."""
    rows = keys.tolist()
    edges = []
    for even in range(0, len(rows), 2):
        found = [(cosine(rows[even], rows[odd]), odd) for odd in range(1, len(rows), 2)]
        if found:
            best = max(found)
            edges.append((*best, even))
    edges.sort(reverse=True)
    groups = {index: [index] for index in range(len(rows))}
    for _, odd, even in edges[:r]:
        groups[odd] += groups.pop(even)
    weight = [1.0] * len(rows) if sizes is None else sizes.tolist()
    merged = [
        sum(weight[i] * tokens[i] for i in members) / sum(weight[i] for i in members) for members in groups.values()
    ]
    return torch.stack(merged), torch.tensor([sum(weight[i] for i in members) for members in groups.values()])


@pytest.mark.parametrize("length", [2, 3, 7, 17, 50])
def test_matching_and_merging_are_those_of_the_loop(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    keys = torch.randn(3, length, 5, generator=generator)
    tokens = torch.randn(3, length, 4, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (3, length), generator=generator).float()
    for r in sorted({1, length // 4, length // 2} - {0}):
        found, found_sizes = merge_pairs(tokens, sizes, *most_similar_pairs(keys, r))
        for row in range(3):
            expected, expected_sizes = naive(keys[row], tokens[row], sizes[row], r)
            torch.testing.assert_close(found[row], expected)
            assert found_sizes[row].tolist() == expected_sizes.tolist()


def test_like_tokens_merge_as_often_as_asked_and_lose_nothing() -> None:
    keys, tokens = torch.ones(2, 9, 3), torch.arange(18.0).reshape(2, 9, 1)
    found, sizes = merge_pairs(tokens, torch.ones(2, 9), *most_similar_pairs(keys, 4))
    assert found.shape == (2, 5, 1)
    assert sizes.sum(1).tolist() == [9, 9]
    torch.testing.assert_close((found[..., 0] * sizes).sum(1), tokens.sum((1, 2)))


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("side", [4, 7])
def test_the_model_is_the_written_out_one(side: int, options: dict, proportional: bool) -> None:
    model = tiny_vit(side, **options)
    pixels, tokens, r = images(model), side * side, side

    def merge(layer: int, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, sizes: torch.Tensor | None):
        return naive(key[:, model.num_prefix_tokens :].mean(0), x, sizes, min(r, len(x) // 2))

    expected = written_out(model, pixels, merge, proportional)
    with patch_vit(model, "tome", r=r, proportional=proportional) as handle:
        torch.testing.assert_close(model(pixels), expected)
        lengths = [block.left for block in handle.report().blocks]
    counts = [tokens]
    for _ in range(4):
        counts.append(counts[-1] - min(r, counts[-1] // 2))
    assert lengths == counts[1:]


def test_proportional_attention_makes_copies_of_a_token_and_one_merged_token_alike() -> None:
    # Four equal patches without positions: whatever is merged, the image says the same.
    model = tiny_vit(2)
    model.pos_embed.data.zero_()
    pixels = images(model)[:, :, :4, :4].repeat(1, 1, 2, 2)
    plain = model(pixels)
    with patch_vit(model, "tome", r=1):
        torch.testing.assert_close(model(pixels), plain)
    with patch_vit(model, "tome", r=1, proportional=False):
        assert (model(pixels) - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("tokens", "keep", "blocks"), [(144, 72, 8), (49, 10, 4), (17, 17, 3), (9, 5, 1), (7, 6, 12)])
def test_a_budget_is_met_in_equal_steps(tokens: int, keep: int, blocks: int) -> None:
    counts = [tokens, *ToMe().schedule(tokens, keep, blocks)]
    steps = [before - after for before, after in zip(counts, counts[1:], strict=False)]
    assert counts[-1] == keep
    assert len(steps) == blocks
    assert max(steps) - min(steps) <= 1


def test_r_stops_at_half_of_the_tokens() -> None:
    assert ToMe(r=8).schedule(21, None, 5) == (13, 7, 4, 2, 1)
    assert ToMe(r=0).schedule(21, None, 2) == (21, 21)


def test_a_budget_out_of_reach_names_the_nearest() -> None:
    with pytest.raises(BudgetError, match=r"nearest feasible budget is (\d+) tokens") as caught:
        ToMe().schedule(144, 4, 8)
    least = int(str(caught.value).split("budget is ")[1].split()[0])
    assert ToMe().schedule(144, least, 8)[-1] == least
    with pytest.raises(BudgetError):
        ToMe().schedule(144, least - 1, 8)


@pytest.mark.parametrize("options", [{"r": -1}, {"r": 2.0}, {"r": True}, {"proportional": 1}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        ToMe(**options)
