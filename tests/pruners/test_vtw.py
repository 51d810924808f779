"""VTW: all visual tokens up to a layer, none behind it."""

import pytest

import decoder_contexts as make
from vlm_budget import BudgetError
from vlm_budget.decoder import Step
from vlm_budget.errors import OptionError, PlanError
from vlm_budget.pruners.vtw import VTW


@pytest.mark.parametrize(
    ("spend", "steps"),
    [(63, (Step(1, 0),)), (125, (Step(1, 0),)), (126, (Step(2, 0),)), (63 * 6 - 1, (Step(5, 0),)), (63 * 6, ())],
)
def test_as_many_layers_see_the_picture_as_the_budget_pays_for(spend: int, steps: tuple[Step, ...]) -> None:
    assert VTW().schedule(63, spend, 6) == steps


@pytest.mark.parametrize("layers", [2, 4, 6, 32])
def test_half_the_budget_is_half_the_depth(layers: int) -> None:
    assert VTW().schedule(577, round(0.5 * 577 * layers), layers) == (Step(layers // 2, 0),)


def test_a_layer_needs_no_budget() -> None:
    assert VTW(layer=3).fixed and not VTW().fixed
    assert VTW(layer=3).schedule(7, None, 6) == (Step(3, 0),)


def test_the_first_layer_always_sees_the_picture() -> None:
    with pytest.raises(BudgetError, match=r"VTW\(\).*'3.13%'"):
        VTW().schedule(576, 575, 32)


@pytest.mark.parametrize("layer", [0, -2, 1.5, "16", True])
def test_the_layer_must_be_one_behind_the_first(layer: object) -> None:
    with pytest.raises(OptionError, match="layer must be"):
        VTW(layer=layer)  # type: ignore[arg-type]


def test_a_plan_that_keeps_some_is_not_for_this_method() -> None:
    with pytest.raises(PlanError, match=r"VTW\(\) keeps all visual tokens or none; the plan wants 2 of 5"):
        VTW().pick(make.context(["a", 5, "b"]), 2)


def test_no_scores_are_asked_for() -> None:
    assert VTW().scores == "none" and str(VTW(layer=16)) == "VTW(layer=16)"
