"""What methods inside the language model get to see, and what their base refuses."""

import math
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch

import decoder_contexts as make
from vlm_budget import BudgetError, Selection, list_methods
from vlm_budget.decoder import Captured, DecoderContext, DecoderPruner, Step, most_attended, received_from
from vlm_budget.errors import OptionError
from vlm_budget.pruner import Pruner
from vlm_budget.registry import PRUNERS

DECODERS = [name for name in list_methods() if PRUNERS.get(name).stage == "decoder"]
METHODS = pytest.mark.parametrize("method", DECODERS)
RANKING = pytest.mark.parametrize("method", [name for name in DECODERS if name != "vtw"])  # it keeps all or none
PROMPTS: list[list[str | int]] = [["ab", 41, "cdefgh"], ["a", 5, "b", 30, "cdef"], [7, "x"], [9], ["abc", 2]]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_the_causal_softmax_with_grouped_heads(heads: int) -> None:
    seen = make.captured(7, heads=heads)
    rows = torch.tensor([0, 3, 6])
    found = seen.attention(rows)
    assert found.shape == (heads, 3, 7) and found.dtype == torch.float32
    for head in range(heads):
        for index, row in enumerate(rows.tolist()):
            torch.testing.assert_close(found[head, index], torch.tensor(make.softmax_row(seen, head, row)))


def test_the_logits_are_scaled_and_minus_infinity_where_a_query_may_not_look() -> None:
    seen = replace(make.captured(5), scaling=0.25)
    logits = seen.logits(torch.tensor([2]))
    wanted = sum(float(q) * float(k) for q, k in zip(seen.query[3, 2], seen.key[1, 1], strict=True)) * 0.25
    assert math.isclose(float(logits[3, 0, 1]), wanted, rel_tol=1e-5)
    assert (logits[..., 3:] == -torch.inf).all() and logits[..., :3].isfinite().all()


def test_what_is_visible_replaces_the_causal_rule() -> None:
    visible = torch.ones(5, 5, dtype=torch.bool)
    visible[1, 0] = visible[1, 4] = False
    found = replace(make.captured(5), visible=visible).attention(torch.tensor([1, 0]))
    assert (found[:, 0, [0, 4]] == 0).all() and (found[:, 0, 1:4] > 0).all()
    assert (found[:, 1] > 0).all()  # the first query sees what stands behind it
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_queries_are_float32(dtype: torch.dtype) -> None:
    seen = make.captured(9)
    rough = Captured(seen.query.to(dtype), seen.key.to(dtype), seen.scaling)
    found = rough.attention(torch.tensor([8]))
    assert found.dtype == torch.float32
    exact = Captured(rough.query.double(), rough.key.double(), seen.scaling).attention(torch.tensor([8]))
    torch.testing.assert_close(found, exact.float())


def test_a_context_gives_the_attention_to_its_candidates() -> None:
    ctx = make.context(["ab", 3, "c", 4, "de"], order=1)
    assert ctx.columns.tolist() == [6, 7, 8, 9] and ctx.last.tolist() == [11]
    assert torch.equal(ctx.attention(ctx.last), ctx.captured.attention(torch.tensor([11]))[..., 6:10])


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
def test_received_attention_is_the_mean_over_heads_and_queries(rows: int) -> None:
    ctx = make.context(["ab", 5, "x" * 130])
    asking = ctx.instruction[:rows]
    found = received_from(ctx, asking)
    torch.testing.assert_close(found, ctx.captured.attention(asking)[..., 2:7].mean((0, 1)))


def test_equal_scores_keep_the_earlier_candidate() -> None:
    ctx = make.context(["a", 6, "b"])
    ctx.captured.key[:] = 1
    assert most_attended(ctx, ctx.last, 4).tolist() == [0, 1, 2, 3]
    ctx.captured.query[:] = 1
    ctx.captured.key[:, 5] = 2
    assert most_attended(ctx, ctx.last, 3).tolist() == [4, 0, 1]


@pytest.mark.parametrize(
    ("prompt", "readers"),
    [
        (["ab", 3, "cd"], [5, 6]),
        (["ab", 3, "c", 2, "d"], [8]),  # text between the pictures has not seen the second
        (["ab", 3], [4]),  # no text behind: the last column
        ([3], [2]),
    ],
    ids=str,
)
def test_readers_are_the_text_that_has_seen_every_visual_token(prompt: list[str | int], readers: list[int]) -> None:
    ctx = make.context(prompt)
    assert ctx.readers.tolist() == readers


def test_a_method_without_scores_cannot_ask_for_attention() -> None:
    ctx = replace(make.context([3, "a"]), captured=None)
    with pytest.raises(AssertionError, match="asked for no scores"):
        ctx.attention(ctx.last)


@dataclass(frozen=True, kw_only=True)
class Bare(DecoderPruner):
    """Implements nothing."""


