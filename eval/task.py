"""A task: one YAML file that says what is asked and how it is scored, and one function that reads its dataset.

A task is looked up by name among the files of ``eval/tasks`` and of folders that :func:`add_folder` names; nothing
else has to know about a new one.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, get_args

from vlm_budget.errors import TaskError, UnknownNameError
from vlm_budget.eval.sample import Broken, Sample
from vlm_budget.eval.source import Source

Modality = Literal["image", "video", "views", "text"]
Scores = dict[str, float]
FOLDERS = [Path(__file__).parent / "tasks"]
_KINDS: Sequence[tuple[str, Any, str]] = (
    *((name, str, "text") for name in ("name", "title", "load", "score", "metric", "prompt")),
    ("summary", str | None, "text"),
    ("reads_text", bool, "true or false"),
    ("groups", list | tuple, "a list of names"),
    ("data", Mapping, "a mapping"),
)


@dataclass(frozen=True)
class Task:
    """What a YAML file says.

    Attributes:
        name: Unique; the file's stem.
        version: Raised whenever prompts, samples or scores change; results of different versions are never mixed.
        title: For people.
        modality: ``"image"``, ``"video"``, ``"views"`` (many pictures of one scene) or ``"text"``.
        load: ``"module:function"``: (source, task) to its samples, in a fixed order.
        score: ``"module:function"``: (answer, sample) to scores by name, each a number.
        metric: Name of the main score; shown first, compared, higher is better.
        summary: ``"module:function"``: (rows of (scores, sample facts)) to figures that are no plain means, such as F1;
            None where means are all there is.
        prompt: Template of the prompt, with the loader's fields in braces.
        max_new_tokens: Longest answer.
        frames: Frames taken from a video.
        reads_text: Answers stand in small print: the report warns at small budgets.
        groups: Names under which several tasks are run together, such as ``"nano"``.
        data: Where the dataset comes from, its layout on disk and on the hub, licence, and the paper of the metric.
    """

    name: str
    version: int
    title: str
    modality: Modality
    load: str
    score: str
    metric: str
    summary: str | None = None
    prompt: str = "{question}"
    max_new_tokens: int = 16
    frames: int = 8
    reads_text: bool = False
    groups: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what can be checked without the dataset."""
        if self.modality not in get_args(Modality):
            raise TaskError(f"task {self.name!r}: modality must be one of {', '.join(get_args(Modality))}")
        for name in ("version", "max_new_tokens", "frames"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TaskError(f"task {self.name!r}: {name} must be a number from 1 on, got {value!r}")
        for name, kind, said in _KINDS:
            value = getattr(self, name)
            if not isinstance(value, kind) or (name == "groups" and not all(isinstance(one, str) for one in value)):
                raise TaskError(f"task {self.name!r}: {name} must be {said}, got {value!r}")

    @property
    def needs_data(self) -> bool:
        """The dataset must be named; else it is made on the spot."""
        return bool(self.data)

    def samples(self, source: Source) -> Iterator[Sample | Broken]:
        """The task's questions, as many as the source's limit; records that are none come as :class:`Broken`.

        So does a sample whose id another one has: answers are kept by id.

        Raises:
            DataError: The dataset is missing, or is not laid out as the task says.
        """
        function: Callable[[Source, Task], Iterator[Sample | Broken]] = _resolve(self.load)
        seen: set[str] = set()
        for one in islice(function(source, self), source.limit):
            name = one.id
            if name in seen:
                name = next(f"{one.id} #{turn}" for turn in count(2) if f"{one.id} #{turn}" not in seen)
            seen.add(name)
            error = one.error if isinstance(one, Broken) else "its id stands twice"
            yield one if name == one.id else Broken(name, error)

    def ask(self, **values: Any) -> str:
        """The prompt for a record's fields."""
        return self.prompt.format_map(values)

    @cached_property
    def _score(self) -> Callable[[str, Sample], Scores]:
        function: Callable[[str, Sample], Scores] = _resolve(self.score)
        return function

    def scores(self, answer: str, sample: Sample) -> Scores:
        """Scores of an answer by name; :attr:`metric` is among them."""
        found = self._score(answer, sample)
        if self.metric not in found:
            raise TaskError(f"task {self.name!r} names metric {self.metric!r}, its scores are {sorted(found)}")
        return found

    def figures(self, rows: Sequence[tuple[Mapping[str, float], Mapping[str, Any]]]) -> Scores:
        """Figures over all samples: means of every score, then those of :attr:`summary`.

        Scores whose names begin with ``_`` are for :attr:`summary` alone.
        """
        names = dict.fromkeys(name for scores, _ in rows for name in scores if not name.startswith("_"))
        means = {}
        for name in names:
            values = [scores[name] for scores, _ in rows if name in scores]
            means[name] = sum(values) / len(values)
        return means if self.summary is None else {**means, **_resolve(self.summary)(rows)}


def add_folder(path: str | Path) -> None:
    """Look for tasks in a folder of YAML files, too; their functions are found in Python files beside them.

    Raises:
        TaskError: There is no such folder, or it has a task that is known from another one.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise TaskError(f"there is no folder of tasks {str(path)!r}")
    if any(folder.resolve() == one.resolve() for one in FOLDERS):
        return
    known = _files()
    for file in sorted(folder.glob("*.yaml")):
        if file.stem in known:
            raise TaskError(
                f"task {file.stem!r} of {str(folder)!r} has the name of {str(known[file.stem])!r}; rename its file"
            )
    FOLDERS.append(folder)
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def task_names() -> list[str]:
    """All tasks, sorted."""
    return sorted(_files())


def read_task(name: str) -> Task:
    """A task by name.

    Raises:
        UnknownNameError: There is none; the message suggests.
        TaskError: Its file is damaged.
    """
    files = _files()
    if name not in files:
        near = difflib.get_close_matches(str(name).lower(), [*files, *_groups()], n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UnknownNameError(f"unknown task {name!r}.{hint} See them all with 'vlm-budget eval ls'.")
    return _read(files[name])


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name or by group, each once, in the order given.

    Raises:
        UnknownNameError: A name is neither.
        TaskError: A task's file is damaged.
    """
    groups, found = _groups(), []
    for name in names:
        found += groups[name] if name in groups and name not in _files() else [name]
    return [read_task(name) for name in dict.fromkeys(found)]


def _files() -> dict[str, Path]:
    return {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("*.yaml"))}


def _groups() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, path in sorted(_files().items()):
        for group in _read(path).groups:
            groups.setdefault(group, []).append(name)
    return groups


def _read(path: Path) -> Task:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # an impossible date is a ValueError
        raise TaskError(f"cannot read task {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise TaskError(f"task {str(path)!r} is no mapping of fields")
    known = {one.name for one in fields(Task)}
    if strange := sorted(set(map(str, data)) - known):
        raise TaskError(f"task {str(path)!r} has unknown fields: {', '.join(strange)}")
    if data.get("name", path.stem) != path.stem:
        raise TaskError(f"task {str(path)!r} calls itself {data['name']!r}; a task is named like its file")
    try:
        return Task(**{"name": path.stem, **data})
    except TypeError as error:
        raise TaskError(f"task {str(path)!r} is incomplete: {error}") from error


def _resolve(target: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of one's own may raise anything
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise TaskError(f"there is no function {target!r} (module:function): {told}") from error
