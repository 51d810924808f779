"""``vlm-budget explain METHOD``: what a method does, where it acts, what it needs and can be told."""

from __future__ import annotations

import re
import types
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..registry import FAMILIES, MERGES, VIDEO_MODELS, Registry
from .catalog import paper_of
from .common import DebugOption, JsonOption, clean, out_console, print_json
from .describe import ACTS, Entry, attribute_docs, entries_of, place, plain

if TYPE_CHECKING:
    from ..pruner import Attention, Pruner

_LAYERS = 24  # a CLIP ViT-L tower, to make "layer" concrete
_WINDOWED = ("gemma3",)  # their layers attend within sliding windows, and refuse methods inside the language model
_NANO_BUDGET = "75%"  # what every method inside the language model can keep to in nano's four layers


@clean
def explain(
    method: Annotated[str, typer.Argument(help="A method, see: vlm-budget list methods")],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain a method: its idea and paper, where it acts, its fields, what it needs, and which models it runs on.

    A name that stands for several (token_transforming merges behind a method, and acts in vision transformers) is
    explained once for each; in JSON the others are under "also".

    Examples:

      vlm-budget explain hired

      vlm-budget explain fastv
    """
    first, *others = (facts_of(registry, entry) for registry, entry in entries_of(method))
    if as_json:
        print_json({**first, "also": others})
        return
    _show(first)
    for facts in others:
        out_console().print()
        _show(facts)


def facts_of(registry: Registry, entry: Entry) -> dict[str, Any]:
    """All that is told of one method."""
    cls, kind = registry.get(entry.name), place(registry, entry.name)
    special = {"decoder": _needs_inside, "merge": _needs_of_merge, "vit": _needs_of_vit, "video": _needs_of_video}
    needs = special.get(kind, needs_of)
    return {
        "method": entry.name,
        "class": cls.__name__,
        "summary": entry.summary,
        "paper": paper_of(registry, entry),
        "acts": kind,
        "needs": needs(cls),
        "families": families_of(kind),
        "fields": fields_of(cls),
        "try": example(entry.name, kind),
        "about": entry.about,
    }


def families_of(kind: str) -> list[str]:
    """Families whose models run a method that acts there; none for vision transformers, which have no family."""
    if kind == "vit":
        return []
    if kind == "video":
        return VIDEO_MODELS.names()
    return [name for name in FAMILIES if kind != "decoder" or name not in _WINDOWED]


def example(name: str, kind: str) -> str:
    """A line that shows the method at work."""
    return {
        "vision": f"vlm-budget demo --method {name}",
        "decoder": f"vlm-budget demo --method {name} --budget {_NANO_BUDGET}",
        "merge": f"vlm-budget demo --option merge={name}",
        "vit": f"vlm_budget.patch(vit, {name!r}, ratio=0.5)",
        "video": f"vlm-budget video-gen demo --method {name}",
    }[kind]


def fields_of(cls: type) -> list[dict[str, str]]:
    """Name, type, default and meaning of every field that the method takes, its own first."""
    docs, hints, refused = attribute_docs(cls), get_type_hints(cls), _refused_fields(cls)
    taken = [field for field in fields(cls) if field.name not in refused]
    own = [field for field in taken if field.name in vars(cls).get("__annotations__", {})]
    rest = [field for field in taken if field not in own]
    return [
        {
            "name": field.name,
            "type": _type_text(hints[field.name]),
            "default": "required" if field.default is MISSING else str(field.default),
            "meaning": docs.get(field.name, ""),
        }
        for field in own + rest
    ]


def _refused_fields(cls: type) -> set[str]:
    """Fields that all methods have and this one takes no other value of."""
    from ..decoder import DecoderPruner
    from ..pruner import Pruner

    if issubclass(cls, DecoderPruner):
        return {"newline", "merge"}
    return {"merge"} if issubclass(cls, Pruner) and cls.merges else set()


def _type_text(hint: Any) -> str:
    """A type as one writes a value of it."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join("none" if kind is type(None) else _type_text(kind) for kind in get_args(hint))
    if isinstance(hint, type) and get_origin(hint) is None and _is_merge(hint):
        return " | ".join(MERGES)
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)


def _is_merge(hint: type) -> bool:
    from ..pruner import Merge

    return issubclass(hint, Merge)


def needs_of(cls: type[Pruner]) -> list[str]:
    """What a method before the language model, with its default fields, asks of the model, in words."""
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
    words += ["what the projector is given"] * pruner.wants_hidden + ["the text behind the picture"] * pruner.reads_text
    return words or ["no attention scores: places and features of the tokens are enough"]


def _needs_inside(cls: type[Any]) -> list[str]:
    return [
        {
            "previous": "queries and keys of the decoder layer before each drop",
            "own": "queries and keys of the decoder layer at each drop, made of its full input",
            "none": "no attention scores: the layer alone says what goes",
        }[cls.scores]
    ]


def _needs_of_merge(cls: type[Any]) -> list[str]:
    from ..pruner import Tower

    found = cls().needs(Tower(_LAYERS, _LAYERS - 2, has_cls=True))
    return [*(_need(need, _LAYERS - 2) for need in found), "what the projector is given"]


def _needs_of_vit(cls: type[Any]) -> list[str]:
    return ["queries and keys of the blocks that reduce"]


def _needs_of_video(cls: type[Any]) -> list[str]:
    return ["queries, keys and values of self-attention, after RoPE"]


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
    for block in plain(text).split("\n\n"):
        items = re.split(r"\n(?=\* )", block)
        blocks.append("\n".join(" ".join(item.split()) for item in items))
    return "\n\n".join(blocks)


def _show(facts: dict[str, Any]) -> None:
    console, kind = out_console(), facts["acts"]
    console.print(Text.assemble((facts["method"], "bold cyan"), "  ", plain(facts["summary"])))
    facts_table = Table.grid(padding=(0, 2))
    for name, value in (
        ("paper", facts["paper"] or "none: a baseline"),
        ("acts", ACTS[kind]),
        ("needs", "\n".join(facts["needs"])),
        ("families", ", ".join(facts["families"]) or "none: plain vision transformers of timm (VisionTransformer)"),
    ):
        facts_table.add_row(Text(name, style="bold"), Text(value))
    console.print(Padding(facts_table, (1, 0)))
    how = {"merge": f"merge={facts['class']}(NAME=VALUE), in Python", "vit": "NAME=VALUE behind the method, in Python"}
    title = f"fields ({how.get(kind, '--option NAME=VALUE')})"
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("name", "type", "default", "meaning"):
        table.add_column(column, overflow="fold", style="cyan" if column == "name" else "")
    for row in facts["fields"]:
        table.add_row(*(Text(row[column]) for column in ("name", "type", "default", "meaning")))
    console.print(table)
    console.print(Padding(Text(reflow(facts["about"])), (1, 0, 0, 0)))
    console.print(Text.assemble("\nSee it at work: ", (facts["try"], "bold")))
