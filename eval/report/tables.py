"""The tables of a report, as plain data: HTML and Markdown show the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from vlm_budget.eval.cells import Cell
from vlm_budget.eval.report import words
from vlm_budget.eval.statistics import Comparison, paired_bootstrap
from vlm_budget.eval.store import Answer
from vlm_budget.eval.summary import COSTS, Result, Summary
from vlm_budget.eval.task import Task

Tone = Literal["plain", "quiet", "best", "up", "down", "beats", "loses", "even"]
BADGES: tuple[Tone, ...] = ("beats", "loses", "even")
COST_TITLES = {
    "text": "text tokens",
    "visual": "visual tokens",
    "kept": "visual tokens that enter",
    "mean_kept": "visual tokens per layer",
    "new": "new tokens",
    "flops": "FLOPs of the prompt",
    "kv_bytes": "KV cache of the prompt",
    "prefill_ms": "prefill with choosing",
}
LONGEST = 300  # characters of a line
_RIVALS = 3


@dataclass(frozen=True)
class Line:
    """One line of a table's cell.

    Attributes:
        text: What it says.
        tone: How it is shown; a badge for those of ``BADGES``.
        interval: Drawn behind the text where pictures can be.
    """

    text: str
    tone: Tone = "plain"
    interval: Comparison | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it shows.
        header: Names of the columns.
        rows: Their cells, each of some lines.
        left: How many columns are names; the others are figures.
        stacked: Cells hold several lines that belong together.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Sequence[Line]]]
    left: int = 1
    stacked: bool = False


def plain(text: str) -> tuple[Line, ...]:
    """A cell of one line."""
    return (Line(text),)


def cost_names(names: Sequence[str], times: bool) -> list[str]:
    """Costs in the order in which they are shown, without measured times if so wished."""
    found = dict.fromkeys(names)
    first = [name for name in COST_TITLES if name in found]
    return [name for name in [*first, *sorted(set(found) - set(first))] if times or not name.endswith("_ms")]


def cost_title(name: str) -> str:
    """A cost for people."""
    return COST_TITLES.get(name) or (f"{name[:-3]}, ms" if name.endswith("_ms") else name)


def results_of(summary: Summary, task: Task) -> list[Result]:
    """A task's results in the order of the cells."""
    return [one for one in summary.results if one.task == task.name]


def against_random(result: Result) -> Line | None:
    """Whether a method is worth more than random tokens: its 95 % interval lies on one side of nothing, or does not."""
    found = result.minus_random
    if found is None or not math.isfinite(found.difference):
        return None
    if found.high < 0:
        return Line("loses to random", "loses")
    return Line("beats random", "beats") if found.low > 0 else Line("not told apart", "even")


def headline(summary: Summary) -> Table:
    """Every cell on every task."""
    rows = []
    for cell in summary.cells:
        row: list[Sequence[Line]] = [plain(str(cell))]
        for task in summary.tasks:
            result = summary.by_place.get((task.name, cell))
            row.append(plain(words.NONE) if result is None else tuple(_headline(result)))
        rows.append(row)
    header = ["method", *(f"{task.name}: {task.metric}" for task in summary.tasks)]
    return Table("Mean with standard error; below, paired differences with 95 % intervals", header, rows, stacked=True)


def _headline(result: Result) -> Iterator[Line]:
    if not result.main.n:
        yield Line("no answers", "quiet")
        return
    yield Line(words.mean(result.main), "best")
    if (badge := against_random(result)) is not None:
        yield badge
    if result.minus_unpatched is not None:
        yield Line(f"{words.interval(result.minus_unpatched)} to unpatched", "quiet")
    if result.minus_random is not None:
        yield Line(f"{words.interval(result.minus_random)} to random", _direction(result.minus_random))


def _direction(found: Comparison) -> Tone:
    return "down" if found.high < 0 else "up" if found.low > 0 else "quiet"


def task_table(summary: Summary, task: Task, times: bool) -> Table:
    """All figures and costs of a task."""
    results = results_of(summary, task)
    figures = list(dict.fromkeys([task.metric, *(name for one in results for name in one.figures)]))
    costs = cost_names([name for one in results for name in one.cost], times)
    rows = []
    for one in results:
        row = [plain(str(one.cell))]
        for name in figures:
            value = words.mean(one.main) if name == task.metric and one.main.n else words.number(one.figures.get(name))
            row.append(plain(value))
            summed = one.figures.get(name)
            if name == task.metric and summed is not None and abs(summed - one.main.mean) > 1e-9:
                row[-1] = (*row[-1], Line(f"as published: {words.number(summed)}", "quiet"))
        row += [plain(str(one.main.n)), plain(str(sum(one.errors.values())))]
        for name in costs:
            lines = [Line(words.cost(name, one.cost[name]) if name in one.cost else words.NONE)]
            if name in one.share and not one.cell.unpatched:
                lines.append(Line(words.percent(one.share[name]), "quiet"))
            row.append(tuple(lines))
        rows.append(row)
    header = ["method", *figures, "samples", "errors", *map(cost_title, costs)]
    return Table(
        f"{task.title} ({task.name}): all figures, and costs per prompt with their share of unpatched", header, rows
    )


