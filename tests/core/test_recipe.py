"""Recipes: the portable plan comes back equal, and is refused when it was edited, cut off, or is another model's."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_models
import vlm_budget
from vlm_budget.budget import Budget
from vlm_budget.errors import PlanError, PlanMismatchWarning, UnknownNameError
from vlm_budget.plan import ItemPlan, Plan
from vlm_budget.pruner import Pruner
from vlm_budget.recipe import CalibrationFacts, ModelFacts, Recipe, read_plan
from vlm_budget.registry import MERGES, PRUNERS

MODEL = ModelFacts("LlavaModel", "ab" * 32, 3, (30, 40))
JUDGED = CalibrationFacts("cd" * 32, 128, "agreement", 0.01, 0.99, 1.0)


def recipe(**changes: Any) -> Recipe:
    methods = [PRUNERS.get("hired")(alpha=0.3), PRUNERS.get("gsearch")(rates=(1, 1, 0.25))]
    made = Recipe.of(methods, Budget(0.2), MODEL, calibration=JUDGED, cost={"share": 0.2, "ms": 1 / 3})
    return replace(made, **changes)


@pytest.mark.parametrize("made", [recipe(), recipe(calibration=None, budget=None, cost={})])
def test_a_recipe_comes_back_equal(made: Recipe, tmp_path: Path) -> None:
    made.save(tmp_path / "plan.json")
    assert Recipe.load(tmp_path / "plan.json") == made
    assert read_plan(tmp_path / "plan.json") == made


def test_its_methods_can_be_built_again() -> None:
    again = Recipe.from_json(recipe().to_json())
    built = [PRUNERS.get(name)(**options) for name, options in again.methods()]
    assert built == [PRUNERS.get("hired")(alpha=0.3), PRUNERS.get("gsearch")(rates=(1, 1, 0.25))]


def test_a_merging_stage_is_named() -> None:
    merge = MERGES.get("token_transforming")()
    made = Recipe.of([PRUNERS.get("hired")(merge=merge)], Budget(0.2), MODEL)
    assert made.methods() == [("hired", {"merge": "token_transforming"})]


def test_what_a_recipe_cannot_write_is_refused() -> None:
    class Own(Pruner):
        pass

    with pytest.raises(PlanError, match="Own is not registered"):
        Recipe.of([Own()], Budget(0.2), MODEL)
    with pytest.raises(PlanError, match="at least one method"):
        Recipe.of([], Budget(0.2), MODEL)
    with pytest.raises(PlanError, match="budget cannot be read"):
        recipe(budget="a lot")


def test_an_edited_recipe_is_refused() -> None:
    text = recipe().to_json()
    for old, new in (('"20%"', '"90%"'), ("0.25", "0.75"), ('"hired"', '"random"'), ('"layers": 3', '"layers": 4')):
        assert old in text
        with pytest.raises(PlanError, match="edited or damaged"):
            Recipe.from_json(text.replace(old, new))
    data = json.loads(text)
    data["extra"] = 1
    with pytest.raises(PlanError, match="edited or damaged"):
        Recipe.from_json(json.dumps(data))


def test_every_truncated_recipe_is_refused(tmp_path: Path) -> None:
    recipe().save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    for length in range(0, len(text) - 2, 37):
        (tmp_path / "cut.json").write_text(text[:length])
        with pytest.raises(PlanError, match="truncated or no JSON"):
            read_plan(tmp_path / "cut.json")


@pytest.mark.parametrize("depth", [600, 3000, 200_000])
def test_json_nested_out_of_all_measure_is_no_recipe(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + "]" * depth
    data = json.loads(recipe().to_json())
    (tmp_path / "deep.json").write_text(json.dumps(data).replace('"alpha": 0.3', f'"alpha": {deep}'))
    with pytest.raises(PlanError, match=r"plan '.*deep\.json'"):
        read_plan(tmp_path / "deep.json")


def test_an_option_that_its_method_does_not_have_is_refused() -> None:
    tiny = tiny_models.build("llava")
    facts = ModelFacts.of(tiny.model.model, [30, 40])
    made = Recipe((("hired", {"alfa": 0.3}),), "20%", facts)
    with pytest.raises(UnknownNameError, match="'hired' has no option 'alfa'. Did you mean 'alpha'"):
        vlm_budget.patch(tiny.model, plan=made)


def test_formatting_may_change() -> None:
    made = recipe()
    assert Recipe.from_json(json.dumps(json.loads(made.to_json()), sort_keys=True)) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a JSON list, not an object"),
        ('{"kind": "journal"}', "'kind' is 'journal'"),
        ('{"kind": "recipe", "version": 99}', "version 99 is not supported"),
        ('{"kind": "recipe", "version": 1}', "no checksum"),
    ],
)
def test_other_files_are_named(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Recipe.from_json(text)


def test_a_plan_for_one_batch_is_told_from_a_recipe(tmp_path: Path) -> None:
    plan = Plan("Random()", "20%", (ItemPlan(0, "image", 30, 6),), 1)
    plan.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    with pytest.raises(PlanError, match=r"read by Plan\.load"):
        Recipe.load(tmp_path / "plan.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read plan .*nowhere"):
        read_plan(tmp_path / "nowhere.json")


def test_a_recipe_fits_its_own_model_and_no_other() -> None:
    base = tiny_models.build("llava").model.model
    made = recipe(model=ModelFacts.of(base, [31, 36, 33]))
    assert made.model.tokens == (31, 36)
    made.check_model(base)
    made.check_model(copy.deepcopy(base))
    with pytest.raises(PlanError, match="its class is LlavaModel, this model's is Qwen2VLModel"):
        made.check_model(tiny_models.build("qwen2_vl").model.model)
    deeper = copy.deepcopy(base)
    deeper.config.text_config.num_hidden_layers = 4
    with pytest.raises(PlanError, match="number of decoder layers is 3, this model's is 4"):
        made.check_model(deeper)
    wider = copy.deepcopy(base)
    wider.config.text_config.intermediate_size += 8
    with pytest.raises(PlanError, match="configuration"):
        made.check_model(wider)


def test_where_a_model_lies_and_how_it_runs_is_not_who_it_is() -> None:
    base = tiny_models.build("llava").model.model
    facts = ModelFacts.of(base, [1])
    base.config._name_or_path = "elsewhere"
    base.config._attn_implementation = "eager"
    base.config.use_cache = False
    assert ModelFacts.of(base, [1]) == facts


@pytest.mark.parametrize(("tokens", "far"), [(22, True), (23, False), (35, False), (50, False), (51, True)])
def test_a_prompt_far_from_the_calibration_warns(tokens: int, far: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe().warn_if_far(tokens)
    assert [warning.category for warning in caught] == [PlanMismatchWarning] * far
    if far:
        assert f"{tokens} visual tokens, the recipe was calibrated on 30 to 40" in str(caught[0].message)


def test_its_names_are_public() -> None:
    assert vlm_budget.Recipe is Recipe
    assert vlm_budget.PlanMismatchWarning is PlanMismatchWarning
