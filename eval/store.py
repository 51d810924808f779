"""A run's folder: what was asked for, every answer, and what it took.

* ``manifest.json``: configuration, versions, model, tasks. Written once, before the first answer.
* ``answers-00000.jsonl``: a line per answer, one file per process. The same run gives the same lines, times apart,
  on any number of processes.
* ``times-00000.jsonl``: a line per batch with its times.
* ``sessions.jsonl``: a line per start: when, with what code, on how many processes.
* ``run.lock``: held while a run writes.

Lines are appended with fsync, a batch at a time. A last line that a kill cut off is dropped when the folder is opened
again; any other damage is refused.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm_budget.errors import RunError
from vlm_budget.eval.cells import Cell

MANIFEST, SESSIONS, LOCK = "manifest.json", "sessions.jsonl", "run.lock"
_VERSION = 1
_PART = ".part"
_LARGEST = sys.float_info.max
Key = tuple[str, str, Cell]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        task: Name of the task.
        sample: Id of the sample.
        cell: What answered.
        cluster: What the sample shares with others; errors are clustered by it.
        answer: The model's text.
        scores: By name.
        cost: Per prompt: ``text`` and ``visual`` tokens, ``kept`` visual tokens that entered the language model,
            ``mean_kept`` over its layers, ``new`` tokens, ``flops`` of the prompt pass, ``kv_bytes`` after it.
        facts: The sample's facts that figures need.
        error: Why there is no answer; scores and cost are then empty.
    """

    task: str
    sample: str
    cell: Cell
    cluster: str
    answer: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def key(self) -> Key:
        """What may be answered once only."""
        return (self.task, self.sample, self.cell)

    def line(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Answer:
        """From plain data.

        Raises:
            TypeError, KeyError: It is none.
        """
        found = cls(**{**line, "cell": _cell(line["cell"])})
        texts = (found.task, found.sample, found.cluster, found.answer, "" if found.error is None else found.error)
        if not all(isinstance(text, str) for text in texts) or not isinstance(found.facts, dict):
            raise TypeError("a text or the facts are of the wrong kind")
        for numbers in (found.scores, found.cost):
            if not isinstance(numbers, dict) or not all(map(_is_number, numbers.values())):
                raise TypeError("scores and costs are numbers by name")
        if found.error is None and not found.scores:
            raise TypeError("it has neither scores nor an error")
        return found


@dataclass(frozen=True)
class BatchTime:
    """What a batch took.

    Attributes:
        task: Name of the task.
        cell: What answered.
        samples: Ids of the samples.
        ms: Milliseconds of the whole batch by stage: ``load`` (files), ``process`` (the processor), ``encode`` (vision
            encoder with all probes; once for all cells of a batch where ``shared``), ``score`` (frames, of methods that
            read scores; once for all of these), ``select``, ``compact``, ``prefill`` (of it ``drop``), ``decode``,
            ``total`` (of what is done for the cell alone).
        shared: The encoder ran once for several cells.
        peak_bytes: Peak memory of the accelerator; 0 on a CPU.
    """

    task: str
    cell: Cell
    samples: tuple[str, ...]
    ms: Mapping[str, float]
    shared: bool = False
    peak_bytes: int = 0

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> BatchTime:
        """From plain data.

        Raises:
            TypeError, KeyError: It is none.
        """
        found = cls(**{**line, "cell": _cell(line["cell"]), "samples": tuple(line["samples"])})
        if not isinstance(found.task, str) or not all(isinstance(one, str) for one in found.samples):
            raise TypeError("a name is no text")
        if not isinstance(found.ms, dict) or not all(map(_is_number, found.ms.values())):
            raise TypeError("times are numbers by stage")
        return found


def _cell(given: Any) -> Cell:
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise TypeError("a cell is methods and budget as text")
    return Cell(**given)


def _is_number(value: Any) -> bool:
    """Finite, and no larger than a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST <= value <= _LARGEST


@dataclass(frozen=True)
class Run:
    """What a folder holds.

    Attributes:
        folder: The folder.
        manifest: The configuration, and where it ran first.
        sessions: Every start of it.
        answers: Every answer once, in order of task, sample and cell.
        times: Of batches all of whose samples are answered.
    """

    folder: Path
    manifest: Mapping[str, Any]
    answers: tuple[Answer, ...]
    times: tuple[BatchTime, ...]
    sessions: tuple[Mapping[str, Any], ...] = ()


class Store:
    """The files one process writes.

    Args:
        folder: The run's folder; there already.
        rank: Which process this is.

    Raises:
        RunError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.answers = folder / f"answers-{rank:05}.jsonl"
        self.times = folder / f"times-{rank:05}.jsonl"
        for path in (self.answers, self.times):
            _mend(path)

    def add(self, answers: Sequence[Answer], time: BatchTime | None = None) -> None:
        """Append a batch; when this returns it is on the disk.

        Raises:
            RunError: The disk is full, or the folder has become read-only; what was written before stays readable.
        """
        rows = _encoded([answer.line() for answer in answers])
        if time is not None:  # first: without its answers it counts for nothing
            _append(self.times, _encoded([asdict(time)]))
        _append(self.answers, rows)


def begin(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make a run's folder and write its manifest, or check that it is this run's.

    Raises:
        RunError: The folder holds another run or other files, or cannot be written to.
    """
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_same(read_manifest(folder), manifest)
            return
        if any(one.name != LOCK and one.suffix != _PART for one in folder.iterdir()):
            raise RunError(f"{str(folder)!r} holds other files; name a new folder for the results")
        write_whole(path, json.dumps({"version": _VERSION, **manifest}, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error


def check_same(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to add answers to those of another configuration.

    Raises:
        RunError: Model, tasks, cells or samples differ.
    """
    other = [
        name
        for name in ("model", "tasks", "cells", "data", "samples", "options")
        if known.get(name) != wanted.get(name)
    ]
    if other:
        raise RunError(
            f"the folder holds a run with another {' and another '.join(other)}; answers of the two would be mixed. "
            "Name a new folder, or continue the old run with 'vlm-budget eval resume'."
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a run was asked for.

    Raises:
        RunError: There is no run, or its manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise RunError(f"{str(folder)!r} holds no run: there is no {MANIFEST}")
    found = _read_object(path)
    if found.get("version") != _VERSION:
        raise RunError(f"{str(path)!r} is no manifest of version {_VERSION}")
    try:
        kinds = {"model": dict, "tasks": dict, "cells": list, "data": dict, "config": dict, "samples": dict}
        if missing := [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]:
            raise TypeError(f"it has no {' and no '.join(missing)}")
        for cell in found["cells"]:
            _cell(cell)
    except (TypeError, KeyError) as error:
        raise RunError(f"{str(path)!r} is damaged: {error}") from error
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"{str(path)!r} is damaged: it holds no object")
    return found


def read_run(folder: str | Path) -> Run:
    """Everything a folder holds; may be called while a run writes.

    Raises:
        RunError: There is no run, a line is damaged, or an answer stands there twice with different texts.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    answers: dict[Key, Answer] = {}
    for path in sorted(place.glob("answers-*.jsonl")):
        for number, line in _lines(path):
            try:
                answer = Answer.of(line)
            except (TypeError, KeyError) as error:
                raise RunError(f"{path.name} line {number} is no answer of this version: {error}") from error
            if answers.setdefault(answer.key, answer) != answer:
                raise RunError(f"{path.name} line {number} answers {answer.sample!r} of {answer.task} a second time")
    times: dict[tuple[str, Cell, tuple[str, ...]], BatchTime] = {}
    for path in sorted(place.glob("times-*.jsonl")):
        for number, line in _lines(path):
            try:
                time = BatchTime.of(line)
            except (TypeError, KeyError) as error:
                raise RunError(f"{path.name} line {number} is no time of this version: {error}") from error
            if all((time.task, sample, time.cell) in answers for sample in time.samples):
                times[time.task, time.cell, time.samples] = time
    ordered = sorted(answers.values(), key=lambda one: one.key)
    sessions = [line for _, line in _lines(place / SESSIONS)] if (place / SESSIONS).exists() else []
    return Run(place, manifest, tuple(ordered), tuple(times[key] for key in sorted(times)), tuple(sessions))


def answered(folder: Path) -> set[Key]:
    """What need not be asked again."""
    return {answer.key for answer in read_run(folder).answers}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder; a second run is refused at once. The lock dies with its process.

    Raises:
        RunError: Another process holds it, or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(str(folder / LOCK))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another run writes to {str(folder)!r}; wait for it, or name another folder") from None
    except OSError as error:
        raise RunError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def note_session(folder: Path, facts: Mapping[str, Any]) -> None:
    """Remember a start of a run.

    Raises:
        RunError: The folder cannot be written to.
    """
    path = folder / SESSIONS
    _mend(path)
    _append(path, _encoded([facts]))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: It cannot be written; what was there before is left.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}{_PART}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _encoded(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def _append(path: Path, data: bytes) -> None:
    """Append all of it, or nothing: half a batch would be asked again and stand there twice."""
    try:
        # Unbuffered: a buffer would write its rest when it is closed, behind the place where the file was cut.
        with path.open("ab", buffering=0) as file:
            start, left = file.seek(0, os.SEEK_END), memoryview(data)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.truncate(path, start)
                raise
    except OSError as error:
        raise RunError(f"cannot write to {str(path)!r}: {error.strerror or error}. What it held is kept.") from error


def _mend(path: Path) -> None:
    """Drop a last line that a kill cut off."""
    try:
        if not path.exists():
            path.touch()
            return
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
    except OSError as error:
        raise RunError(f"cannot write to {str(path)!r}: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    for number, line in enumerate(lines[:-1], 1):  # behind the last line end stands nothing, or half a line
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise RunError(
                f"line {number} of {str(path)!r} is damaged ({error}); its answers cannot be trusted"
            ) from None
        yield number, row
