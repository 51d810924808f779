"""``list`` and ``explain``: what the registries and the docstrings say."""

import json
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import tiny_models
import vlm_budget
from vlm_budget.cli.describe import ACTS, _is_a, attribute_docs, describe
from vlm_budget.cli.explain import example, families_of, needs_of, reflow
from vlm_budget.errors import PatchError, UnknownNameError
from vlm_budget.eval import nano
from vlm_budget.eval.nano.data import test_set as posters
from vlm_budget.prompts import build_inputs
from vlm_budget.registry import FAMILIES, MERGES, PRUNERS, VIDEO_METHODS, VIT_METHODS

Cli = Callable[..., Any]
INSIDE = [name for name in PRUNERS if PRUNERS.get(name).stage == "decoder"]


def test_every_method_is_listed_with_its_summary_and_where_it_acts(cli: Cli) -> None:
    listed = json.loads(cli("list", "methods", "--json").stdout)["methods"]
    by_place = {kind: [row["name"] for row in listed if row["acts"] == kind] for kind in ACTS}
    assert by_place == {
        "vision": [name for name in PRUNERS if name not in INSIDE],
        "decoder": INSIDE,
        "merge": MERGES.names(),
        "vit": VIT_METHODS.names(),
        "video": VIDEO_METHODS.names(),
    }
    for row in listed:
        registry = {"merge": MERGES, "vit": VIT_METHODS, "video": VIDEO_METHODS}.get(row["acts"], PRUNERS)
        cls = registry.get(row["name"])
        assert row["summary"] == (cls.__doc__ or "").splitlines()[0]
        assert row["paper"] == getattr(cls, "paper", "arXiv 2506.05709")


def test_a_method_derived_from_another_acts_where_that_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_methods.py").write_text(
        "from vlm_budget.pruners.fastv import FastV as Base\n"
        "from vlm_budget.pruner import Pruner\n"
        "class Mine(Base): ...\n"
        "class Deeper(Mine): ...\n"
        "class Other(Pruner): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {cls: _is_a("some_methods", cls, "DecoderPruner") for cls in ("Mine", "Deeper", "Other")}
    assert found == {"Mine": True, "Deeper": True, "Other": False}


def test_every_family_is_listed_with_its_model(cli: Cli) -> None:
    listed = json.loads(cli("list", "families", "--json").stdout)["families"]
    assert {row["name"]: row["model"] for row in listed} == {name: FAMILIES.get(name).models[0] for name in FAMILIES}
    assert all(row["summary"] for row in listed)


@pytest.mark.parametrize(("what", "names"), [("methods", PRUNERS.names()), ("families", FAMILIES.names())])
def test_the_table_names_them_all(cli: Cli, what: str, names: list[str]) -> None:
    result = cli("list", what)
    assert result.exit_code == 0
    assert all(name in result.stdout for name in names)


def test_only_methods_and_families_can_be_listed(cli: Cli) -> None:
    assert cli("list", "models").exit_code == 2


@pytest.mark.parametrize("method", PRUNERS.names())
def test_every_method_is_explained(cli: Cli, method: str) -> None:
    facts = json.loads(cli("explain", method, "--json").stdout)
    cls = PRUNERS.get(method)
    refused = {"newline", "merge"} if method in INSIDE else {"merge"} if cls.merges else set()
    taken = {field.name for field in fields(cls)} - refused
    assert {row["name"] for row in facts["fields"]} == taken
    assert all(row["meaning"] for row in facts["fields"]), "a field without a line under Attributes"
    assert facts["acts"] == cls.stage
    assert facts["needs"] and facts["about"] and facts["also"] == []
    text = cli("explain", method).stdout
    assert all(name in text for name in taken)
    assert facts["try"] in text


@pytest.mark.parametrize("method", ["vtw", "fastv", "pyramiddrop"])
def test_methods_inside_need_no_vision_tower(cli: Cli, method: str) -> None:
    (need,) = json.loads(cli("explain", method, "--json").stdout)["needs"]
    words = {"vtw": "no attention scores", "fastv": "layer before each drop", "pyramiddrop": "layer at each drop"}
    assert words[method] in need
    assert "vision tower" not in need and "places and features" not in need


