"""Looks through datasets without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_budget.errors import VLMBudgetError
from vlm_budget.eval.config import EvalConfig
from vlm_budget.eval.sample import Broken, Sample

_NAMED = 20  # faults that are told, per task


def look_through(config: EvalConfig, pictures: bool = True) -> dict[str, dict[str, Any]]:
    """Read every record of every task, and open its pictures.

    Args:
        config: Tasks, their data, and a limit; the rest is not looked at.
        pictures: Open pictures and find videos, too.

    Returns:
        Per task: ``samples``, ``broken`` (how many cannot be asked), and ``faults``, the first of them in words.

    Raises:
        DataError: A dataset is missing, or is not laid out as its task says.
    """
    tasks, _ = config.resolve()
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        samples, broken = 0, 0
        faults: list[str] = []
        for one in task.samples(config.source(task)):
            samples += 1
            fault = _fault(one, pictures)
            if fault is not None:
                broken += 1
                if len(faults) < _NAMED:
                    faults.append(f"{one.id}: {fault}")
        found[task.name] = {"samples": samples, "broken": broken, "faults": faults}
    return found


def _fault(one: Sample | Broken, pictures: bool) -> str | None:
    if isinstance(one, Broken):
        return one.error
    if not pictures:
        return None
    try:
        if one.clip is not None and one.clip.draw is None and not _is_video(one.clip.path):
            return f"there is no video {one.clip.name!r}"
        for picture in one.images:
            picture.load()
    except (VLMBudgetError, OSError) as error:  # a name too long to be looked for, too
        return str(error)
    return None


def _is_video(path: Path) -> bool:
    """A file, or a folder of frames."""
    return path.is_file() or (path.is_dir() and any(one.is_file() for one in path.iterdir()))
