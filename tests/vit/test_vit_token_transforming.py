import math
from typing import Any

import pytest
import torch

from tiny_vit import images, tiny_vit, written_out
from vlm_budget.engine.vit import patch_vit
from vlm_budget.errors import BudgetError, OptionError
from vlm_budget.pruners.vit_token_transforming import VitTokenTransforming

MODELS = {
    "class token": {},
    "class token and registers": {"reg_tokens": 2},
    "average, no prefix": {"class_token": False, "global_pool": "avg"},
}


def importance(query: torch.Tensor, key: torch.Tensor, prefix: int, has_cls: bool) -> list[float]:
    heads, length, width = query.shape
    total = [0.0] * length
    queries = [0] if has_cls else range(length)
    for head in range(heads):
        for row in queries:
            logits = [float(query[head, row] @ key[head, column]) / math.sqrt(width) for column in range(length)]
            bottom = sum(math.exp(logit) for logit in logits)
            for column, logit in enumerate(logits):
                total[column] += math.exp(logit) / bottom / heads / len(queries)
    return total[prefix:]


def naive(model: Any, keep_at: dict[int, int], temperature: float, top: int | None, self_weight: float):
    """The reduction of one image, token by token."""

    def reduce(layer: int, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, sizes: None):
        if layer not in keep_at:
            return x, None
        prefix = model.num_prefix_tokens
        score = importance(query, key, prefix, model.cls_token is not None)
        anchors = sorted(sorted(range(len(x)), key=lambda i: -score[i])[: keep_at[layer]])
        rows = [key[:, prefix + i].flatten() for i in range(len(x))]
        out = []
        for anchor in anchors:
            alike = [float(torch.cosine_similarity(rows[anchor], row, 0)) for row in rows]
            taken = sorted(range(len(x)), key=lambda i: -alike[i])[:top]
            weights = {i: math.exp((alike[i] - 1) / temperature) for i in taken}
            mixed = sum(weight * x[i] for i, weight in weights.items()) / sum(weights.values())
            out.append(self_weight * x[anchor] + (1 - self_weight) * mixed)
        return torch.stack(out), None

    return reduce


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.5, "top": None}, {"top": 3, "self_weight": 0.25}, {"self_weight": 1}]
)
def test_the_model_is_the_written_out_one(options: dict, fields: dict) -> None:
    model = tiny_vit(5, **options)
    pixels = images(model)
    spec = {"temperature": 0.1, "top": 16, "self_weight": 0.0} | fields
    expected = written_out(model, pixels, naive(model, {1: 20, 2: 15, 3: 10}, **spec), proportional=False)
    with patch_vit(model, "token_transforming", "10 tokens", **fields) as handle:
        torch.testing.assert_close(model(pixels), expected, rtol=1e-5, atol=1e-5)  # the matrix is float32
        assert [block.left for block in handle.report().blocks] == [25, 20, 15, 10]


def test_a_small_temperature_is_pruning() -> None:
    model = tiny_vit(5)
    pixels = images(model)
    with patch_vit(model, "token_transforming", ratio=0.4, self_weight=1.0):
        pruned = model(pixels)
    with patch_vit(model, "token_transforming", ratio=0.4, temperature=1e-6):
        torch.testing.assert_close(model(pixels), pruned, rtol=1e-6, atol=1e-6)
    with patch_vit(model, "token_transforming", ratio=0.4):
        assert (model(pixels) - pruned).abs().max() > 1e-3


@pytest.mark.parametrize("exclusive", [True, False])
def test_an_image_of_equal_tokens_stays_one_of_equal_tokens(exclusive: bool) -> None:
    # Rows of the matrix sum to one; without positions, all patch tokens of a constant image are the same.
    model = tiny_vit(5, num_classes=0, global_pool="")
    model.pos_embed.data.zero_()
    pixels = torch.ones_like(images(model))
    one = model(pixels)[:, -1:]
    with patch_vit(model, "token_transforming", ratio=0.4, layers=(3,), exclusive=exclusive):
        torch.testing.assert_close(model(pixels)[:, 1:], one.expand(-1, 10, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(12, {3, 6, 9}), (8, {2, 4, 6}), (2, {0, 1}), (1, {0})],
)
def test_blocks_and_steps_are_evenly_spread(blocks: int, expected: set[int]) -> None:
    counts = [100, *VitTokenTransforming().schedule(100, 31, blocks)]
    steps = {i: a - b for i, (a, b) in enumerate(zip(counts, counts[1:], strict=False)) if a != b}
    assert set(steps) == expected
    assert max(steps.values()) - min(steps.values()) <= 1
    assert counts[-1] == 31


def test_chosen_blocks_must_exist() -> None:
    assert VitTokenTransforming(layers=(0, 3)).schedule(10, 5, 4) == (8, 8, 8, 5)
    with pytest.raises(OptionError, match="only 4 blocks"):
        VitTokenTransforming(layers=(1, 4)).schedule(10, 5, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": "low"},
        {"temperature": float("nan")},
        {"top": 0},
        {"top": 1.5},
        {"self_weight": 1.1},
        {"self_weight": True},
        {"exclusive": 0},
        {"layers": ()},
        {"layers": (2, 1)},
        {"layers": [1, 2]},
        {"layers": (-1,)},
    ],
)
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        VitTokenTransforming(**options)


def test_no_budget_is_an_error() -> None:
    with pytest.raises(BudgetError, match="ratio"):
        patch_vit(tiny_vit(), "token_transforming")
