"""Runs a configuration: every sample of every task, answered by every cell, written down as it comes.

Each process takes every n-th batch, which is prepared and encoded once and answered by all cells that
still owe answers; memory that runs out halves it, a bad sample is found by halving and recorded with its error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_budget.errors import (
    BudgetError,
    MissingExtraError,
    OptionError,
    PatchError,
    RunError,
    UnsupportedModelError,
)
from vlm_budget.eval.batching import batches, halves, windows
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.config import EvalConfig
from vlm_budget.eval.driver import Batch, Driver
from vlm_budget.eval.record import environment
from vlm_budget.eval.regressions import draw_regressions
from vlm_budget.eval.sample import Broken, Sample
from vlm_budget.eval.store import Answer, BatchTime, Key, Run, Store, answered, begin, locked, note_session, read_run
from vlm_budget.eval.task import Task
from vlm_budget.eval.team import Team
from vlm_budget.models import find_family, weights_fingerprint
from vlm_budget.patching import patch

if TYPE_CHECKING:
    from vlm_budget.cli.loading import Loaded
    from vlm_budget.eval.watch import Progress
    from vlm_budget.video.frames.scorers import FrameScorer

_LONGEST = 500  # letters of a recorded error
_FATAL = (RunError, MissingExtraError)  # not the sample's fault


def run(config: EvalConfig, out: str | Path, progress: Progress | None = None, loaded: Loaded | None = None) -> Run:
    """Run a configuration, or go on with it where a folder holds a part of it.

    Args:
        config: What is asked for.
        out: The folder of the results; made if missing.
        progress: Told of every batch.
        loaded: The model, where the caller has it already.

    Returns:
        Everything the folder holds.

    Raises:
        VLMBudgetError: Something is wrong with the configuration, the data, the model or the folder; said before any
            sample is asked.
    """
    folder = Path(out)
    tasks, cells = config.resolve()
    sources = {task.name: config.source(task) for task in tasks}
    sizes = {task.name: _size(task, task.samples(sources[task.name])) for task in tasks}
    team = Team.join(config.device)
    with ExitStack() as held:
        team.once(lambda: held.enter_context(locked(folder)) if team.leads else None)
        model = loaded or _load(config)
        cells, refused = _usable(model, cells, config)
        scorer = _load_scorer(config, model)
        what = team.once(lambda: _begun(folder, manifest(config, model, tasks, cells, refused, sizes), team))
        begin(folder, what)  # where each machine has a folder of its own, in every one of them
        known = answered(folder)
        driver = Driver(model, cells, config.share_encoding, scorer)
        worker = Worker(driver, cells, Store(folder, team.rank), known)
        if progress is not None:
            progress.begin(max(0, sum(sizes.values()) * len(cells) - len(known)) // team.size)
        turns = count()
        for task in tasks:
            for window in windows(task.samples(sources[task.name]), config.batch):
                for members in batches(window, config.batch):
                    if next(turns) % team.size == team.rank:
                        worker.answer(task, members)
                        if progress is not None:
                            progress.update(worker)
        team.wait()
        found = read_run(folder)
        if team.leads:
            draw_regressions(found, worker.driver, tasks, sources, config.pictures)
        team.wait()
    return found


def manifest(
    config: EvalConfig,
    loaded: Loaded,
    tasks: Sequence[Task],
    cells: Sequence[Cell],
    refused: Mapping[str, str],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """What a run is, for its folder."""
    _, base, _ = find_family(loaded.model)
    facts = loaded.facts()
    config = config.anchored()
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {**facts, "weights": weights_fingerprint(base)},
        "tasks": {task.name: task.version for task in tasks},
        "cells": [asdict(cell) for cell in cells],
        "refused": dict(refused),
        "data": {task.name: config.data.get(task.name, "made on the spot") for task in tasks},
        "samples": dict(sizes),
        "options": {"limit": config.limit, "seed": config.seed},
        "config": asdict(config),
        "environment": environment(str(loaded.device), loaded.dtype),
    }


@dataclass(eq=False)
class Worker:
    """Answers samples in one process.

    Args:
        driver: The model.
        cells: What answers.
        store: Where answers go.
        known: What need not be asked.

    Attributes:
        task: The task at hand.
        asked: Answers written by this process, errors too.
        failed: Answers that were errors.
        right: Sum of the main score of the unpatched model's and the other answers, with their numbers.
    """

    driver: Driver
    cells: Sequence[Cell]
    store: Store
    known: set[Key]

    def __post_init__(self) -> None:
        """Nothing is done yet."""
        self.task = ""
        self.asked = self.failed = 0
        self.right: dict[bool, list[float]] = {True: [0.0, 0], False: [0.0, 0]}
        self._warm: set[Cell] = set()
        self._unmet: dict[tuple[Any, ...], str] = {}  # budgets that prompts of a size cannot meet
        self._most: dict[Cell, int] = {}  # samples at once that memory allows

    def answer(self, task: Task, members: Sequence[Sample | Broken]) -> None:
        """Answer what is still owed of a batch."""
        self.task = task.name
        for one in members:
            if isinstance(one, Broken):
                self._note(
                    task, [Answer(task.name, one.id, cell, one.id, error=_line(one.error)) for cell in self.cells]
                )
        owed: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.cells:
            ids = tuple(one.id for one in members if (task.name, one.id, cell) not in self.known)
            owed.setdefault(ids, []).append(cell)
        for ids, cells in owed.items():
            samples = [one for one in members if isinstance(one, Sample) and one.id in ids]
            if samples:
                self._ask(task, samples, cells)

    def _ask(self, task: Task, samples: Sequence[Sample], cells: Sequence[Cell]) -> None:
        """Answer samples together, or by halves where that fails."""
        for members, most in self._together(samples, cells):
            if most < len(samples):
                for start in range(0, len(samples), most):
                    self._ask(task, samples[start : start + most], members)
                continue
            for failed, error in self._try(task, samples, members):
                self._divide(task, samples, failed, error)

    def _together(self, samples: Sequence[Sample], cells: Sequence[Cell]) -> list[tuple[list[Cell], int]]:
        """Cells by how many samples they can take at once."""
        groups: dict[int, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(min(self._most.get(cell, len(samples)), len(samples)), []).append(cell)
        return [(members, most) for most, members in groups.items()]

    def _try(self, task: Task, samples: Sequence[Sample], cells: Sequence[Cell]) -> list[tuple[Sequence[Cell], str]]:
        """Answer; the cells that failed, with their errors in words.

        When this returns nothing of a failed batch is alive: an exception would keep its memory.
        """
        try:
            prepared = self.driver.prepare(task, samples)
        except _FATAL:
            raise
        except Exception as error:  # foreign pictures and processors raise anything
            self._remember(error, cells, len(samples))
            return [(cells, _told(error))]
        failed: list[tuple[Sequence[Cell], str]] = []
        for cell in cells:
            feasible = self._feasible(task, samples, cell, prepared)
            if len(feasible) < len(samples):
                if feasible:
                    self._ask(task, feasible, [cell])
                continue
            try:
                self._answer(task, samples, cell, prepared)
            except _FATAL:
                raise
            except Exception as error:
                if isinstance(error, BudgetError) and len(samples) == 1:
                    self._unmet[_prompt(cell, prepared, 0)] = _told(error)
                self._remember(error, [cell], len(samples))
                failed.append(([cell], _told(error)))
        return failed

    def _remember(self, error: Exception, cells: Sequence[Cell], samples: int) -> None:
        """Where memory ran out, never again ask so many at once."""
        if isinstance(error, torch.OutOfMemoryError):
            self._most |= dict.fromkeys(cells, (samples + 1) // 2)

    def _feasible(self, task: Task, samples: Sequence[Sample], cell: Cell, prepared: Batch) -> list[Sample]:
        """Samples of sizes that are not known to be beyond the budget; the others get their error."""
        feasible = []
        for index, one in enumerate(samples):
            told = self._unmet.get(_prompt(cell, prepared, index))
            if told is None:
                feasible.append(one)
            else:
                self._fail(task, one, [cell], told)
        return feasible

    def _answer(self, task: Task, samples: Sequence[Sample], cell: Cell, prepared: Batch) -> None:
        if cell not in self._warm:  # the first call of anything pays for what later ones have
            self._warm.add(cell)
            self.driver.answer(prepared, cell)
        found = self.driver.answer(prepared, cell)
        answers = [
            Answer(task.name, one.id, cell, one.cluster, text, task.scores(text, one), cost, dict(one.facts))
            for one, text, cost in zip(samples, found.texts, found.costs, strict=True)
        ]
        ids = tuple(one.id for one in samples)
        self._note(task, answers, BatchTime(task.name, cell, ids, found.ms, prepared.shared, found.peak_bytes))

    def _divide(self, task: Task, samples: Sequence[Sample], cells: Sequence[Cell], error: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(samples) > 1:
            for half in halves(samples):
                self._ask(task, half, cells)
            return
        self._fail(task, samples[0], cells, error)

    def _fail(self, task: Task, one: Sample, cells: Sequence[Cell], error: str) -> None:
        facts = dict(one.facts) if _is_plain(one.facts) else {}
        self._note(task, [Answer(task.name, one.id, cell, one.cluster, facts=facts, error=error) for cell in cells])

    def _note(self, task: Task, answers: Sequence[Answer], time: BatchTime | None = None) -> None:
        new = [answer for answer in answers if answer.key not in self.known]
        self.store.add(new, time)
        self.known.update(answer.key for answer in new)
        self.asked += len(new)
        for answer in new:
            if answer.error is not None:
                self.failed += 1
                continue
            right = self.right[answer.cell.unpatched]
            right[0] += answer.scores[task.metric]
            right[1] += 1


def _size(task: Task, samples: Iterator[Sample | Broken]) -> int:
    """How many there are; refuses, before a model is loaded, a dataset of which nothing can be read."""
    number, first, good = 0, None, False
    for one in samples:
        number += 1
        good = good or isinstance(one, Sample)
        first = first or one
    if good:
        return number
    reason = "it holds no samples"
    if isinstance(first, Broken):
        reason = f"none of its records is a sample: {first.id}: {first.error}"
    raise RunError(f"nothing to ask of task {task.name!r}: {reason}")


def _begun(folder: Path, what: dict[str, Any], team: Team) -> dict[str, Any]:
    begin(folder, what)
    note_session(
        folder,
        {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "processes": team.size,
            **{name: what["environment"][name] for name in ("git", "device", "versions")},
        },
    )
    return what


def _load(config: EvalConfig) -> Loaded:
    from vlm_budget.cli.loading import load

    return load(config.model, config.device, config.dtype, lambda name: None)


def _load_scorer(config: EvalConfig, loaded: Loaded) -> FrameScorer | None:
    from vlm_budget.video.frames.scorers import load_scorer

    return load_scorer(config.scorer, str(loaded.device)) if config.scorer else None


def _usable(loaded: Loaded, cells: Sequence[Cell], config: EvalConfig) -> tuple[list[Cell], dict[str, str]]:
    """Cells that this model can run; of those that nobody named, the others are left out with their reason."""
    kept, refused = [], {}
    asked_for = {one.strip() for one in config.methods}
    for cell in cells:
        try:
            if not cell.unpatched:
                patch(loaded.model, cell.acting.named, cell.spend).undo()
            kept.append(cell)
        except (PatchError, OptionError, UnsupportedModelError, MissingExtraError) as error:
            if cell.methods in asked_for:
                raise
            refused[str(cell)] = _line(str(error))
    return kept, refused


def _is_plain(facts: Any) -> bool:
    """It can be written down."""
    try:
        json.dumps(dict(facts), allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _prompt(cell: Cell, prepared: Batch, index: int) -> tuple[Any, ...]:
    """What decides whether a budget can be met."""
    tokens_only = cell.spend is None or cell.spend.unit in ("ratio", "tokens")
    return (cell, prepared.sizes[index], None if tokens_only else prepared.text[index])


def _told(error: Exception) -> str:
    return _line(f"{type(error).__name__}: {error}")


def _line(text: str) -> str:
    """An error as one line of bounded length."""
    return " ".join(text.split())[:_LONGEST]
