"""What all methods promise: exactly k distinct tokens of the item, in order, the same every time."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget import Budget, BudgetError, Pruner, Selection, SelectionError, list_methods
from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Attention, Context, saliency
from vlm_budget.registry import PRUNERS

NEWLINES = ["drop", "keep_all", "keep_used_rows"]
VISION = [name for name in list_methods() if PRUNERS.get(name).stage == "vision"]  # others: test_decoder_base.py
METHODS = pytest.mark.parametrize("method", VISION)


def context_for(pruner: Pruner, item: VisualItem, seed: int = 0, levels: int | None = None) -> Context:
    return make.context(item, make.random_attention(pruner, item, seed, levels=levels))


def feasible(item: VisualItem, newline: str) -> tuple[int, int]:
    least = len(item.separators) + 1 if newline == "keep_all" and len(item.separators) else 1
    return least, item.size


@METHODS
@settings(max_examples=60)
@given(st.data(), make.items(), st.sampled_from(NEWLINES), st.integers(0, 3), st.sampled_from([None, 1, 3]))
def test_a_method_keeps_exactly_the_promised_tokens(
    method: str, data: st.DataObject, item: VisualItem, newline: Any, seed: int, levels: int | None
) -> None:
    pruner = PRUNERS.get(method)(newline=newline)
    k = data.draw(st.integers(*feasible(item, newline)))
    ctx = context_for(pruner, item, seed, levels)  # few levels: ties everywhere
    selection = pruner.select(ctx, k)
    keep = selection.keep
    assert keep.dtype == torch.long and keep.shape == (k,)
    assert (keep[1:] > keep[:-1]).all() and (not k or (keep[0] >= 0 and keep[-1] < item.size))
    assert torch.equal(pruner.select(ctx, k).keep, keep)
    assert torch.equal(PRUNERS.get(method)(newline=newline).select(ctx, k).keep, keep)
    kept = item.partition[keep]
    if newline == "drop":
        assert (kept >= 0).sum() == min(k, len(item.candidates))  # a separator never stands in for a patch
    if newline == "keep_all":
        assert (kept < 0).sum() == len(item.separators)
    if newline == "keep_used_rows" and k > 1:
        assert lines_of(item, keep[kept >= 0]) <= set(item.line[keep[kept < 0]].tolist())


@METHODS
@settings(max_examples=25)
@given(item=make.items())
def test_keeping_everything_keeps_everything(method: str, item: VisualItem) -> None:
    for newline in NEWLINES:
        pruner = PRUNERS.get(method)(newline=newline)
        assert pruner.select(context_for(pruner, item), item.size).keep.tolist() == list(range(item.size))


@METHODS
def test_a_callers_default_device_changes_nothing(method: str) -> None:
    pruner = PRUNERS.get(method)()
    item = make.anyres(2, 2, side=5, pad=(2, 0))
    ctx = context_for(pruner, item)
    keep = pruner.select(ctx, 33).keep
    with torch.device("meta"):  # an op that forgot its device makes a tensor without data
        again = pruner.select(ctx, 33).keep
    assert torch.equal(again, keep)


@METHODS
def test_the_global_random_state_is_neither_read_nor_moved(method: str) -> None:
    pruner = PRUNERS.get(method)()
    ctx = context_for(pruner, make.anyres(2, 2, side=5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    keep = pruner.select(ctx, 33).keep
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(pruner.select(ctx, 33).keep, keep)


@METHODS
def test_inputs_are_left_alone(method: str) -> None:
    pruner = PRUNERS.get(method)()
    ctx = context_for(pruner, make.anyres(2, 2, side=5))
    tensors = [ctx.features, ctx.item.partition, ctx.item.patch, ctx.item.line]
    tensors += [row for rows in ctx.attention.values() for row in rows]
    before = [tensor.clone() for tensor in tensors]
    pruner.select(ctx, 33)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@METHODS
def test_the_text_of_a_method_builds_an_equal_one(method: str) -> None:
    cls = PRUNERS.get(method)
    assert str(cls()) == f"{cls.__name__}()"
    changed = cls(newline="keep_all", positions="original")
    assert str(changed) == f"{cls.__name__}(positions='original', newline='keep_all')"
    assert eval(str(changed), {cls.__name__: cls}) == changed != cls()


@METHODS
def test_a_method_is_frozen_and_keyword_only_and_checks_the_common_fields(method: str) -> None:
    cls = PRUNERS.get(method)
    with pytest.raises(FrozenInstanceError):
        cls().newline = "keep_all"
    with pytest.raises(TypeError):
        cls("packed")
    with pytest.raises(OptionError, match="positions must be one of .*'packed', 'original'.*got 'sideways'"):
        cls(positions="sideways")
    with pytest.raises(OptionError, match="newline must be one of .*'drop'.*got None"):
        cls(newline=None)
    assert {"positions", "newline"} <= {field.name for field in fields(cls)}


@METHODS
def test_a_ratio_is_of_all_tokens_of_the_prompt(method: str) -> None:
    items = [make.anyres(2, 2, side=5), make.single(7)]
    assert PRUNERS.get(method)().tokens(Budget(0.2), items) == round(0.2 * (items[0].size + 49))
    assert PRUNERS.get(method)().tokens(Budget.parse(63), items) == 63
    with pytest.raises(BudgetError, match="no number of tokens by itself"):
        PRUNERS.get(method)().tokens(Budget.parse("80 ms"), items)


def test_the_base_has_no_way_to_choose() -> None:
    with pytest.raises(NotImplementedError, match=r"Pruner must implement pick\(\)"):
        Pruner().select(make.context(make.single(3)), 2)


# --- separators ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class First(Pruner):
    """Keeps the first candidates."""

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        return ctx.item.candidates[:k]


@dataclass(frozen=True, kw_only=True)
class Last(Pruner):
    """Keeps the last candidates, and hands them over in reverse."""

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        return ctx.item.candidates.flip(0)[:k]


# positions:  0 1 2 3 | 4 5 6 7 [8] | 9 10 11 12 [13]: the thumbnail, then two mosaic lines and their separators
ITEM = make.anyres(1, 2, side=2)


@pytest.mark.parametrize(
    ("pruner", "k", "keep"),
    [
        (First(), 5, [0, 1, 2, 3, 4]),
        (First(), 12, [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]),  # every patch, no separator
        (First(), 13, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),  # more than patches: separators from the first
        (First(newline="keep_all"), 3, [0, 8, 13]),
        (First(newline="keep_all"), 6, [0, 1, 2, 3, 8, 13]),
        (Last(newline="keep_all"), 6, [8, 9, 10, 11, 12, 13]),
        (First(newline="keep_used_rows"), 4, [0, 1, 2, 3]),  # the thumbnail has no separators
        (First(newline="keep_used_rows"), 6, [0, 1, 2, 3, 4, 8]),
        (First(newline="keep_used_rows"), 9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (First(newline="keep_used_rows"), 11, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13]),
        (Last(newline="keep_used_rows"), 5, [9, 10, 11, 12, 13]),
        (Last(newline="keep_used_rows"), 7, [7, 8, 9, 10, 11, 12, 13]),
        (Last(newline="keep_used_rows"), 1, [12]),  # one token: a patch, not its separator
    ],
    ids=str,
)
def test_separators_are_kept_by_the_policy_and_count(pruner: Pruner, k: int, keep: list[int]) -> None:
    assert pruner.select(make.context(ITEM), k).keep.tolist() == keep


def test_a_line_left_without_room_gives_its_place_to_an_unused_separator() -> None:
    # Five patches would need one separator, and there is no sixth place; four need none and leave one over.
    assert First(newline="keep_used_rows").select(make.context(ITEM), 5).keep.tolist() == [0, 1, 2, 3, 8]


@given(make.items(), st.data())
def test_an_unused_separator_is_kept_only_where_no_patch_fits(item: VisualItem, data: st.DataObject) -> None:
    ctx = make.context(item)
    k = data.draw(st.integers(1, item.size))
    for pruner in (First(newline="keep_used_rows"), Last(newline="keep_used_rows")):
        kept = pruner.select(ctx, k).keep
        patches = kept[item.partition[kept] >= 0]
        unused = len(kept) - len(patches) - len(lines_of(item, patches))
        assert unused >= 0 or k == 1
        if unused > 0 and len(patches) < len(item.candidates):
            more = pruner.pick(ctx, len(patches) + 1)
            assert len(more) + len(lines_of(item, more)) > k


def lines_of(item: VisualItem, patches: torch.Tensor) -> set[int]:
    """Mosaic lines with a separator in which some of ``patches`` stand."""
    return set(item.line[patches].tolist()) & set(item.line[item.separators].tolist())


@pytest.mark.parametrize("k", [1, 2])
def test_keeping_all_separators_needs_room_for_a_patch(k: int) -> None:
    with pytest.raises(BudgetError, match=f"keeps 2 row separators, which leaves none of {k} tokens.*count is 3"):
        First(newline="keep_all").select(make.context(ITEM), k)


def test_without_separators_the_policy_is_moot() -> None:
    for newline in NEWLINES:
        assert First(newline=newline).select(make.context(make.single(3)), 2).keep.tolist() == [0, 1]


# --- broken and merging methods -----------------------------------------------------------------------------------

BROKEN: dict[str, Callable[[Context, int], Any]] = {
    "too few": lambda ctx, k: torch.arange(k - 1),
    "too many": lambda ctx, k: torch.arange(k + 1),
    "twice the same": lambda ctx, k: torch.zeros(k, dtype=torch.long),
    "beyond the item": lambda ctx, k: torch.arange(k) + ctx.item.size - 1,
    "negative": lambda ctx, k: torch.arange(k) - 1,
    "a separator": lambda ctx, k: torch.arange(k) + 8,
    "a table": lambda ctx, k: torch.arange(k)[None],
    "flags": lambda ctx, k: torch.ones(k, dtype=torch.bool),
    "floats": lambda ctx, k: torch.arange(k).float(),
    "int32": lambda ctx, k: torch.arange(k, dtype=torch.int32),
    "a list": lambda ctx, k: list(range(k)),
    "nothing": lambda ctx, k: None,
    "a list in a selection": lambda ctx, k: Selection(list(range(k))),  # type: ignore[arg-type]
    "too few values": lambda ctx, k: Selection(torch.arange(k), torch.zeros(k - 1, 4)),
    "too many values": lambda ctx, k: Selection(torch.arange(k), torch.zeros(k + 1, 4)),
    "values of another width": lambda ctx, k: Selection(torch.arange(k), torch.zeros(k, 3)),
    "values without width": lambda ctx, k: Selection(torch.arange(k), torch.zeros(k)),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("newline", NEWLINES)
def test_a_method_that_breaks_its_promise_is_named(fault: str, newline: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Faulty(Pruner):
        def pick(self, ctx: Context, k: int) -> Any:
            return BROKEN[fault](ctx, k)

    with pytest.raises(SelectionError, match="Faulty"):
        Faulty(newline=newline).select(make.context(ITEM), 6)


@dataclass(frozen=True, kw_only=True)
class Merging(Pruner):
    """Keeps the last candidates in reverse, and marks each with its position."""

    def pick(self, ctx: Context, k: int) -> Selection:
        keep = ctx.item.candidates.flip(0)[:k]
        return Selection(keep, keep[:, None].expand(-1, 4) + 100.0)


@pytest.mark.parametrize(
    ("newline", "k", "keep"),
    [
        ("drop", 5, [7, 9, 10, 11, 12]),
        ("drop", 13, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ("keep_all", 6, [8, 9, 10, 11, 12, 13]),
        ("keep_used_rows", 7, [7, 8, 9, 10, 11, 12, 13]),
    ],
)
def test_merged_values_stay_with_their_tokens_and_separators_with_their_features(
    newline: Any, k: int, keep: list[int]
) -> None:
    ctx = make.context(ITEM)
    selection = Merging(newline=newline).select(ctx, k)
    assert selection.keep.tolist() == keep and selection.values is not None
    for position, value in zip(keep, selection.values, strict=True):
        wanted = ctx.features[position] if position in (8, 13) else torch.full((4,), position + 100.0)
        assert torch.equal(value, wanted)


# --- scores -------------------------------------------------------------------------------------------------------


def test_scores_follow_the_tokens_and_separators_have_none() -> None:
    need = Attention(3, "cls")
    item = make.anyres(1, 2, side=2, pad=(0, 1))
    assert item.patch.tolist() == [0, 1, 2, 3, 1, 0, -1, 3, 2, -1]  # a padded column left and right
    rows = [torch.arange(4.0) + 10 * index for index in range(3)]
    scores = make.context(item, {need: rows}).token_scores(need)
    assert scores.tolist() == [0, 1, 2, 3, 11, 20, -torch.inf, 13, 22, -torch.inf]


def test_a_need_names_the_class_token_where_there_is_one() -> None:
    assert saliency(make.CLIP, 5) == Attention(5, "cls")
    assert saliency(make.SIGLIP, 5) == Attention(5, "received")
