"""What a method may rely on: features, geometry, merged embeddings, newline policies. Methods made for the test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vlm_budget
from tiny_parts import Tiny
from vlm_budget import Pruner, Selection, SelectionError
from vlm_budget.pruner import Context

from .conftest import BUDGET, TOKENS, VISION, Case, fresh
from .patched import TOLERANCE, compacted, forward, generate, kept_per_row
from .reference import Row, greedy, language_model, recorded, rows

SEEN: list[Context] = []


@dataclass(frozen=True, kw_only=True)
class Loudest(Pruner):
    """Keeps the features of the largest norm."""

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        SEEN.append(ctx)
        norms = ctx.features.float().norm(dim=-1)
        norms[ctx.item.separators] = -torch.inf
        return norms.topk(k).indices


@dataclass(frozen=True, kw_only=True)
class Folded(Pruner):
    """Keeps the first tokens, each plus the mean of all that go."""

    def pick(self, ctx: Context, k: int) -> Selection:
        candidates = ctx.item.candidates
        keep, gone = candidates[:k], candidates[k:]
        folded = ctx.features[keep] + (ctx.features[gone].mean(0) if len(gone) else 0)
        order = torch.arange(k).flip(0)  # any order is allowed
        return Selection(keep[order], folded[order])


@dataclass(frozen=True, kw_only=True)
class Greedy(Pruner):
    """Breaks a promise in the way it is told."""

    fault: str = "count"

    def pick(self, ctx: Context, k: int) -> Any:
        candidates = ctx.item.candidates
        return {
            "count": candidates[: k + 1],
            "twice": torch.cat([candidates[: k - 1], candidates[:1]]),
            "dtype": candidates[:k].float(),
            "shape": candidates[:k][None],
        }[self.fault]


def item_columns(row: Row) -> torch.Tensor:
    """Visual columns of a row, in order."""
    return row.visual.nonzero().flatten()


def test_features_are_those_the_language_model_gets(any_case: Case) -> None:
    tiny = any_case.tiny
    SEEN.clear()
    with vlm_budget.patch(tiny.model, Loudest(), BUDGET) as handle:
        found = forward(handle, tiny.clone(), any_case.full)
        items = handle.report().plan.items
    for index, row in enumerate(any_case.full):
        mine = [ctx for ctx, item in zip(SEEN, items, strict=True) if item.row == index]
        assert [ctx.order for ctx in mine] == list(range(len(mine)))
        # Images first, then videos; one set-up has both in a prompt, and there the image comes first.
        visual = row.embeds[item_columns(row)]
        assert torch.equal(torch.cat([ctx.features for ctx in mine]), visual)
        assert [ctx.item.size for ctx in mine] == [item.total for item in items if item.row == index]
        start, want = 0, []
        for ctx, keep in zip(mine, [item.keep for item in items if item.row == index], strict=True):
            norms = visual[start : start + ctx.item.size].norm(dim=-1)
            norms[ctx.item.separators] = -torch.inf
            want += sorted((norms.topk(keep).indices + start).tolist())
            start += ctx.item.size
        kept = [column for column in found.columns[index] if row.visual[column]]
        assert kept == item_columns(row)[want].tolist()


def folded_row(row: Row, columns: list[int], items: list[Any], separators: list[torch.Tensor]) -> Row:
    """The compacted row with merged embeddings, by hand."""
    embeds, start = row.embeds.clone(), 0
    visual = item_columns(row)
    for item, newline in zip(items, separators, strict=True):
        mine = visual[start : start + item.total]
        mine = mine[~torch.isin(torch.arange(item.total), newline)]
        if item.keep < item.total:
            embeds[mine[: item.keep]] = row.embeds[mine[: item.keep]] + row.embeds[mine[item.keep :]].mean(0)
        start += item.total
    folded = Row(**{**vars(row), "embeds": embeds})
    return folded.compact(columns, packed=not row.multi_axis)


def test_merged_embeddings_equal_the_reference(generating_case: Case) -> None:
    tiny = generating_case.tiny
    with vlm_budget.patch(tiny.model, Folded(), BUDGET) as handle, torch.no_grad():
        logits = tiny.model(**tiny.clone()).logits
        kept = handle.kept()
        plan = handle.report().plan
        tokens = generate(tiny.model, tiny.clone())
    valid = tiny.inputs["attention_mask"].bool()
    for index, row in enumerate(generating_case.full):
        items = [item for item in plan.items if item.row == index]
        mine = [item for item in kept if item.row == index]
        columns, start = (~row.visual).nonzero().flatten().tolist(), 0
        for item in mine:
            columns += [int(item_columns(row)[start + position]) for position in item.positions]
            start += item.item.size
        columns.sort()
        want = folded_row(row, columns, items, [item.item.separators for item in mine])
        torch.testing.assert_close(logits[index][valid[index]][columns], want.logits(), **TOLERANCE)
        assert tokens[index] == greedy(want, TOKENS)


@pytest.mark.parametrize("fault", ["count", "dtype", "shape"])
def test_a_method_that_breaks_its_promise_is_caught(llava: Tiny, fault: str) -> None:
    with vlm_budget.patch(llava.model, Greedy(fault=fault), BUDGET), pytest.raises(SelectionError, match="promised"):
        generate(llava.model, llava.clone())


def test_a_token_kept_twice_is_caught(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, Greedy(fault="twice"), BUDGET), pytest.raises(SelectionError, match="promised"):
        generate(llava.model, llava.clone())


# --- newlines --------------------------------------------------------------------------------------------------------

NEWLINES = ["llava_next", "llava_next_video_image", "llava_onevision", "llava_onevision_multi"]


def newline_flags(tiny: Tiny, row: Row) -> torch.Tensor:
    """[n] bool, columns that hold the newline vector, told by their embeddings."""
    return (row.embeds == tiny.model.model.image_newline).all(-1)


@pytest.mark.parametrize("method", VISION)
@pytest.mark.parametrize("policy", ["drop", "keep_all", "keep_used_rows"])
@pytest.mark.parametrize("name", NEWLINES)
def test_newline_policies(name: str, policy: str, method: str) -> None:
    tiny = fresh(name)
    full = rows(tiny.model, tiny.clone())
    with vlm_budget.patch(tiny.model, method, 0.5, newline=policy) as handle:
        found = forward(handle, tiny.clone(), full)
        kept = handle.kept()
        per_row = kept_per_row(handle, len(full))
    for index, (row, columns) in enumerate(zip(found.rows, found.columns, strict=True)):
        newline = newline_flags(tiny, row)
        assert newline.any()
        assert int(row.visual[columns].sum()) == per_row[index]
        alone = row.compact(columns, packed=True)
        torch.testing.assert_close(found.logits[index][columns], alone.logits(), **TOLERANCE)
        count = int(newline[columns].sum())
        if policy == "drop":
            assert count == 0
        elif policy == "keep_all":
            assert count == int(newline.sum())
    if policy == "keep_used_rows":
        for item in kept:
            check_used_rows(item.item, set(item.positions))


def check_used_rows(item: Any, kept: set[int]) -> None:
    """Every text line that keeps a patch keeps its newline."""
    separators = item.separators.tolist()
    used = {int(item.line[p]) for p in kept if int(item.partition[p]) >= 0 and int(item.line[p]) >= 0}
    closed = {int(item.line[s]) for s in separators if s in kept}
    assert used <= closed


def test_a_whole_budget_of_patches_leaves_the_rest_to_newlines(llava: Tiny) -> None:
    tiny = fresh("llava_next")
    full = rows(tiny.model, tiny.clone())
    with vlm_budget.patch(tiny.model, "uniform", 0.99) as handle:
        found = forward(handle, tiny.clone(), full)
    for row, columns in zip(full, found.columns, strict=True):
        newline = newline_flags(tiny, row)
        assert int((row.visual & ~newline)[columns].sum()) == int((row.visual & ~newline).sum())
        assert 0 < int(newline[columns].sum()) < int(newline.sum())


def test_positions_override_the_methods_own(llava: Tiny) -> None:
    inputs = llava.clone()
    for positions in ("packed", "original"):
        with vlm_budget.patch(llava.model, "uniform", BUDGET, positions=positions) as handle:
            assert handle.method.positions == "packed"
            with recorded(language_model(llava.model)) as calls, torch.no_grad():
                llava.model(**inputs)
            assert handle.report().positions == positions
        found = calls[0]["position_ids"][0]
        steps = found.diff()
        assert bool((steps == 1).all()) == (positions == "packed")


def test_compacted_prompts_are_all_a_method_changes(llava_case: Case) -> None:
    packed = compacted(llava_case.prefill, packed=True)
    assert [row.length for row in packed] == [len(columns) for columns in llava_case.prefill.columns]
