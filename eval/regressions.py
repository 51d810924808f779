"""The worst regressions of a run: what the unpatched model knew and a method lost, drawn with the kept tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vlm_budget.errors import RunError
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.driver import Driver
from vlm_budget.eval.sample import Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.store import Answer, Run, write_whole
from vlm_budget.eval.task import Task
from vlm_budget.picture import draw_kept

INDEX, PICTURES = "regressions.json", "pictures"
_IN_ALL, _WIDEST = 40, 720


def worst(run: Run, tasks: Sequence[Task], each: int) -> list[tuple[Answer, Answer]]:
    """Answers that lost most against the unpatched model's, with those: per task and cell the ``each`` worst.

    Of equal losses those come first that most cells share, then by name, so that equal runs choose alike. Where there
    are too many in all, tasks take turns, and every cell's worst comes before any second.
    """
    metrics = {task.name: task.metric for task in tasks}
    full = {(one.task, one.sample): one for one in run.answers if one.cell.unpatched and one.error is None}
    lost: dict[tuple[str, Cell], list[tuple[float, Answer]]] = {}
    shared: dict[tuple[str, str], int] = {}
    for one in run.answers:
        base = full.get((one.task, one.sample))
        if base is None or one.error is not None or one.cell.unpatched or one.task not in metrics:
            continue
        metric = metrics[one.task]
        loss = base.scores[metric] - one.scores[metric]
        if loss > 0:
            lost.setdefault((one.task, one.cell), []).append((loss, one))
            shared[one.task, one.sample] = shared.get((one.task, one.sample), 0) + 1
    found: dict[str, list[tuple[int, Answer]]] = {}
    for place in sorted(lost):
        ordered = sorted(
            lost[place], key=lambda pair: (-pair[0], -shared[pair[1].task, pair[1].sample], pair[1].sample)
        )
        found.setdefault(place[0], []).extend(enumerate(one for _, one in ordered[:each]))
    turns = [sorted(ranked, key=lambda pair: (pair[0], pair[1].cell)) for ranked in found.values()]
    taken = [pair for turn in zip_longest(*turns) for pair in turn if pair is not None][:_IN_ALL]
    taken.sort(key=lambda pair: (pair[1].task, pair[1].cell, pair[0]))
    return [(one, full[one.task, one.sample]) for _, one in taken]


def draw_regressions(run: Run, driver: Driver, tasks: Sequence[Task], sources: Mapping[str, Source], each: int) -> None:
    """Write ``regressions.json`` and the pictures it names.

    Args:
        run: A finished one.
        driver: The model that answered.
        tasks: The run's tasks.
        sources: Their datasets.
        each: Regressions per task and cell.

    Raises:
        RunError: They cannot be written, or a sample is gone from its dataset.
    """
    folder, chosen = run.folder, worst(run, tasks, each) if each else []
    entries: list[dict[str, Any]] = []
    for task in tasks:
        mine = [pair for pair in chosen if pair[0].task == task.name]
        wanted = {one.sample for one, _ in mine}
        samples = {
            one.id: one for one in task.samples(sources[task.name]) if isinstance(one, Sample) and one.id in wanted
        }
        for one, base in mine:
            if one.sample not in samples:
                raise RunError(f"task {task.name!r} has no sample {one.sample!r} any more; its data has changed")
            entries.append(_entry(folder, driver, task, samples[one.sample], one, base))
    try:
        write_whole(folder / INDEX, json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {str(folder / INDEX)!r}: {error.strerror or error}") from error


def _entry(folder: Path, driver: Driver, task: Task, sample: Sample, lost: Answer, base: Answer) -> dict[str, Any]:
    return {
        "task": task.name,
        "sample": sample.id,
        "methods": lost.cell.methods,
        "budget": lost.cell.budget,
        "prompt": sample.prompt,
        "reference": list(sample.answers),
        "unpatched_answer": base.answer,
        "answer": lost.answer,
        "picture": _picture(folder, driver, task, sample, lost),
    }


def _picture(folder: Path, driver: Driver, task: Task, sample: Sample, lost: Answer) -> str | None:
    """Draw what was kept; None where a prompt's items are not its pictures, one by one."""
    batch = driver.prepare(task, [sample])
    kept = driver.answer(batch, lost.cell, draw=True).kept or ()
    sources: list[Any] = list(batch.pictures[0])
    if kept and all(item.item.modality == "video" for item in kept):
        sources = [sources]
    if not kept or len(kept) != len(sources):
        return None
    name = hashlib.sha256(repr(lost.key).encode()).hexdigest()[:16] + ".png"
    path = folder / PICTURES / name
    try:
        path.parent.mkdir(exist_ok=True)
        page = draw_kept(sources, kept, str(lost.cell))
        page.thumbnail((_WIDEST, _WIDEST))
        page.quantize(128).save(path, optimize=True)  # dozens of them go into one HTML file
    except OSError as error:
        raise RunError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return name
