"""What a method is shown of an item: scores, the projector's inputs, the instruction; and when it is not asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from synthetic_items import anyres, frames, single
from vlm_budget import LayoutError, PlanError, Pruner
from vlm_budget.engine.selection import Observation, PromptText, Seen, seen_rows, select
from vlm_budget.layout import VisualItem
from vlm_budget.plan import ItemPlan, Plan
from vlm_budget.pruner import Attention, Context, Merge, unprojected

CPU = torch.device("cpu")
SEEN: list[Context] = []


@dataclass(frozen=True, kw_only=True)
class Watcher(Pruner):
    """Notes what it is shown."""

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        SEEN.append(ctx)
        return ctx.item.candidates[:k]


@dataclass(frozen=True, kw_only=True)
class HiddenReader(Watcher):
    reads_hidden: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class TextReader(Watcher):
    reads_text: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Mean(Merge):
    """Every kept token becomes the mean of all, taken before the projector."""

    def merge(self, ctx: Context, keep: torch.Tensor) -> torch.Tensor:
        assert ctx.hidden is not None
        return ctx.project(ctx.hidden[ctx.item.candidates].mean(0, keepdim=True)).expand(len(keep), -1)


def tripled(rows: torch.Tensor) -> torch.Tensor:
    """A projector from 2 to 6 channels."""
    return rows.repeat(1, 3)


def observation(items: Sequence[VisualItem], hidden: str = "bfloat16") -> Observation:
    """Projector inputs of 2 channels in a dtype, ``"none"`` or ``"resampled"``; features of 6."""
    inputs = [torch.randn(item.size, 2, dtype=torch.bfloat16) for item in items]
    features = [tripled(rows.float()) for rows in inputs]
    rows: dict[str, Sequence[torch.Tensor | None] | None] = {
        "bfloat16": inputs,
        "none": None,
        "resampled": [None] * len(items),
    }
    return Observation(items[0].modality, list(items), features, {}, rows[hidden])


def chosen(
    pruner: Pruner | None,
    rows: Sequence[Sequence[Seen]],
    keep: int,
    texts: Sequence[PromptText] | None = None,
) -> list[Context]:
    """What the method was shown when every item is to keep so many tokens."""
    SEEN.clear()
    items = [ItemPlan(r, seen.item.modality, seen.item.size, keep) for r, row in enumerate(rows) for seen in row]
    select(pruner, Plan("", "", tuple(items), len(rows)), rows, CPU, texts)
    return list(SEEN)


ITEMS = [single(3), anyres(1, 2, 3), single(4)]
COUNTS = {"image": [ITEMS[0].size + ITEMS[1].size, ITEMS[2].size]}


def test_scores_alone_are_lacking_nothing_but_what_was_not_recorded() -> None:
    first, second = Attention(0, "cls"), Attention(1, "cls")
    plain = Observation("image", [], [], {first: []})
    assert not plain.lacks((), False, False) and not plain.lacks((first,), False, False)
    assert plain.lacks((first, second), False, False) and plain.lacks((), True, False)
    assert not Observation("image", [], [], {first: []}, []).lacks((first,), True, False)


def test_the_projectors_inputs_reach_those_who_read_them_only() -> None:
    seen = observation(ITEMS)
    rows = seen_rows([seen], COUNTS, (), tripled)
    for ctx, hidden in zip(chosen(HiddenReader(), rows, 3), seen.hidden or (), strict=True):
        assert ctx.hidden is hidden
        assert torch.equal(ctx.project(ctx.hidden.float()).float(), ctx.features)
    for ctx in chosen(Watcher(), rows, 3):
        assert ctx.hidden is None and ctx.project is unprojected
        assert ctx.text is None and ctx.text_ids is None


def test_rows_are_projected_in_the_dtype_they_were_recorded_in() -> None:
    (ctx, *_) = chosen(HiddenReader(), seen_rows([observation(ITEMS)], COUNTS, (), tripled), 3)
    assert ctx.hidden is not None and ctx.hidden.dtype == torch.bfloat16
    assert ctx.project(ctx.hidden.double()).dtype == torch.bfloat16


def test_where_tokens_are_no_projections_the_features_stand_in() -> None:
    for ctx in chosen(HiddenReader(), seen_rows([observation(ITEMS, "resampled")], COUNTS, (), tripled), 3):
        assert ctx.hidden is ctx.features and ctx.project is unprojected


def test_rows_that_were_recorded_but_are_not_wanted_are_left_out() -> None:
    assert all(seen.hidden is None for row in seen_rows([observation(ITEMS)], COUNTS, ()) for seen in row)


def test_a_merging_stage_gets_the_projectors_inputs_behind_any_selector() -> None:
    seen = observation([ITEMS[0]])
    rows = seen_rows([seen], {"image": [9]}, (), tripled)
    plan = Plan("", "", (ItemPlan(0, "image", 9, 4),), 1)
    found = select(Watcher(merge=Mean()), plan, rows, CPU)
    table, where = found.values["image"]
    assert seen.hidden is not None and seen.hidden[0] is not None
    wanted = tripled(seen.hidden[0].mean(0, keepdim=True))
    assert where[0].tolist() == [True] * 4 + [False] * 5
    assert torch.equal(table[0, :4], wanted.expand(4, -1))


def test_an_item_that_keeps_all_is_not_touched_even_by_a_merging_stage() -> None:
    rows = seen_rows([observation([ITEMS[0]])], {"image": [9]}, (), tripled)
    found = select(Watcher(merge=Mean()), Plan("", "", (ItemPlan(0, "image", 9, 9),), 1), rows, CPU)
    assert found.keeps_all and not found.values


# --- text ------------------------------------------------------------------------------------------------------------


def texts(*lengths: int) -> list[PromptText]:
    return [PromptText(torch.randn(length, 6), torch.arange(length)) for length in lengths]


def test_every_item_of_a_prompt_is_shown_the_text_of_its_own_prompt() -> None:
    rows = seen_rows([observation(ITEMS), observation([frames(2, 2, 2)])], COUNTS | {"video": [0, 8]}, (), None)
    given = texts(5, 2)
    shown = chosen(TextReader(), rows, 3, given)
    wanted = [given[0], given[0], given[1], given[1]]
    assert [ctx.item.modality for ctx in shown] == ["image", "image", "image", "video"]
    for ctx, text in zip(shown, wanted, strict=True):
        assert ctx.text is not None and torch.equal(ctx.text, text.embeds)
        assert ctx.text_ids is not None and torch.equal(ctx.text_ids, text.ids)


def test_text_that_nobody_reads_is_not_shown() -> None:
    assert all(
        ctx.text is None for ctx in chosen(Watcher(), seen_rows([observation(ITEMS)], COUNTS, ()), 3, texts(5, 2))
    )


def test_a_reader_without_text_is_told_so() -> None:
    rows = seen_rows([observation(ITEMS)], COUNTS, ())
    with pytest.raises(LayoutError, match=r"TextReader\(\) ranks by the prompt's text, which this call does not show"):
        chosen(TextReader(), rows, 3)
    with pytest.raises(LayoutError, match="the prompt has none"):
        chosen(TextReader(), rows, 3, texts(5, 0))


def test_a_reader_that_is_not_asked_needs_no_text() -> None:
    rows = seen_rows([observation([ITEMS[0]])], {"image": [9]}, ())
    assert chosen(TextReader(), rows, 9) == []


# --- no method -------------------------------------------------------------------------------------------------------


def test_without_a_method_all_is_kept_and_nothing_else_can_be() -> None:
    rows = seen_rows([observation([ITEMS[0]])], {"image": [9]}, ())
    found = select(None, Plan("", "", (ItemPlan(0, "image", 9, 9),), 1), rows, CPU)
    assert found.keep["image"].all() and found.keep["image"].shape == (1, 9)
    with pytest.raises(PlanError, match="keeps 4 of 9 image tokens before the language model, where no method acts"):
        chosen(None, rows, 4)
