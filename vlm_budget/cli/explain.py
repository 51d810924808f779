"""``vlm-budget explain METHOD``: what a method does, needs and can be told."""

from __future__ import annotations

import re
import types
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..registry import FAMILIES, PRUNERS
from .common import DebugOption, JsonOption, clean, out_console, print_json
from .describe import attribute_docs, describe

if TYPE_CHECKING:
    from ..pruner import Attention, Pruner

_LAYERS = 24  # a CLIP ViT-L tower, to make "layer" concrete


@clean
def explain(
    method: Annotated[str, typer.Argument(help="A method, see: vlm-budget list methods")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain a method: its idea and paper, its fields, what it needs from a model, and which families it runs on.

    Examples:

      vlm-budget explain hired
    """
    entry = describe(PRUNERS, method)
    cls = PRUNERS.get(method)
    facts = {
        "method": method,
        "class": cls.__name__,
        "summary": entry.summary,
        "paper": cls.paper,
        "stage": cls.stage,
        "needs": needs_of(cls),
        "families": FAMILIES.names(),
        "fields": fields_of(cls),
        "about": entry.about,
    }
    if as_json:
        print_json(facts)
    else:
        _show(facts)


def fields_of(cls: type[Pruner]) -> list[dict[str, str]]:
    """Name, type, default and meaning of every field, the method's own first."""
    docs, hints = attribute_docs(cls), get_type_hints(cls)
    own = [field for field in fields(cls) if field.name in vars(cls).get("__annotations__", {})]
    rest = [field for field in fields(cls) if field not in own]
    return [
        {
            "name": field.name,
            "type": _type_text(hints[field.name]),
            "default": "required" if field.default is MISSING else str(field.default),
            "meaning": docs.get(field.name, ""),
        }
        for field in own + rest
    ]


def _type_text(hint: Any) -> str:
    """A type as one writes a value of it."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join("none" if kind is type(None) else _type_text(kind) for kind in get_args(hint))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)


def needs_of(cls: type[Pruner]) -> list[str]:
    """What a method with its default fields asks of a vision tower, in words."""
    from ..pruner import Tower

    try:
        pruner = cls()
    except TypeError:
        return ["depends on its fields"]
    feature_layer = _LAYERS - 2
    with_cls, without = (pruner.needs(Tower(_LAYERS, feature_layer, has_cls)) for has_cls in (True, False))
    words = [_need(need, feature_layer) for need in dict.fromkeys(with_cls)]
    if [need.kind for need in with_cls] != [need.kind for need in without]:
        words.append("(received attention instead, in towers without a class token)")
    return words or ["no attention scores: places and features of the tokens are enough"]


def _need(need: Attention, feature_layer: int) -> str:
    kind = {
        "cls": "class-token attention",
        "joint_cls": "class-token attention with all heads as one",
        "received": "received attention",
        "keys": "key vectors",
        "mean_keys": "key vectors, mean over heads",
    }[need.kind]
    where = "the layer the language model reads" if need.layer == feature_layer else f"layer {need.layer}"
    return f"{kind} of the vision tower, {where}"


def reflow(text: str) -> str:
    """A docstring without its line breaks: one line per paragraph and per bullet."""
    blocks = []
    for block in text.replace("``", "").split("\n\n"):
        items = re.split(r"\n(?=\* )", block)
        blocks.append("\n".join(" ".join(item.split()) for item in items))
    return "\n\n".join(blocks)


def _show(facts: dict[str, Any]) -> None:
    console = out_console()
    console.print(Text.assemble((facts["method"], "bold cyan"), "  ", facts["summary"]))
    stages = {"vision": "before the language model", "decoder": "inside the language model, at prefill"}
    facts_table = Table.grid(padding=(0, 2))
    for name, value in (
        ("paper", facts["paper"] or "none: a baseline"),
        ("acts", stages.get(facts["stage"], facts["stage"])),
        ("needs", "\n".join(facts["needs"])),
        ("families", ", ".join(facts["families"])),
    ):
        facts_table.add_row(Text(name, style="bold"), Text(value))
    console.print(Padding(facts_table, (1, 0)))
    table = Table(title="fields (--option NAME=VALUE)", title_justify="left", header_style="bold")
    for column in ("name", "type", "default", "meaning"):
        table.add_column(column, overflow="fold", style="cyan" if column == "name" else "")
    for row in facts["fields"]:
        table.add_row(*(Text(row[column]) for column in ("name", "type", "default", "meaning")))
    console.print(table)
    console.print(Padding(Text(reflow(facts["about"])), (1, 0, 0, 0)))
    console.print(f"\nSee it at work: [bold]vlm-budget demo --method {facts['method']}[/bold]")
