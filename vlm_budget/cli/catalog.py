"""``vlm-budget list``: what there is."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..registry import FAMILIES, PRUNERS
from .common import DebugOption, JsonOption, clean, out_console, print_json
from .describe import describe


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
    """List the pruning methods, or the families of supported models.

    Examples:

      vlm-budget list methods

      vlm-budget list families --json
    """
    registry = PRUNERS if what is What.methods else FAMILIES
    entries = [describe(registry, name) for name in registry]
    if what is What.methods:
        rows = [{"name": e.name, "summary": e.summary, "paper": e.constants.get("paper", "")} for e in entries]
    else:
        rows = [
            {"name": e.name, "model": _outer(e.constants.get("models", ())), "summary": e.about.split("\n")[0]}
            for e in entries
        ]
    if as_json:
        print_json({what.value: rows})
        return
    table = Table(title=f"{len(rows)} {what.value}", title_justify="left", header_style="bold")
    for column in rows[0]:
        table.add_column(column, overflow="fold", no_wrap=column != "summary", style="bold cyan" * (column == "name"))
    for row in rows:
        table.add_row(*map(Text, row.values()))
    out_console().print(table)


def _outer(models: tuple[str, ...]) -> str:
    return models[0] if models else ""
