"""Samples that the unpatched model answered right and a method wrong, with what the runner drew of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_budget.errors import RunError
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.summary import Summary

FILE, PICTURES = "regressions.json", "pictures"
_MOST = 12
_LARGEST, _LARGEST_SUM = 4 << 20, 32 << 20
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Regression:
    """One sample that a method broke.

    Attributes:
        task: Name of the task.
        sample: Its id.
        cell: What broke it.
        unpatched: Answer of the unpatched model.
        answer: Answer of the method.
        prompt: What was asked; None where the runner kept nothing.
        reference: What is right.
        picture: PNG file, with the tokens the method kept.
        missing: Why there is no picture though one was named.
    """

    task: str
    sample: str
    cell: Cell
    unpatched: str
    answer: str
    prompt: str | None = None
    reference: str | None = None
    picture: bytes | None = None
    missing: str | None = None

    @property
    def source(self) -> str:
        """The picture as an address that needs no file."""
        return f"data:image/png;base64,{base64.b64encode(self.picture or b'').decode('ascii')}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        head = (self.picture or b"")[16:24]
        return int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")


def find_regressions(summary: Summary, folder: Path) -> list[Regression]:
    """What the runner kept in a folder; without it, the worst of the answers, with neither prompt nor picture.

    Raises:
        RunError: The list in the folder is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return _from_answers(summary)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {str(path)!r}: {error}. Remove it, and report again.") from error
    if not isinstance(entries, list):
        raise RunError(f"{str(path)!r} must hold a list, got {type(entries).__name__}. Remove it, and report again.")
    found, left = [], _LARGEST_SUM
    for number, entry in enumerate(entries, 1):
        try:
            one = _read(entry, folder, left)
        except (TypeError, KeyError, AttributeError) as error:
            raise RunError(f"entry {number} of {str(path)!r} is no regression: {error!r}. Remove it.") from error
        left -= len(one.picture or b"")
        found.append(one)
    return found


def _read(entry: Mapping[str, Any], folder: Path, left: int) -> Regression:
    name = entry.get("picture")
    picture, missing = (None, None) if name is None else _picture(folder, str(name), left)
    return Regression(
        task=str(entry["task"]),
        sample=str(entry["sample"]),
        cell=Cell(str(entry["methods"]), str(entry["budget"])),
        unpatched=str(entry["unpatched_answer"]),
        answer=str(entry["answer"]),
        prompt=_text(entry.get("prompt")),
        reference=_text(entry.get("reference")),
        picture=picture,
        missing=missing,
    )


def _text(value: object) -> str | None:
    """References may be several."""
    return None if value is None else " | ".join(map(str, value)) if isinstance(value, list) else str(value)


def _picture(folder: Path, name: str, left: int) -> tuple[bytes | None, str | None]:
    """A PNG file of the pictures' folder itself, or why there is none; links that lead elsewhere are not followed."""
    try:
        base = folder.resolve() / PICTURES
        path = (base / name).resolve()
        if not path.is_relative_to(base):
            return None, f"picture {name!r} does not lie in the run's pictures"
        if not path.is_file():
            return None, f"picture {name!r} is missing"
        if path.stat().st_size > min(left, _LARGEST):
            return None, f"picture {name!r} is too large to be shown"
        data = path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a loop of links, no permission
        return None, f"picture {name!r} cannot be read: {error}"
    return (data, None) if data.startswith(_PNG) and len(data) > 24 else (None, f"picture {name!r} is no PNG file")


def _from_answers(summary: Summary) -> list[Regression]:
    found: list[tuple[float, Regression]] = []
    for task in summary.tasks:
        mine = [one for one in summary.run.answers if one.task == task.name and task.metric in one.scores]
        full = {one.sample: one for one in mine if one.cell.unpatched}
        worst: dict[str, tuple[float, Regression]] = {}
        for one in mine:
            right = full.get(one.sample)
            if right is None or one.error is not None or one.cell.methods == "random":
                continue
            drop = right.scores[task.metric] - one.scores[task.metric]
            if drop > worst.get(one.sample, (0.0, None))[0]:
                worst[one.sample] = (drop, Regression(task.name, one.sample, one.cell, right.answer, one.answer))
        found += sorted(worst.values(), key=lambda pair: -pair[0])[:_MOST]
    return [one for _, one in found]
