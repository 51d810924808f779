"""``list`` and ``explain``: what the registries and the docstrings say."""

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from vlm_budget.cli.describe import attribute_docs, describe
from vlm_budget.cli.explain import needs_of, reflow
from vlm_budget.errors import UnknownNameError
from vlm_budget.registry import FAMILIES, PRUNERS

Cli = Callable[..., Any]


def test_every_method_is_listed_with_its_summary(cli: Cli) -> None:
    listed = json.loads(cli("list", "methods", "--json").stdout)["methods"]
    assert [row["name"] for row in listed] == PRUNERS.names()
    for row in listed:
        cls = PRUNERS.get(row["name"])
        assert row["summary"] == (cls.__doc__ or "").splitlines()[0]
        assert row["paper"] == cls.paper


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
    assert {row["name"] for row in facts["fields"]} == {field.name for field in fields(cls)}
    assert all(row["meaning"] for row in facts["fields"]), "a field without a line under Attributes"
    assert facts["families"] == FAMILIES.names()
    assert facts["needs"] and facts["about"]
    text = cli("explain", method).stdout
    assert all(field.name in text for field in fields(cls))


def test_the_methods_own_fields_come_first(cli: Cli) -> None:
    names = [row["name"] for row in json.loads(cli("explain", "hired", "--json").stdout)["fields"]]
    assert names[0] == "alpha"
    assert names[-3:] == ["positions", "newline", "merge"]


def test_types_are_shown_as_one_writes_values(cli: Cli) -> None:
    types = {row["name"]: row["type"] for row in json.loads(cli("explain", "hired", "--json").stdout)["fields"]}
    assert types["content"] == "mass | count"
    assert types["final_layer"] == "int | none"
    assert types["positions"] == "packed | original"


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