def test_the_base_acts_inside_with_original_positions_and_takes_a_budget() -> None:
    assert isinstance(Bare(), Pruner) and Bare().stage == "decoder"
    assert Bare().positions == "original" and Bare().scores == "previous" and not Bare().fixed
    with pytest.raises(NotImplementedError, match=r"Bare must implement schedule\(\)"):
        Bare().schedule(10, 20, 4)
    with pytest.raises(NotImplementedError, match=r"Bare must implement pick\(\)"):
        Bare().pick(make.context([3, "a"]), 1)


@pytest.mark.parametrize("options", [{"newline": "keep_all"}, {"newline": "keep_used_rows"}])
def test_what_belongs_before_the_language_model_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="methods before the language model"):
        Bare(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="positions must be one of"):
        Bare(positions="sideways")  # type: ignore[arg-type]


def test_a_step_says_the_first_layer_that_sees_fewer() -> None:
    assert make.spent([Step(2, 3), Step(3, 1)], tokens=5, layers=4) == 5 + 5 + 3 + 1


# --- every registered method ----------------------------------------------------------------------------------------


def picked(pruner: DecoderPruner, ctx: DecoderContext, k: int) -> tuple[list[int], torch.Tensor | None]:
    found = pruner.pick(ctx, k)
    selection = found if isinstance(found, Selection) else Selection(found)
    assert selection.keep.dtype == torch.long and selection.keep.shape == (k,)
    return selection.keep.tolist(), selection.values


@RANKING
@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_a_method_picks_exactly_as_many_as_promised(method: str, prompt: list[str | int], levels: int | None) -> None:
    for order in range(sum(isinstance(part, int) for part in prompt)):
        ctx = make.context(prompt, order, levels=levels)
        m = len(ctx.alive)
        for k in range(1, m):
            keep, values = picked(PRUNERS.get(method)(), ctx, k)
            assert len(set(keep)) == k and 0 <= min(keep) <= max(keep) < m
            if values is not None:
                assert values.shape == (k, ctx.hidden.shape[1]) and values.dtype == ctx.hidden.dtype
            again, values_again = picked(PRUNERS.get(method)(), ctx, k)
            assert keep == again and (values is None or torch.equal(values, values_again))


@RANKING
def test_a_callers_default_device_and_random_state_change_nothing(method: str) -> None:
    pruner, ctx = PRUNERS.get(method)(), make.context(["ab", 41, "cdefgh"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    keep, _ = picked(pruner, ctx, 12)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with torch.device("meta"):  # an op that forgot its device makes a tensor without data
        assert picked(pruner, ctx, 12)[0] == keep


@RANKING
def test_what_a_method_sees_is_left_alone(method: str) -> None:
    ctx = make.context(["ab", 41, "cdefgh"])
    assert ctx.captured is not None
    seen = (ctx.alive, ctx.columns, ctx.hidden, ctx.embeds, ctx.captured.query, ctx.captured.key)
    before = [tensor.clone() for tensor in seen]
    picked(PRUNERS.get(method)(), ctx, 12)
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


@RANKING
def test_indices_count_what_is_left_whatever_was_dropped_before(method: str) -> None:
    pruner, full = PRUNERS.get(method)(), make.context(["a", 20, "bcd"])
    later = make.context(["a", 20, "bcd"], alive=[3 * index + 1 for index in range(20)])
    assert picked(pruner, later, 6)[0] == picked(pruner, full, 6)[0]


@METHODS
def test_the_text_of_a_method_builds_an_equal_one(method: str) -> None:
    cls = PRUNERS.get(method)
    assert str(cls()) == f"{cls.__name__}()"
    other = "packed" if cls().positions == "original" else "original"
    changed = cls(positions=other)
    assert str(changed) == f"{cls.__name__}(positions={other!r})"
    assert eval(str(changed), {cls.__name__: cls}) == changed != cls()
    assert cls.paper.startswith("arXiv ")


@METHODS
def test_a_method_is_frozen_hashable_and_keyword_only_and_refuses_what_belongs_elsewhere(method: str) -> None:
    cls = PRUNERS.get(method)
    assert hash(cls()) == hash(cls())
    with pytest.raises(FrozenInstanceError):
        cls().positions = "packed"
    with pytest.raises(TypeError):
        cls("packed")
    with pytest.raises(OptionError, match="positions must be one of"):
        cls(positions="sideways")
    with pytest.raises(OptionError, match="methods before the language model"):
        cls(newline="keep_all")


@METHODS
@pytest.mark.parametrize("layers", [3, 4, 6, 32])
@pytest.mark.parametrize("tokens", [7, 63, 577])
def test_a_schedule_stays_within_its_budget_and_grows_with_it(method: str, layers: int, tokens: int) -> None:
    pruner, before = PRUNERS.get(method)(), 0
    for share in (0.1, 0.3, 0.4, 0.5, 0.67, 0.7, 0.8, 0.9, 0.99):
        spend = round(share * tokens * layers)
        try:
            steps = pruner.schedule(tokens, spend, layers)
        except BudgetError as error:
            assert not before and "nearest feasible budget is" in str(error)
            continue
        assert before <= make.spent(steps, tokens, layers) <= spend
        before = make.spent(steps, tokens, layers)
    assert before
