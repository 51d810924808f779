"""Every method has a page that says what the code says."""

from __future__ import annotations

import re
from dataclasses import MISSING, Field, fields
from pathlib import Path

import pytest

from vlm_budget.decoder import DecoderPruner
from vlm_budget.registry import MERGES, PRUNERS, VIDEO_METHODS, VIT_METHODS, Registry

DOCS = Path(__file__).resolve().parents[1] / "docs"
METHODS = [(registry, name) for registry in (PRUNERS, MERGES, VIT_METHODS, VIDEO_METHODS) for name in registry]
SECTIONS = ("Formula", "Fields", "Where ours differs", "Needs and cost", "When it fails")


def page_of(registry: Registry, name: str) -> Path:
    """The page with the stem of the method's file."""
    folder = "video_dit" if registry is VIDEO_METHODS else "pruners"
    return DOCS / folder / (registry.target(name).split(":")[0].rpartition(".")[2] + ".md")


def told_fields(registry: Registry, name: str) -> list[Field]:
    """Fields that a user of the method can set."""
    cls = registry.get(name)
    hidden = {"merge"} | ({"newline"} if issubclass(cls, DecoderPruner) else set())
    return [field for field in fields(cls) if field.name not in hidden]


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=[f"{r.kind}-{n}" for r, n in METHODS])
def test_every_method_has_a_page_with_source_formula_fields_differences_needs_and_cost(
    registry: Registry, name: str
) -> None:
    page = page_of(registry, name)
    text = page.read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    for section in SECTIONS:
        assert any(heading.startswith(section) for heading in headings), f"{page} lacks '{section}': {headings}"
    assert "Source: " in text
    paper = getattr(registry.get(name), "paper", "")
    assert paper.removeprefix("arXiv ") in text.replace("\n", " ")


@pytest.mark.parametrize(("registry", "name"), METHODS, ids=[f"{r.kind}-{n}" for r, n in METHODS])
def test_the_fields_of_a_page_are_those_of_the_code_with_their_defaults(registry: Registry, name: str) -> None:
    text = page_of(registry, name).read_text()
    section = text.split("## Fields", 1)[1].split("\n## ", 1)[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE))
    for field in told_fields(registry, name):
        assert field.name in rows, f"{name}: the page does not tell of {field.name}"
        if field.default is not MISSING and field.default is not None:
            assert repr(field.default) in rows[field.name].replace('"', "'"), f"{name}.{field.name}: {rows[field.name]}"


def test_the_index_of_methods_is_the_registry() -> None:
    pages = {
        False: ((DOCS / "pruners" / "README.md").read_text(), ""),
        True: ((DOCS / "video_generation.md").read_text(), "video_dit/"),
    }
    for registry, name in METHODS:
        index, folder = pages[registry is VIDEO_METHODS]
        assert f"[`{name}`]({folder}{page_of(registry, name).name})" in index, f"run `make docs`: {name} is missing"


def test_the_default_methods_are_what_the_recorded_table_says() -> None:
    import json

    from vlm_budget.defaults import choices
    from vlm_budget.eval.nano.defaults import choose

    results = DOCS.parent / "benchmarks" / "results" / "nano_accuracy.json"
    chosen = choose(json.loads(results.read_text()))
    assert {key: vars(choice) for key, choice in choices().items()} == chosen, "run `make docs`"
