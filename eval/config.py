"""What a run is asked for: the same fields on the command line and in a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlm_budget.cli.common import Device, Dtype
from vlm_budget.errors import DataError, OptionError
from vlm_budget.eval.cells import Cell, make_cells, method_text
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Task, add_folder, find_tasks
from vlm_budget.registry import PRUNERS

ALL = "all"
_HUB = "hub:"
_KINDS: Sequence[tuple[str, Any, str]] = (
    *((name, str, "text") for name in ("model", "device", "dtype", "scorer")),
    ("seed", int | None, "a number"),
    ("share_encoding", bool, "true or false"),
    ("data", Mapping, "a mapping of tasks to folders"),
)


@dataclass(frozen=True)
class EvalConfig:
    """A run.

    Attributes:
        model: ``nano``, ``nano-robust``, a local folder, or a hub id.
        tasks: Names of tasks or of groups of tasks.
        methods: As written in :mod:`vlm_budget.eval.cells`; ``all`` is every registered method, of which those that the
            model cannot run are left out with their reason.
        budgets: As text; a budget of everything is the unpatched model.
        without: Baselines that are refused: ``unpatched``, ``random``, ``uniform``.
        data: Per task, a folder in its dataset's own layout, or ``hub:NAME`` for one that ``datasets`` loads; ``hub``
            alone for the one the task names.
        task_folders: Folders with tasks of one's own.
        limit: Samples per task at most.
        batch: Samples that are asked at once; halved where memory runs out.
        seed: Of tasks that draw their samples; None for their published test set.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        share_encoding: Encode pictures once per batch for all methods.
        pictures: Of the worst regressions, drawn per method and budget.
        scorer: What scores frames for methods that read scores, such as ``clip:FOLDER``; empty for none. See
            :func:`vlm_budget.video.frames.scorers.load_scorer`.
    """

    model: str
    tasks: Sequence[str]
    methods: Sequence[str] = ()
    budgets: Sequence[str] = ("1.0", "0.4", "0.2", "0.1")
    without: Sequence[str] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    task_folders: Sequence[str] = ()
    limit: int | None = None
    batch: int = 8
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    share_encoding: bool = True
    pictures: int = 1
    scorer: str = ""

    def __post_init__(self) -> None:
        """Check numbers.

        Raises:
            OptionError: One is out of range or of the wrong kind, or nothing is named.
        """
        for name, least in (("batch", 1), ("limit", 1), ("pictures", 0)):
            value = getattr(self, name)
            if value is None and name == "limit":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} must be a number from {least} on, got {value!r}")
        for name, kind, said in _KINDS:
            if not isinstance(getattr(self, name), kind) or (name == "seed" and isinstance(self.seed, bool)):
                raise OptionError(f"{name} must be {said}, got {getattr(self, name)!r}")
        if not all(isinstance(text, str) for pair in self.data.items() for text in pair):
            raise OptionError(f"data must be a mapping of tasks to folders, got {dict(self.data)!r}")
        if self.seed is not None and self.seed < 0:
            raise OptionError(f"seed must be a number from 0 on, got {self.seed}")
        for name, known in (("device", [one.value for one in Device]), ("dtype", [one.value for one in Dtype])):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.tasks:
            raise OptionError("name at least one task; see them with 'vlm-budget eval ls'")

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> EvalConfig:
        """A YAML file.

        Args:
            path: The file; a method there is a name, or a name with a mapping of options.
            changes: Fields that replace those of the file.

        Raises:
            OptionError: It cannot be read, or has unknown fields.
        """
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # an impossible date is a ValueError
            raise OptionError(f"cannot read {str(path)!r}: {' '.join(str(error).split())}") from error
        return cls.of(data, str(path), **changes)

    @classmethod
    def of(cls, fields_given: Any, where: str = "the configuration", /, **changes: Any) -> EvalConfig:
        """From plain data.

        Raises:
            OptionError: Fields are unknown, missing, or of the wrong kind.
        """
        if not isinstance(fields_given, Mapping):
            raise OptionError(f"{where} is no mapping of fields")
        known = {one.name for one in fields(cls)}
        if strange := sorted(set(map(str, fields_given)) - known):
            raise OptionError(f"{where} has unknown fields: {', '.join(strange)}. Fields: {', '.join(sorted(known))}.")
        found = {**fields_given, **changes}
        for name in ("tasks", "methods", "budgets", "without", "task_folders"):
            if name in found:
                entries = found[name] if isinstance(found[name], list | tuple) else [found[name]]
                found[name] = tuple(_entry(name, one, where) for one in entries)
        try:
            return cls(**found)
        except TypeError as error:
            raise OptionError(f"{where} is incomplete: {error}") from error

    def resolve(self) -> tuple[list[Task], list[Cell]]:
        """The tasks and the columns.

        Raises:
            UnknownNameError: A task, method or option is not known; the message suggests.
            BudgetError: A budget cannot be read.
            TaskError: A task's file is damaged.
            OptionError: Data is named for a task that is not run, or needs none.
        """
        for folder in self.task_folders:
            add_folder(folder)
        tasks = find_tasks(self.tasks)
        if strange := sorted(set(self.data) - {task.name for task in tasks}):
            raise OptionError(f"data is named for {', '.join(strange)}, which is not among the tasks")
        if made := [task.name for task in tasks if task.name in self.data and not task.needs_data]:
            raise OptionError(f"data is named for {', '.join(made)}, which is made on the spot and reads none")
        methods = [name for one in self.methods for name in (PRUNERS.names() if one == ALL else [one])]
        return tasks, make_cells(methods, self.budgets, self.without)

    def anchored(self) -> EvalConfig:
        """The same with absolute paths, so that a run can be resumed from any folder."""
        data = {task: place if _on_hub(place) else _absolute(place) for task, place in self.data.items()}
        folders, scorer = tuple(map(_absolute, self.task_folders)), self.scorer
        kind, colon, name = scorer.partition(":")
        if name and os.path.isdir(os.path.expanduser(name)):
            scorer = f"{kind}{colon}{_absolute(name)}"
        return replace(self, data=data, task_folders=folders, scorer=scorer)

    def source(self, task: Task) -> Source:
        """Where a task's samples come from.

        Raises:
            DataError: The task needs a dataset, and none is named or it is missing.
        """
        named = self.data.get(task.name)
        drawn = Source(seed=self.seed, limit=self.limit)
        if named is None:
            if task.needs_data:
                raise DataError(
                    f"task {task.name!r} needs its dataset: pass --data {task.name}=FOLDER, or --data {task.name}=hub "
                    f"to load {task.data.get('hub', 'it')!r}. What the folder holds: 'vlm-budget eval ls {task.name}'."
                )
            return drawn
        if _on_hub(named):
            return replace(drawn, hub=named.removeprefix("hub").removeprefix(":") or None)
        source = replace(drawn, root=Path(os.path.expanduser(named)))
        _ = source.folder  # refused now, before a model is loaded
        return source


def _entry(name: str, entry: Any, where: str) -> str:
    """An entry of a list of the configuration as text."""
    if name == "methods" and isinstance(entry, Mapping):
        if not all(options is None or isinstance(options, Mapping) for options in entry.values()):
            raise OptionError(f"{where}: a method's options are a mapping, got {dict(entry)!r}")
        return method_text(entry)
    number = isinstance(entry, int | float) and not isinstance(entry, bool) and name == "budgets"
    if not isinstance(entry, str) and not number:
        raise OptionError(f"{where}: {name} is a list of names, and has {entry!r}")
    return str(entry)


def _on_hub(place: str) -> bool:
    return place == "hub" or place.startswith(_HUB)


def _absolute(place: str) -> str:
    return os.path.abspath(os.path.expanduser(place))
