"""``vlm-budget list``: what there is."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..registry import FAMILIES, MERGES, Registry
from .common import DebugOption, JsonOption, clean, out_console, print_json
from .describe import ACTS, METHODS, Entry, describe, place, plain

_ORDER = tuple(ACTS)


class What(str, Enum):
    """What can be listed."""

    methods = "methods"
    families = "families"


@clean
def list_names(
    what: Annotated[What, typer.Argument(help="methods or families")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the pruning methods by the place where they act, or the families of supported models.

    Examples:

      vlm-budget list methods

      vlm-budget list families --json
    """
    rows = _methods() if what is What.methods else _families()
    if as_json:
        print_json({what.value: rows})
        return
    table = Table(title=f"{len(rows)} {what.value}", title_justify="left", header_style="bold")
    for column in rows[0]:
        table.add_column(column, overflow="fold", no_wrap=column != "summary", style="bold cyan" * (column == "name"))
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        table.add_row(
            *(Text(plain(cell)) for cell in row.values()), end_section=row.get("acts") != following.get("acts")
        )
    out_console().print(table)
    if what is What.methods:
        for kind, words in ACTS.items():
            out_console().print(Text.assemble((f"{kind}: ", "bold"), words), soft_wrap=True)


def _methods() -> list[dict[str, Any]]:
    """By place and name."""
    rows = [
        {"name": e.name, "acts": place(registry, e.name), "summary": e.summary, "paper": paper_of(registry, e)}
        for registry in METHODS
        for e in (describe(registry, name) for name in registry)
    ]
    return sorted(rows, key=lambda row: _ORDER.index(row["acts"]))


def _families() -> list[dict[str, Any]]:
    entries = [describe(FAMILIES, name) for name in FAMILIES]
    return [
        {"name": e.name, "model": _outer(e.constants.get("models", ())), "summary": e.about.split("\n")[0]}
        for e in entries
    ]


def paper_of(registry: Registry, entry: Entry) -> str:
    """The paper as the class names it, of a merging stage the first one in its module's text; empty for a baseline."""
    if registry is not MERGES:
        return str(entry.constants.get("paper", ""))
    found = re.search(r"arXiv \d{4}\.\d{5}", entry.about)
    return found[0] if found else ""


def _outer(models: tuple[str, ...]) -> str:
    return models[0] if models else ""
