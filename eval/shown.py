"""What the verbs of ``vlm-budget eval`` share: running, reading, printing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from vlm_budget.cli.common import err_console, out_console

if TYPE_CHECKING:
    from vlm_budget.eval.cells import Cell
    from vlm_budget.eval.config import EvalConfig
    from vlm_budget.eval.store import Run
    from vlm_budget.eval.summary import Summary
    from vlm_budget.eval.task import Task


def run_all(config: EvalConfig, out: Path) -> None:
    """Run a configuration, print its figures and write its pages."""
    from vlm_budget.eval.runner import run
    from vlm_budget.eval.watch import live

    stderr = err_console()
    try:
        with live(shown=_leads()) as progress:
            found = run(config, out, progress)
    except KeyboardInterrupt:
        stderr.print(Text(f"stopped; go on with: vlm-budget eval resume {out}", "yellow"))
        raise typer.Exit(130) from None
    if not _leads():
        return
    from vlm_budget.eval.summary import summarise

    summary = summarise(found)
    _print_summary(found, summary)
    files = write_pages(summary, out, ["html", "md", "csv"], True)
    out_console().print(Text.assemble("Report: ", (str(files[0]), "bold")))


def _leads() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_summary(run: Run, summary: Summary) -> None:
    from vlm_budget.eval.report.words import mean

    table = Table(title=Text(f"{run.manifest['model']['name']}: the task's metric ± standard error"))
    table.add_column("method")
    for task in summary.tasks:
        table.add_column(Text(f"{task.name}\n{task.metric}"), justify="right")
    for cell in summary.cells:
        row = []
        for task in summary.tasks:
            one = summary.by_place.get((task.name, cell))
            row.append("–" if one is None or not one.main.n else mean(one.main))
        table.add_row(Text(str(cell)), *row)
    out_console().print(table)
    errors = sum(answer.error is not None for answer in run.answers)
    if errors:
        out_console().print(Text(f"{errors} of {len(run.answers)} answers are errors; see the report", "yellow"))
    for cell, reason in run.manifest.get("refused", {}).items():
        out_console().print(Text(f"left out: {cell}: {reason}", "dim"))


def read_summary(folder: Path, task_folders: Sequence[str] | None, times: bool) -> Summary:
    """Figures of a finished or unfinished run."""
    from vlm_budget.errors import UnknownNameError
    from vlm_budget.eval.store import read_run
    from vlm_budget.eval.summary import summarise
    from vlm_budget.eval.task import add_folder

    for path in task_folders or ():
        add_folder(path)
    found = read_run(folder)
    try:
        return summarise(found, times=times)
    except UnknownNameError as error:
        # A folder of results may come from anybody, so code that it names is not run unasked.
        raise UnknownNameError(f"{error} A task of your own is found with --task-folder.") from error


def read_config(folder: Path) -> Mapping[str, Any]:
    """The configuration in a run's manifest.

    Raises:
        RunError: There is no run, or its manifest is damaged.
    """
    from vlm_budget.eval.store import read_manifest

    config: Mapping[str, Any] = read_manifest(folder)["config"]
    return config


def shared_tasks(summary: Summary, *cells: Cell) -> list[Task]:
    """Tasks with samples that all of some cells answered; of an unfinished run not all tasks may have any."""
    done = {(one.task, one.sample, one.cell) for one in summary.run.answers if one.error is None}
    names = {task for task, sample, _ in done if all((task, sample, cell) in done for cell in cells)}
    return [task for task in summary.tasks if task.name in names]


def write_pages(summary: Summary, out: Path, formats: Sequence[str], times: bool) -> list[Path]:
    """Write a run's report; the files written."""
    from vlm_budget.eval.report import write_report

    return write_report(summary, out, formats=tuple(formats), times=times)


def words(text: str | None) -> list[str] | None:
    """Words between commas; None where nothing was given."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def method_words(text: str | None) -> list[str] | None:
    """Methods between commas; None where nothing was given."""
    if text is None:
        return None
    from vlm_budget.eval.cells import split_methods

    return split_methods(text)


def data_places(entries: Sequence[str] | None) -> dict[str, str]:
    """``TASK=FOLDER`` entries as a mapping.

    Raises:
        OptionError: One is not written so.
    """
    from vlm_budget.errors import OptionError

    found = {}
    for entry in entries or ():
        task, equals, place = entry.partition("=")
        if not equals or not task or not place:
            raise OptionError(f"--data {entry!r}: write TASK=FOLDER, TASK=hub or TASK=hub:NAME")
        found[task.strip()] = place.strip()
    return found


def plain(value: Any) -> str:
    """Nested plain data as lines."""
    if isinstance(value, dict):
        return "\n".join(f"{name}: {plain(one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
