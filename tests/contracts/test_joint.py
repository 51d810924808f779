"""Methods that share a prompt's tokens out over its images and videos by what they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

import tiny_models
import vlm_budget
from tiny_models import Tiny
from vlm_budget.errors import OptionError, SelectionError
from vlm_budget.plan import Plan
from vlm_budget.pruner import Context, Pruner, Selection

from . import test_every_method as every
from .conftest import BUDGET, fresh
from .patched import compacted, forward, generate
from .reference import rows


@dataclass(frozen=True, kw_only=True)
class Loudest(Pruner):
    """The tokens with the largest features of the whole prompt."""

    doubled: bool = False
    merges = True

    @property
    def joint(self) -> bool:
        return True

    def pick_prompt(self, contexts: Sequence[Context], k: int) -> Selection:
        features = torch.cat([ctx.features for ctx in contexts])
        keep = features.float().norm(dim=1).argsort(descending=True, stable=True)[:k]
        return Selection(keep, 2 * features[keep] if self.doubled else None)


@dataclass(frozen=True, kw_only=True)
class Greedy(Loudest):
    """Takes one more than it may, or one twice."""

    twice: bool = False

    def pick_prompt(self, contexts: Sequence[Context], k: int) -> Selection:
        keep = super().pick_prompt(contexts, k + 1).keep
        return Selection(torch.cat([keep[: k - 1], keep[:1]]) if self.twice else keep)


@pytest.mark.parametrize("name", list(tiny_models.SETUPS))
@pytest.mark.parametrize("doubled", [False, True])
def test_every_contract_holds(name: str, doubled: bool) -> None:
    every.test_keeping_all_is_bit_identical(name, Loudest(doubled=doubled))
    every.test_dropping_keeps_every_contract(name, Loudest(doubled=doubled))


def test_an_item_may_keep_nothing_and_the_sum_is_what_was_promised(llava: Tiny) -> None:
    inputs = llava.clone()
    inputs["pixel_values"][1] *= 1e-3
    with vlm_budget.patch(llava.model, Loudest(), 0.1) as handle, torch.no_grad():
        llava.model(**inputs)
        counts = [[len(item.positions) for item in handle.kept() if item.row == row] for row in (0, 1)]
        plan = handle.report().plan
    assert plan.joint
    assert [sum(mine) for mine in counts] == [sum(i.keep for i in plan.items if i.row == row) for row in (0, 1)]
    assert counts[0] != [item.keep for item in plan.items if item.row == 0], "the tokens were shared out evenly"


def test_the_report_speaks_of_the_sum_only(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, Loudest(), BUDGET) as handle, torch.no_grad():
        llava.model(**llava.clone())
        report = handle.report()
    mine = [item for item in report.plan.items if item.row == 0]
    told = f"prompt 0, 2 images together: {sum(i.keep for i in mine)} of {sum(i.total for i in mine)} tokens"
    assert told in str(report)


def test_plans_say_so_and_come_back_equal(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, Loudest(), BUDGET) as handle:
        plan = handle.plan(**llava.clone())
    assert Plan.from_json(plan.to_json()) == plan
    with vlm_budget.patch(llava.model, "hired", BUDGET) as handle:
        assert "joint" not in handle.plan(**llava.clone()).to_json()


def test_the_method_at_hand_says_whether_items_are_promised_one_by_one(llava: Tiny) -> None:
    plans = {}
    for method in (Loudest(), "hired"):
        with vlm_budget.patch(llava.model, method, BUDGET) as handle:
            plans[str(handle.method)] = handle.plan(**llava.clone())
    each, shared = plans["HiRED()"], plans["Loudest()"]
    assert shared.joint and not each.joint
    with vlm_budget.patch(llava.model, Loudest(), plan=each) as handle, torch.no_grad():
        llava.model(**llava.clone())
        kept = [len(item.positions) for item in handle.kept()]
        assert handle.report().plan.joint and sum(kept[:2]) == each.items[0].keep + each.items[1].keep
        assert kept[0] != each.items[0].keep, "the tokens were shared out evenly"
    with vlm_budget.patch(llava.model, "hired", plan=shared) as handle, torch.no_grad():
        llava.model(**llava.clone())
        assert not handle.report().plan.joint
        assert [len(item.positions) for item in handle.kept()] == [item.keep for item in shared.items]


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "qwen2_vl", "llava_onevision_video"])
def test_with_a_method_inside_the_language_model(name: str) -> None:
    if name not in tiny_models.SETUPS:
        name = next(known for known in tiny_models.SETUPS if known.startswith(name[:8]) and "video" in known)
    tiny = fresh(name)
    full = rows(tiny.model, tiny.clone())
    with vlm_budget.patch(tiny.model, [Loudest(), "fastv"], BUDGET) as handle, torch.no_grad():
        tiny.model(**tiny.clone())
        batch = handle.kept()
        plan = handle.report().plan
        for row in range(len(full)):
            left = [len(i.steps[-1][1]) for i in batch if i.row == row]
            assert sum(left) == sum(i.steps[-1][1] for i in plan.items if i.row == row)
        generate(tiny.model, tiny.clone())
        for index in range(len(full)):
            tiny.model(**tiny_models.row_inputs(tiny, index))
            alone = [(i.positions, i.steps) for i in handle.kept()]
            assert alone == [(i.positions, i.steps) for i in batch if i.row == index]


@pytest.mark.parametrize("twice", [False, True])
def test_a_broken_promise_is_told(llava: Tiny, twice: bool) -> None:
    with (
        vlm_budget.patch(llava.model, Greedy(twice=twice), BUDGET),
        pytest.raises(SelectionError, match="some of them twice" if twice else r"and returned \["),
    ):
        llava.model(**llava.clone())


def test_merging_stages_are_refused() -> None:
    from vlm_budget.pruners.segpruner import SeGPruner
    from vlm_budget.pruners.token_transforming import TokenTransforming

    assert SeGPruner(scope="view", merge=TokenTransforming()).merge is not None
    with pytest.raises(OptionError, match="item by item"):
        SeGPruner(merge=TokenTransforming())


def test_the_reference_is_met_at_the_command_of_positions(llava: Tiny) -> None:
    full = rows(llava.model, llava.clone())
    for positions in ("packed", "original"):
        with vlm_budget.patch(llava.model, Loudest(), BUDGET, positions=positions) as handle:
            found = forward(handle, llava.clone(), full)
        assert compacted(found, positions == "packed")
