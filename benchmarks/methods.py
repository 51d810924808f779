"""Writes ``docs/pruners/README.md``: every method by the place where it acts, from the registries and the sources."""

from __future__ import annotations

from pathlib import Path

from vlm_budget.cli.describe import describe
from vlm_budget.decoder import DecoderPruner
from vlm_budget.defaults import choices
from vlm_budget.eval.markdown import replace_section, table
from vlm_budget.registry import MERGES, PRUNERS, VIT_METHODS, Registry

PAGE = Path("docs/pruners/README.md")


def rows(registry: Registry, names: list[str]) -> str:
    """A table of some methods."""
    found = []
    for name in names:
        entry = describe(registry, name)
        stem = registry.target(name).split(":")[0].rpartition(".")[2]
        paper = entry.constants.get("paper") or entry.about.split("\n", 1)[0]
        found.append([f"[`{name}`]({stem}.md)", entry.summary, paper, reads(registry, name)])
    return table(["name", "what it does", "paper", "reads"], found, left=4)


def reads(registry: Registry, name: str) -> str:
    """What the engine must show the method."""
    cls = registry.get(name)
    if registry is VIT_METHODS:
        return "queries and keys of some blocks"
    if registry is MERGES:
        return "keys, projector inputs"
    if issubclass(cls, DecoderPruner):
        return {
            "previous": "queries and keys of the layer before",
            "own": "queries and keys of its own layer",
            "none": "nothing",
        }[cls.scores]
    from vlm_budget.pruner import Tower

    method = cls()
    needs = method.all_needs(Tower(layers=24, feature_layer=22, has_cls=True))
    names = {
        "cls": "class token's attention",
        "received": "attention received",
        "joint_cls": "class token's undivided attention",
        "keys": "keys",
        "mean_keys": "keys",
    }
    found = [names[need.kind] for need in needs]
    found += ["projector inputs"] * method.wants_hidden + ["the question"] * method.reads_text
    return ", ".join(dict.fromkeys(found)) or "the layout or the features"


def defaults() -> str:
    """What ``patch(model, budget=…)`` takes."""
    shown = []
    for models, choice in choices().items():
        options = "".join(f", {name}={value!r}" for name, value in choice.options.items())
        shown.append([models, f"`{choice.method!r}{options}`", choice.reason])
    return table(["model's tower and positions", "method", "why"], shown, left=3)


def main() -> None:
    """Command line: none."""
    stages = {stage: [n for n in PRUNERS if PRUNERS.get(n).stage == stage] for stage in ("vision", "decoder")}
    replace_section(PAGE, "before", rows(PRUNERS, stages["vision"]))
    replace_section(PAGE, "inside", rows(PRUNERS, stages["decoder"]))
    replace_section(PAGE, "merges", rows(MERGES, MERGES.names()))
    replace_section(PAGE, "towers", rows(VIT_METHODS, VIT_METHODS.names()))
    replace_section(PAGE, "defaults", defaults())


if __name__ == "__main__":
    main()
