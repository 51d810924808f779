"""FastV: one drop behind layer K, by the attention of the last token."""

import pytest
import torch

import decoder_contexts as make
from vlm_budget import BudgetError
from vlm_budget.decoder import DecoderContext, Step
from vlm_budget.errors import OptionError
from vlm_budget.pruners.fastv import FastV


def naive(ctx: DecoderContext, k: int) -> list[int]:
    seen = ctx.captured
    assert seen is not None
    last = len(ctx.hidden) - 1
    rows = [make.softmax_row(seen, head, last) for head in range(len(seen.query))]
    return make.best([sum(row[column] for row in rows) / len(rows) for column in ctx.columns.tolist()], k)


@pytest.mark.parametrize("prompt", [["ab", 7, "cde"], [11, "x"], ["a", 5, "b", 9, "c"], ["abc", 6]], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_last_token_ranks_by_its_mean_over_heads(prompt: list[str | int], seed: int) -> None:
    for order in range(sum(isinstance(part, int) for part in prompt)):
        ctx = make.context(prompt, order, seed)
        for k in {1, 3, len(ctx.alive) - 1}:
            assert sorted(FastV().pick(ctx, k).tolist()) == naive(ctx, k)


def test_equal_attention_keeps_the_earlier_token() -> None:
    ctx = make.context(["ab", 9, "c"], levels=1)
    assert ctx.captured is not None
    ctx.captured.key[:, [4, 6, 9]] = ctx.captured.key[:, [3, 3, 3]]
    for k in range(1, 9):
        assert sorted(FastV().pick(ctx, k).tolist()) == naive(ctx, k)
    ctx.captured.query[:, -1] = 0
    assert FastV().pick(ctx, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("k", "r", "tokens", "layers", "keep"),
    [(2, 0.5, 576, 32, 288), (3, 0.75, 576, 32, 144), (2, 0.778, 577, 32, 128), (1, 0.99, 7, 3, 1), (2, 0.9, 63, 4, 6)],
)
def test_k_and_r_of_the_paper_need_no_budget(k: int, r: float, tokens: int, layers: int, keep: int) -> None:
    pruner = FastV(k=k, r=r)
    assert pruner.fixed and pruner.schedule(tokens, None, layers) == (Step(k, keep),)


def test_a_share_too_small_to_drop_a_token_drops_none() -> None:
    assert FastV(r=0.01).schedule(7, None, 4) == ()


def test_a_budget_is_the_mean_over_all_layers() -> None:
    # 2 layers of 576 and 30 of 64: 3072 of 18432.
    assert FastV().schedule(576, 3072, 32) == (Step(2, 64),)
    assert FastV().schedule(576, 3072 + 29, 32) == (Step(2, 64),)
    assert FastV().schedule(576, 3072 + 30, 32) == (Step(2, 65),)
    assert FastV().schedule(576, 576 * 32, 32) == ()
    assert not FastV().fixed
    with pytest.raises(BudgetError, match=r"FastV\(k=3\).*'9.54%'"):
        FastV(k=3).schedule(576, 3 * 576 + 28, 32)


@pytest.mark.parametrize("k", [0, -1, 1.5, "2", True, None])
def test_k_must_be_a_number_of_layers(k: object) -> None:
    with pytest.raises(OptionError, match="k must be a number of layers"):
        FastV(k=k)  # type: ignore[arg-type]


@pytest.mark.parametrize("r", [0, 1, -0.5, 2, "0.5", True, float("nan")])
def test_r_must_be_a_share_to_drop(r: object) -> None:
    with pytest.raises(OptionError, match="r must be the share to drop"):
        FastV(r=r)  # type: ignore[arg-type]


def test_positions_stay_and_the_text_builds_an_equal_one() -> None:
    assert FastV().positions == "original" and FastV().scores == "previous"
    assert str(FastV(k=3, r=0.75)) == "FastV(k=3, r=0.75)"


def test_half_precision_queries_rank_in_float32() -> None:
    ctx = make.context(["a", 5, "b"])
    seen = ctx.captured
    assert seen is not None
    half = make.context(["a", 5, "b"], seen=make.Captured(seen.query.bfloat16(), seen.key.bfloat16(), seen.scaling))
    assert sorted(FastV().pick(half, 3).tolist()) == naive(half, 3)
    assert FastV().pick(half, 3).dtype == torch.long
