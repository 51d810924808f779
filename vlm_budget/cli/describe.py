"""What the sources say about methods and families, read without running them.

Importing a method imports torch, which takes seconds; a list should not. Files are parsed, so what is listed are
docstrings and literal class attributes.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..registry import Registry


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
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{registry.kind} {name!r} is registered as {module}:{cls}, which does not exist")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls), None)
    summary = (ast.get_docstring(node) or "") if node else ""
    return Entry(
        name, summary.split("\n", 1)[0], ast.get_docstring(tree) or "", dict(_constants(node.body if node else ()))
    )


def _constants(body: Iterable[ast.stmt]) -> Iterable[tuple[str, Any]]:
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                yield node.targets[0].id, ast.literal_eval(node.value)
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
    return {key: _ROLE.sub(r"\1", text).replace("``", "") for key, text in docs.items()}