def equal_cost(summary: Summary, task: Task, cost: str, shares: Sequence[float] = (0.2, 0.4, 0.6)) -> Table | None:
    """Methods where they cost the same; None where no method reaches any of the shares."""
    found = summary.at_equal_cost(task.name, cost, shares)
    columns = zip(*found.rows.values(), strict=True)
    best = [max((value for value in column if value is not None), default=None) for column in columns]
    if all(value is None for value in best):
        return None
    rows = []
    for methods, values in found.rows.items():
        marked = (value is not None and value == top for value, top in zip(values, best, strict=True))
        cells = (
            (Line(words.number(value), "best" if top else "plain"),) for value, top in zip(values, marked, strict=True)
        )
        rows.append([plain(methods), *cells])
    header = ["method", *(f"at {words.percent(share)}" for share in found.shares)]
    return Table(f"{task.name}: {task.metric} at equal {COSTS[cost]}, share of unpatched", header, rows)


def paired(summary: Summary, task: Task) -> Table | None:
    """Every method against the baselines on the same samples; None where there is nothing to compare."""
    rows = []
    for one in results_of(summary, task):
        if one.minus_unpatched is None and one.minus_random is None:
            continue
        row = [plain(str(one.cell))]
        for found in (one.minus_unpatched, one.minus_random):
            if found is None or not found.n:
                row += [plain(words.NONE)] * 2
            else:
                row += [(Line(words.interval(found), _direction(found), found),), plain(_chance(found.p))]
        badge = against_random(one)
        row.append(plain(words.NONE) if badge is None else (badge,))
        rows.append(row)
    header = ["method", "minus unpatched", "p", "minus random", "p", "verdict"]
    return (
        Table(f"{task.name}: paired differences in {task.metric} with 95 % intervals", header, rows) if rows else None
    )


def rivals(summary: Summary, task: Task) -> Table | None:
    """The strongest method at every budget against those that come next; None where no budget has two."""
    answers: dict[Cell, dict[str, Answer]] = {}
    for answer in summary.run.answers:
        if answer.task == task.name and answer.error is None and task.metric in answer.scores:
            answers.setdefault(answer.cell, {})[answer.sample] = answer
    by_budget: dict[str, list[Result]] = {}
    for one in results_of(summary, task):
        if not one.cell.unpatched and one.main.n:
            by_budget.setdefault(words.budget(one.cell), []).append(one)
    rows = []
    for budget, results in by_budget.items():
        first, *others = sorted(results, key=lambda one: -one.main.mean)
        for other in others[:_RIVALS]:
            found = _compare(answers.get(first.cell, {}), answers.get(other.cell, {}), task.metric)
            if found is not None:
                told = Line("stronger", "beats") if found.low > 0 else Line("not told apart", "even")
                line = Line(words.interval(found), _direction(found), found)
                names = (first.cell.methods, other.cell.methods)
                rows.append([plain(budget), *map(plain, names), (line,), plain(_chance(found.p)), (told,)])
    header = ["budget", "strongest", "against", "difference", "p", "verdict"]
    return (
        Table(f"{task.name}: the strongest method at every budget, and the next ones", header, rows, 3)
        if rows
        else None
    )


def _compare(first: dict[str, Answer], second: dict[str, Answer], metric: str) -> Comparison | None:
    both = [name for name in first if name in second]
    if not both:
        return None
    left, right = ([side[name].scores[metric] for name in both] for side in (first, second))
    return paired_bootstrap(left, right, [first[name].cluster for name in both])


def _chance(p: float) -> str:
    return words.NONE if not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def errors(summary: Summary) -> Table | None:
    """Samples without an answer, by reason; None where every sample has one."""
    found: dict[tuple[str, str], dict[Cell, int]] = {}
    for one in summary.results:
        for reason, count in one.errors.items():
            found.setdefault((one.task, reason), {})[one.cell] = count
    rows = []
    for (task, reason), cells in sorted(found.items(), key=lambda item: (-sum(item[1].values()), item[0])):
        where = "every method" if len(cells) == len(summary.cells) else ", ".join(map(str, cells))
        row = (task, words.clean(reason, 300), words.clean(where, 300), str(sum(cells.values())))
        rows.append([plain(text) for text in row])
    return Table("Answers that are missing, and why", ["task", "reason", "where", "answers"], rows, 3) if rows else None
