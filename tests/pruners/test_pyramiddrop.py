"""PyramidDrop: shrinking shares over three stages, by the last instruction token's attention."""

import pytest

import decoder_contexts as make
from vlm_budget import BudgetError
from vlm_budget.decoder import DecoderContext, Step
from vlm_budget.errors import OptionError
from vlm_budget.pruners.pyramiddrop import PyramidDrop


def naive(ctx: DecoderContext, row: int, k: int) -> list[int]:
    seen = ctx.captured
    assert seen is not None
    rows = [make.softmax_row(seen, head, row) for head in range(len(seen.query))]
    return make.best([sum(each[column] for each in rows) / len(rows) for column in ctx.columns.tolist()], k)


@pytest.mark.parametrize(
    ("prompt", "row"), [(["ab", 7, "cde"], 11), (["a", 5, "b", 9, "cd"], 17), (["abc", 6], 8), ([11, "x"], 11)], ids=str
)
def test_the_last_instruction_token_ranks(prompt: list[str | int], row: int) -> None:
    for order in range(sum(isinstance(part, int) for part in prompt)):
        ctx = make.context(prompt, order)
        for k in {1, 3, len(ctx.alive) - 1}:
            assert sorted(PyramidDrop().pick(ctx, k).tolist()) == naive(ctx, row, k)


def test_a_later_stage_ranks_what_is_left() -> None:
    ctx = make.context(["a", 5, "bc"], alive=[1, 4, 6, 20, 33])
    assert sorted(PyramidDrop().pick(ctx, 2).tolist()) == naive(ctx, 7, 2)  # indices into what is left, not positions


def test_the_papers_stages_are_found_from_their_budget() -> None:
    half = (Step(8, 288), Step(16, 144), Step(24, 72))
    assert PyramidDrop().schedule(576, 8 * (576 + 288 + 144 + 72), 32) == half
    assert PyramidDrop(ratios=(0.5, 0.25, 0.125)).schedule(576, None, 32) == half


def test_eight_layers_more_are_one_token_more_in_one_stage() -> None:
    spend = 8 * (576 + 288 + 144 + 72)
    assert PyramidDrop().schedule(576, spend + 7, 32) == PyramidDrop().schedule(576, spend, 32)
    more = PyramidDrop().schedule(576, spend + 8, 32)
    assert [step.keep for step in more] == [288, 145, 72]  # 145 is a factor of 0.50173, 289 one of 0.50174


@pytest.mark.parametrize(("tokens", "layers"), [(63, 6), (577, 32), (111, 28)])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_every_stage_keeps_the_same_share_of_the_one_before(tokens: int, layers: int, share: float) -> None:
    steps = PyramidDrop().schedule(tokens, round(share * tokens * layers), layers)
    factor = steps[0].keep / tokens
    for stage, step in enumerate(steps, 1):
        assert abs(step.keep - tokens * factor**stage) <= stage + 1


@pytest.mark.parametrize(
    ("layers", "steps"),
    [
        (4, (Step(1, 32), Step(2, 16), Step(3, 8))),
        (3, (Step(1, 32), Step(2, 8))),  # the second stage meets the third
        (2, (Step(1, 8),)),
    ],
)
def test_stages_that_meet_in_a_shallow_model_are_the_deepest_of_them(layers: int, steps: tuple[Step, ...]) -> None:
    assert PyramidDrop(ratios=(0.5, 0.25, 0.125)).schedule(64, None, layers) == steps


def test_fixed_shares_round_and_keep_one_token_and_the_same_count_is_no_step() -> None:
    pruner = PyramidDrop(at=(0.25, 0.5, 0.75), ratios=(1.0, 0.5, 0.001))
    assert pruner.fixed and not PyramidDrop().fixed
    assert pruner.schedule(7, None, 32) == (Step(16, 4), Step(24, 1))


def test_the_layers_before_the_first_stage_are_the_least_budget() -> None:
    with pytest.raises(BudgetError, match=r"PyramidDrop\(\).*'25.14%'"):
        PyramidDrop().schedule(576, 8 * 576 + 23, 32)
    assert PyramidDrop().schedule(576, 8 * 576 + 24, 32) == (Step(8, 1),)


def test_options_are_checked_and_lists_become_tuples() -> None:
    with pytest.raises(OptionError, match="ratios must be 3 shares"):
        PyramidDrop(ratios=(0.5,))
    with pytest.raises(OptionError, match="at must be ascending"):
        PyramidDrop(at=(0.5, 0.25))
    pruner = PyramidDrop(at=[0.5], ratios=[0.25])  # type: ignore[arg-type]
    assert pruner == PyramidDrop(at=(0.5,), ratios=(0.25,)) and hash(pruner)
    assert str(pruner) == "PyramidDrop(at=(0.5,), ratios=(0.25,))"


def test_it_reads_the_layer_behind_and_renumbers() -> None:
    assert PyramidDrop().scores == "own" and PyramidDrop().positions == "packed"
    assert str(PyramidDrop()) == "PyramidDrop()"
