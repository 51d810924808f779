"""What the sources say about methods and families, read without running them.

Importing a method imports torch, which takes seconds; a list should not. Files are parsed, so what is listed are
docstrings, literal class attributes and the names of base classes.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..registry import MERGES, PRUNERS, VIDEO_METHODS, VIT_METHODS, Registry

ACTS = {
    "vision": "before the language model",
    "decoder": "inside the language model, at prefill",
    "merge": "behind a method before the language model, on what it drops",
    "vit": "inside timm's vision transformers",
    "video": "inside self-attention of diffusers' video transformers",
}
"""Where methods act, by the short name that JSON has."""

METHODS = (PRUNERS, MERGES, VIT_METHODS, VIDEO_METHODS)
"""Registries of what can be named as a method."""

_ROLE = re.compile(r":\w+:`(?:[\w.]*\.)?(\w+)`")  # :class:`vlm_budget.Budget` reads Budget


@dataclass(frozen=True)
class Entry:
    """One registered class.

    Attributes:
        name: Its name in the registry.
        summary: First line of its docstring.
        about: Docstring of its module.
        constants: Class attributes with literal values, such as ``paper`` and ``models``.
    """

    name: str
    summary: str
    about: str
    constants: dict[str, Any]


def describe(registry: Registry, name: str) -> Entry:
    """Read one entry of a registry.

    Raises:
        UnknownNameError: No such name.
    """
    module, _, cls = registry.target(name).partition(":")
    found = _source(module)
    if found is None:
        raise ModuleNotFoundError(f"{registry.kind} {name!r} is registered as {module}:{cls}, which does not exist")
    tree, _ = found
    node = _class(tree, cls)
    summary = (ast.get_docstring(node) or "") if node else ""
    return Entry(
        name, summary.split("\n", 1)[0], ast.get_docstring(tree) or "", dict(_constants(node.body if node else ()))
    )


def entries_of(name: str) -> list[tuple[Registry, Entry]]:
    """Everything that a user can name so: methods, merging stages, methods for vision and for video
    transformers.

    Raises:
        UnknownNameError: Nothing has the name; the message suggests over all of them.
    """
    found = [registry for registry in METHODS if name in registry]
    if not found:
        every = {known: registry.target(known) for registry in METHODS for known in registry}
        Registry("method", "builtins:object", every).target(name)
    return [(registry, describe(registry, name)) for registry in found]


def place(registry: Registry, name: str) -> str:
    """Where a registered method acts: a key of :data:`ACTS`."""
    if registry is MERGES:
        return "merge"
    if registry is VIT_METHODS:
        return "vit"
    if registry is VIDEO_METHODS:
        return "video"
    module, _, cls = registry.target(name).partition(":")
    return "decoder" if _is_a(module, cls, "DecoderPruner") else "vision"


def _is_a(module: str, cls: str, wanted: str) -> bool:
    """A class has a base of that name, as far as the sources of its bases can be found."""
    found = _source(module)
    node = _class(found[0], cls) if found else None
    if found is None or node is None:
        return False
    tree, package = found
    imported = {
        alias.asname or alias.name: ("." * line.level + (line.module or ""), alias.name)
        for line in tree.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    for base in node.bases:
        name = base.id if isinstance(base, ast.Name) else ""
        origin, original = imported.get(name, ("", name))
        if original == wanted:
            return True
        where = importlib.util.resolve_name(origin, package) if origin else module
        if (where, original) != (module, cls) and _is_a(where, original, wanted):
            return True
    return False


@cache
def _source(module: str) -> tuple[ast.Module, str] | None:
    """A module's parsed file and its package; None where there is no such file."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8")), spec.parent or ""


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _constants(body: Iterable[ast.stmt]) -> Iterable[tuple[str, Any]]:
    for node in body:
        target: Any = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if isinstance(node, ast.AnnAssign):
            target = node.target
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value is not None:
            try:
                yield target.id, ast.literal_eval(node.value)
            except ValueError:  # an expression, not a literal
                continue


def attribute_docs(cls: type) -> dict[str, str]:
    """Texts of the ``Attributes:`` sections of a class and its bases, by attribute."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs.update(_attributes(base.__doc__ or ""))
    return docs


def _attributes(docstring: str) -> dict[str, str]:
    docs: dict[str, str] = {}
    _, _, section = docstring.partition("Attributes:\n")
    indent, name = None, ""
    for line in section.splitlines():
        depth = len(line) - len(line.lstrip())
        if line.strip() and indent is None:
            indent = depth
        if line.strip() and depth < (indent or 0):
            break
        if line.strip() and depth == indent:
            name, _, text = line.strip().partition(": ")
            docs[name] = text
        elif line.strip() and name:
            docs[name] += " " + line.strip()
    return {key: plain(text) for key, text in docs.items()}


def plain(text: str) -> str:
    """A docstring's words without its markup."""
    return _ROLE.sub(r"\1", text).replace("``", "")
