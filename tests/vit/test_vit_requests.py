"""What a patch of a vision transformer is asked for: refused with what would do, and told by the handle."""

import pytest

import vlm_budget
from fingerprint import changes, fingerprint
from tiny_vit import images, tiny_vit
from vlm_budget.engine.vit import patch_vit
from vlm_budget.errors import BudgetError, OptionError
from vlm_budget.registry import VIT_METHODS

METHODS = list(VIT_METHODS)


@pytest.mark.parametrize("beside", [{"plan": "x"}, {"positions": "packed"}])
def test_what_is_for_vlms_is_refused_by_the_verb_too(beside: dict) -> None:
    model = tiny_vit()
    before = fingerprint(model)
    with pytest.raises(OptionError, match="is for VLMs"):
        vlm_budget.patch(model, "tome", ratio=0.5, **beside)
    assert changes(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", METHODS)
def test_a_ratio_out_of_reach_names_one_that_runs(name: str) -> None:
    model = tiny_vit(5)
    pixels = images(model)
    with patch_vit(model, name, ratio=0.001), pytest.raises(BudgetError, match=r"nearest feasible") as caught:
        model(pixels)
    ratio = float(str(caught.value).rsplit("(or ", 1)[1].split(")")[0])
    tokens = int(str(caught.value).rsplit(" is ", 1)[1].split()[0])
    for spend in ({"ratio": ratio}, {"budget": tokens}):
        with patch_vit(model, name, **spend) as handle:
            model(pixels)
            assert handle.report().kept_tokens == tokens


def test_a_handle_says_what_it_is() -> None:
    model = tiny_vit()
    handle = patch_vit(model, "tome", ratio=0.5)
    assert repr(handle) == "<VitHandle ToMe() at 50% on VisionTransformer, active>"
    handle.undo()
    assert repr(handle) == "<VitHandle ToMe() at 50% on VisionTransformer, undone>"