def test_the_families_of_a_method_inside_are_those_that_take_one() -> None:
    took = set()
    for setup in tiny_models.SETUPS:
        tiny = tiny_models.build(setup)
        try:
            with vlm_budget.patch(tiny.model, "vtw", 0.5):
                took.add(tiny.family)
        except PatchError as error:
            assert "sliding_attention" in str(error)
    assert set(families_of("decoder")) == took != set(FAMILIES)
    assert families_of("vision") == families_of("merge") == FAMILIES.names()


def test_every_example_is_one_that_the_demo_can_run() -> None:
    model, processor = nano.load("nano-robust")
    sample = posters(23)[22]
    inputs = build_inputs(processor, [sample.questions[0].prompt], [[sample.image]], model)
    for method in PRUNERS:
        words = shlex.split(example(method, PRUNERS.get(method).stage))
        assert words[:4] == ["vlm-budget", "demo", "--method", method]
        with vlm_budget.patch(
            model, method, dict(zip(words[4::2], words[5::2], strict=True)).get("--budget", "20%")
        ) as it:
            assert it.plan(**inputs).items


def test_merging_stages_and_methods_of_vision_transformers_are_explained(cli: Cli) -> None:
    facts = json.loads(cli("explain", "tome", "--json").stdout)
    assert (facts["class"], facts["acts"], facts["families"]) == ("ToMe", "vit", [])
    assert {row["name"] for row in facts["fields"]} == {"r", "proportional"}
    shown = cli("explain", "tome").stdout
    assert ACTS["vit"] in shown and "vlm_budget.patch(vit, 'tome', ratio=0.5)" in shown
    both = json.loads(cli("explain", "token_transforming", "--json").stdout)
    assert [both["acts"], *(other["acts"] for other in both["also"])] == ["merge", "vit"]
    assert both["try"] == "vlm-budget demo --option merge=token_transforming"
    shown = cli("explain", "token_transforming").stdout
    assert ACTS["merge"] in shown and ACTS["vit"] in shown
    result = cli("explain", "tomme")
    assert result.exit_code == 1 and "Did you mean 'tome'" in result.stderr


def test_the_methods_own_fields_come_first(cli: Cli) -> None:
    names = [row["name"] for row in json.loads(cli("explain", "hired", "--json").stdout)["fields"]]
    assert names[0] == "alpha"
    assert names[-3:] == ["positions", "newline", "merge"]


def test_types_are_shown_as_one_writes_values(cli: Cli) -> None:
    types = {row["name"]: row["type"] for row in json.loads(cli("explain", "hired", "--json").stdout)["fields"]}
    assert types["content"] == "mass | count"
    assert types["final_layer"] == "int | none"
    assert types["positions"] == "packed | original"
    assert types["merge"] == "token_transforming | none"


def test_needs_name_the_layer_and_the_stand_in() -> None:
    needs = needs_of(PRUNERS.get("hired"))
    assert needs[0] == "class-token attention of the vision tower, layer 0"
    assert "the layer the language model reads" in needs[1]
    assert "received attention instead" in needs[2]
    assert needs_of(PRUNERS.get("random")) == ["no attention scores: places and features of the tokens are enough"]


def test_an_unknown_method_suggests(cli: Cli) -> None:
    result = cli("explain", "hird")
    assert result.exit_code == 1
    assert "Did you mean 'hired'" in result.stderr
    with pytest.raises(UnknownNameError):
        describe(PRUNERS, "hird")


def test_sources_are_read_and_not_run() -> None:
    entry = describe(FAMILIES, "llava_next")
    assert entry.constants["models"] == ("LlavaNextForConditionalGeneration", "LlavaNextModel")
    assert entry.about.startswith("LLaVA-NeXT (1.6)")


def test_attribute_docs_come_from_all_bases_and_the_nearest_wins() -> None:
    class Base:
        """Base.

        Attributes:
            one: First
                of base.
            two: Second.
        """

    class Child(Base):
        """Child.

        Attributes:
            one: First of child, with a colon: here.

        Args:
            three: No attribute.
        """

    assert attribute_docs(Child) == {"one": "First of child, with a colon: here.", "two": "Second."}
    assert attribute_docs(Base)["one"] == "First of base."


def test_reflow_keeps_paragraphs_and_bullets() -> None:
    assert reflow("One\nline.\n\n* A\n  b\n* ``C``\n\nEnd.") == "One line.\n\n* A b\n* C\n\nEnd."
