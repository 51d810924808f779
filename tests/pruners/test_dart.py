"""DART: pivots by the size of their keys, then the tokens least like each pivot; always exactly k."""

import math

import pytest
import torch

import decoder_contexts as make
from vlm_budget import BudgetError
from vlm_budget.decoder import DecoderContext, Step
from vlm_budget.errors import OptionError
from vlm_budget.pruners.dart import DART


def key_size(ctx: DecoderContext, column: int) -> float:
    assert ctx.captured is not None
    return sum(abs(float(value)) for head in ctx.captured.key for value in head[column])


def cosine(ctx: DecoderContext, one: int, other: int) -> float:
    a, b = (ctx.norm(ctx.hidden[column][None])[0].tolist() for column in (one, other))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def naive(ctx: DecoderContext, k: int, visual: int, text: int) -> list[int]:
    columns = ctx.columns.tolist()
    kept = sorted(range(len(columns)), key=lambda i: -key_size(ctx, columns[i]))[: min(visual, k)]
    words = sorted(ctx.text.tolist(), key=lambda column: -key_size(ctx, column))[:text]
    pivots = [columns[i] for i in kept] + words
    share, extra = divmod(k - len(kept), len(pivots))
    for turn, pivot in enumerate(pivots):
        for _ in range(share + (turn < extra)):
            left = [i for i in range(len(columns)) if i not in kept]
            kept.append(min(left, key=lambda i: cosine(ctx, pivot, columns[i])))
    return sorted(kept)


@pytest.mark.parametrize("prompt", [["ab", 17, "cdefg"], [21, "x"], ["a", 5, "b", 19, "c"], ["abc", 9]], ids=str)
@pytest.mark.parametrize(("visual", "text"), [(4, 4), (1, 0), (2, 9), (10, 5)])
@pytest.mark.parametrize("seed", range(2))
def test_it_keeps_what_the_formula_keeps(prompt: list[str | int], visual: int, text: int, seed: int) -> None:
    pruner = DART(pivots_visual=visual, pivots_text=text)
    for order in range(sum(isinstance(part, int) for part in prompt)):
        ctx = make.context(prompt, order, seed)
        for k in {1, 2, 4, len(ctx.alive) // 2, len(ctx.alive) - 1}:
            assert sorted(pruner.pick(ctx, k).tolist()) == naive(ctx, k, visual, text)


@pytest.mark.parametrize("k", range(1, 23))
def test_the_count_is_exact_where_shares_do_not_divide_it(k: int) -> None:
    ctx = make.context(["abcdef", 23, "gh"])
    picked = DART().pick(ctx, k)
    assert picked.dtype == torch.long and len(set(picked.tolist())) == k


def test_of_equal_tokens_the_earlier_stays() -> None:
    ctx = make.context([12, "abcd"])
    assert ctx.captured is not None
    ctx.hidden[:] = ctx.hidden[0]
    ctx.captured.key[:] = 1
    assert sorted(DART().pick(ctx, 7).tolist()) == list(range(7))


def test_a_prompt_without_text_has_visual_pivots_only() -> None:
    ctx = make.context([9])
    for k in (1, 3, 8):
        assert sorted(DART().pick(ctx, k).tolist()) == naive(ctx, k, 4, 4)


def test_pivots_do_not_look_at_other_pictures() -> None:
    ctx = make.context(["a", 6, "b", 8, "c"], order=1)
    assert ctx.captured is not None
    before = DART().pick(ctx, 5).tolist()
    ctx.captured.key[:, 1:7] *= 100
    ctx.hidden[1:7] = 1
    assert DART().pick(ctx, 5).tolist() == before


def test_inputs_are_left_alone() -> None:
    ctx = make.context(["ab", 11, "cd"])
    assert ctx.captured is not None
    before = [tensor.clone() for tensor in (ctx.hidden, ctx.embeds, ctx.captured.key, ctx.captured.query)]
    DART().pick(ctx, 6)
    after = (ctx.hidden, ctx.embeds, ctx.captured.key, ctx.captured.query)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_states_that_want_gradients_can_be_compared() -> None:
    ctx = make.context(["ab", 11, "cd"])
    wanted = DART().pick(ctx, 7).tolist()
    ctx.hidden.requires_grad_()
    assert DART().pick(ctx, 7).tolist() == wanted


def test_a_budget_is_the_mean_over_all_layers() -> None:
    assert DART().schedule(576, 2 * 576 + 30 * 64, 32) == (Step(2, 64),)
    assert DART(layer=5).schedule(63, 5 * 63 + 9, 6) == (Step(5, 9),)
    with pytest.raises(BudgetError, match=r"DART\(layer=5\).*'83.6%'"):
        DART(layer=5).schedule(63, 5 * 63, 6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("layer", 0), ("layer", 2.0), ("pivots_visual", 0), ("pivots_text", -1), ("pivots_text", None), ("layer", True)],
)
def test_counts_are_checked(name: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{name} must be an int of at least"):
        DART(**{name: value})


def test_positions_stay() -> None:
    assert DART().positions == "original" and DART().scores == "previous" and not DART().fixed
