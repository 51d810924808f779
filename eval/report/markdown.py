"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlm_budget.eval.markdown import table as rows_of
from vlm_budget.eval.report import facts, tables
from vlm_budget.eval.report.regressions import Regression
from vlm_budget.eval.report.tables import BADGES, LONGEST, Line, Table
from vlm_budget.eval.report.words import clean, escape_markdown
from vlm_budget.eval.summary import Summary

_LONGEST = 600


def markdown_text(summary: Summary, regressions: Sequence[Regression], times: bool) -> str:
    """The page."""
    return "\n\n".join(_parts(summary, regressions, times)) + "\n"


def _parts(summary: Summary, regressions: Sequence[Regression], times: bool) -> Iterator[str]:
    known = facts.facts(summary, times)
    yield f"# Evaluation of {escape_markdown(clean(facts.model_name(summary), 200))}"
    yield "## What was run"
    yield rows_of(("", ""), [(escape_markdown(name), escape_markdown(value)) for name, value in known], left=2)
    yield "## Beware"
    for one in facts.footguns(summary, times):
        cases = "".join(f"\n  * {escape_markdown(case)}" for case in one.cases)
        yield f"* **{escape_markdown(one.title)}.** {escape_markdown(one.text)}{cases}"
    yield "## At a glance"
    yield _table(tables.headline(summary))
    yield "## At equal cost"
    costs = ("prefill_ms", "flops") if times else ("flops",)
    equal = [tables.equal_cost(summary, task, cost) for task in summary.tasks for cost in costs]
    yield from _tables(equal, "No method was measured on both sides of 20 %, 40 % or 60 % of any cost.")
    yield "## Tasks"
    yield from _tables([tables.task_table(summary, task, times) for task in summary.tasks], "")
    yield "## Paired comparisons"
    pairs = [make(summary, task) for task in summary.tasks for make in (tables.paired, tables.rivals)]
    yield from _tables(pairs, "There is nothing to compare.")
    yield "## Worst regressions"
    yield from map(_regression, regressions)
    if not regressions:
        yield "No sample that the unpatched model answered right was answered wrong."
    yield "## Errors"
    yield from _tables([tables.errors(summary)], "Every sample has an answer.")


def _tables(found: Sequence[Table | None], otherwise: str) -> Iterator[str]:
    there = [one for one in found if one is not None]
    yield from map(_table, there)
    if not there:
        yield otherwise


def _table(one: Table) -> str:
    rows = [["<br>".join(map(_line, cell)) for cell in row] for row in one.rows]
    return (
        f"{escape_markdown(one.caption)}:\n\n{rows_of([escape_markdown(name) for name in one.header], rows, one.left)}"
    )


def _line(line: Line) -> str:
    text = escape_markdown(clean(line.text, LONGEST))
    return f"**{text}**" if text and (line.tone == "best" or line.tone in BADGES) else text


def _regression(one: Regression) -> str:
    said = [
        ("Asked", one.prompt),
        ("Right", one.reference),
        ("Unpatched", one.unpatched),
        (str(one.cell), one.answer),
        ("Picture", one.missing),
    ]
    lines = [f"* {escape_markdown(f'{one.task}, sample {clean(one.sample, 200)}')}"]
    lines += [
        f"  * {escape_markdown(name)}: {escape_markdown(clean(text, _LONGEST))}"
        for name, text in said
        if text is not None
    ]
    return "\n".join(lines)
