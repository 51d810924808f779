"""Which method a model gets when the user names none: the one a recorded table says, never taste.

``defaults.json`` is written by ``python -m vlm_budget.eval.nano.defaults`` from the accuracy table of the embedded
model; a test holds the two together. There is one choice for towers with a class token, one for those without, each for
one-dimensional and for multi-axis rotary positions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Default:
    """A choice and its reason.

    Attributes:
        method: Name in the registry.
        options: Its fields, where they differ from the method's own defaults.
        reason: One sentence: which table, which figures, and what has not been measured.
    """

    method: str
    options: dict[str, Any]
    reason: str


def default_for(has_cls: bool, mrope: bool) -> Default:
    """The choice for a model.

    Args:
        has_cls: Its vision tower has a class token.
        mrope: Its rotary positions have several axes, so that kept tokens never get new ones.
    """
    return choices()[key(has_cls, mrope)]


def key(has_cls: bool, mrope: bool) -> str:
    """The choice's name in ``defaults.json``."""
    return f"{'class token' if has_cls else 'no class token'}, {'M-RoPE' if mrope else '1-D RoPE'}"


@cache
def choices() -> dict[str, Default]:
    """All choices, by :func:`key`."""
    text = (Path(__file__).parent / "defaults.json").read_text(encoding="utf-8")
    return {name: Default(**entry) for name, entry in json.loads(text).items()}
