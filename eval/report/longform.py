"""Every figure of a run as a row of a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator

from vlm_budget.eval.report.tables import cost_names
from vlm_budget.eval.report.words import escape_csv
from vlm_budget.eval.statistics import Comparison
from vlm_budget.eval.summary import Result, Summary

COLUMNS = ("task", "task_version", "methods", "budget", "kind", "figure", "value", "se", "low", "high", "p", "n")
Row = tuple[str, str, float, float | None, float | None, float | None, float | None, int | None]


def csv_text(summary: Summary, times: bool) -> str:
    """One row per task, cell and figure: figures, differences, costs, their shares of unpatched, errors by reason."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    versions = {task.name: task.version for task in summary.tasks}
    metrics = {task.name: task.metric for task in summary.tasks}
    for one in summary.results:
        place = [one.task, str(versions[one.task]), one.cell.methods, one.cell.budget]
        for kind, figure, *numbers in _rows(one, metrics[one.task], times):
            writer.writerow([*map(escape_csv, [*place, kind, figure]), *map(_plain, numbers)])
    return out.getvalue()


def _rows(one: Result, metric: str, times: bool) -> Iterator[Row]:
    n = one.main.n
    yield "score", metric, one.main.mean, one.main.se, None, None, None, n
    for name, value in one.figures.items():
        if name != metric:
            yield "score", name, value, None, None, None, None, n
        elif abs(value - one.main.mean) > 1e-9:  # a summary under the metric's own name
            yield "score", f"{name} (as published)", value, None, None, None, None, n
    for name, found in (("minus_unpatched", one.minus_unpatched), ("minus_random", one.minus_random)):
        if found is not None:
            yield _difference(name, found)
    for name in cost_names(list(one.cost), times):
        yield "cost", name, one.cost[name], None, None, None, None, n
    for name in cost_names(list(one.share), times):
        yield "share", name, one.share[name], None, None, None, None, n
    for reason, count in sorted(one.errors.items()):
        yield "error", reason, count, None, None, None, None, None


def _difference(name: str, found: Comparison) -> Row:
    return "difference", name, found.difference, None, found.low, found.high, found.p, found.n


def _plain(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.10g}"
