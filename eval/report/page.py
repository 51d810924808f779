"""The report as one HTML file: no script, no network, no other file.

Everything is made by :func:`vlm_budget.eval.report.words.element`, which escapes whatever is not markup already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files

from vlm_budget.eval.report import facts, plots, tables
from vlm_budget.eval.report.regressions import Regression
from vlm_budget.eval.report.tables import BADGES, LONGEST, Line, Table
from vlm_budget.eval.report.words import Html, clean, element
from vlm_budget.eval.summary import Summary

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # what must never run cannot run either
_LONGEST, _OPEN = 1500, 6


def html_text(summary: Summary, regressions: Sequence[Regression], times: bool) -> str:
    """The page."""
    known = facts.facts(summary, times)
    name = facts.model_name(summary)
    sections: list[tuple[str, str, Callable[[], Iterator[Html]]]] = [
        ("run", "What was run", lambda: _facts(known)),
        ("beware", "Beware", lambda: _footguns(summary, times)),
        ("glance", "At a glance", lambda: _headline(summary)),
        ("cost", "Score against cost", lambda: _pareto(summary, times)),
        ("equal", "At equal cost", lambda: _equal(summary, times)),
        ("tasks", "Tasks", lambda: _tables([tables.task_table(summary, task, times) for task in summary.tasks])),
        ("paired", "Paired comparisons", lambda: _paired(summary)),
        ("regressions", "Worst regressions", lambda: _regressions(regressions)),
        ("errors", "Errors", lambda: _tables([tables.errors(summary)], "Every sample has an answer.")),
    ]
    style = files("vlm_budget.eval.report").joinpath("page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{clean(name, 120)} – vlm-budget evaluation"),
        element("style", Html(style + plots.highlights(summary))),
    )
    links = [element("a", title, href=f"#{anchor}") for anchor, title, _ in sections]
    body = element(
        "body",
        _header(summary, name, dict(known), times),
        element("nav", *links, aria_label="Sections"),
        element("main", *(_section(anchor, title, make()) for anchor, title, make in sections)),
        element("footer", element("p", "Made by vlm-budget. The same figures: report.md, results.csv.")),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _section(anchor: str, title: str, parts: Iterator[Html]) -> Html:
    return element("section", element("h2", title), *parts, id=anchor)


def _header(summary: Summary, name: str, known: dict[str, str], times: bool) -> Html:
    state = facts.progress(summary)
    methods = {cell.methods for cell in summary.cells if not cell.unpatched}
    losing, slow = facts.losing(summary), facts.slow(summary)
    part = sum(not cell.unpatched for cell in summary.cells)
    wanted = "" if state.expected is None else f"of {state.expected:,} answers: {state.word}"
    cards = [
        _card(f"{state.answers:,}", wanted or "answers", "good" if state.finished else "bad"),
        _card(str(len(methods)), f"method{'s' * (len(methods) != 1)} in {part} cells"),
        _card(str(len(summary.tasks)), f"task{'s' * (len(summary.tasks) != 1)}"),
        _card(f"{state.errors:,}", "answers failed", "bad" if state.errors else "good"),
        _card(str(len(losing)), "cells lose to random", "bad" if losing else "good"),
    ]
    if times:
        cards.append(_card(str(len(slow)), "cells are not faster", "bad" if slow else "good"))
    line = " · ".join(known[one] for one in ("device", "precision", "started") if one in known)
    return element(
        "header",
        element("p", "vlm-budget evaluation", class_="brow"),
        element("h1", element("bdi", clean(name, 200))),
        element("p", clean(line, 300), class_="under"),
        element("ul", *cards, class_="cards"),
    )


def _card(figure: str, text: str, tone: str = "plain") -> Html:
    return element("li", element("b", figure), " ", element("span", text), class_=tone)


def _facts(known: Sequence[tuple[str, str]]) -> Iterator[Html]:
    yield element("dl", *(_pair(name, value) for name, value in known), class_="facts")


def _pair(name: str, value: str, kind: str | None = None) -> Html:
    return element("div", element("dt", name, dir="auto"), element("dd", value, dir="auto"), class_=kind)


def _footguns(summary: Summary, times: bool) -> Iterator[Html]:
    entries = []
    for one in facts.footguns(summary, times):
        parts = [element("h3", one.title), element("p", one.text)]
        if one.cases:
            listed = element("ul", *(element("li", case, dir="auto") for case in one.cases))
            count = element("summary", f"{len(one.cases)} cases")
            parts.append(element("details", count, listed) if len(one.cases) > _OPEN else listed)
        entries.append(element("div", *parts, class_="grave" if one.grave else "note"))
    yield element("div", *entries, class_="footguns")


def _headline(summary: Summary) -> Iterator[Html]:
    yield element(
        "p",
        "A method beats random tokens at the same budget where the 95 % interval of their paired difference lies above "
        "zero, loses to them where it lies below, and is not told apart where it holds zero.",
    )
    yield _table(tables.headline(summary))


def _pareto(summary: Summary, times: bool) -> Iterator[Html]:
    drawn = [(task, plots.costs_of(summary, task, times)) for task in summary.tasks]
    if not any(costs for _, costs in drawn):
        yield element("p", "There is no unpatched model in this run, so costs have no share of it to be drawn against.")
        return
    yield element("p", "Costs are shares of the unpatched model's on the same samples; bars are standard errors.")
    groups = [plots.key(summary)]
    for task, costs in drawn:
        if costs:
            pictures = [element("div", plots.pareto(summary, task, cost)) for cost in costs]
            title = element("h3", f"{task.title} ({task.name})", dir="auto")
            groups += [title, element("div", *pictures, class_="plots")]
    yield element("div", *groups, class_="pareto")


def _equal(summary: Summary, times: bool) -> Iterator[Html]:
    yield element(
        "p",
        "Between the measured budgets on a straight line; outside of them nothing is said. "
        "The best of a column is bold, which is no test: see the paired comparisons.",
    )
    costs = ("prefill_ms", "flops") if times else ("flops",)
    found = [tables.equal_cost(summary, task, cost) for task in summary.tasks for cost in costs]
    yield from _tables(found, "No method was measured on both sides of 20 %, 40 % or 60 % of any cost.", "pairs")


def _paired(summary: Summary) -> Iterator[Html]:
    yield element(
        "p",
        "On the samples that both answered, from 2,000 bootstrap draws of whole clusters. 'vlm-budget eval compare' "
        "gives any other pair. The strongest of a budget was picked on the same samples, which flatters it.",
    )
    found = [make(summary, task) for task in summary.tasks for make in (tables.paired, tables.rivals)]
    yield from _tables(found, "There is nothing to compare.")


def _tables(found: Sequence[Table | None], otherwise: str = "", kind: str | None = None) -> Iterator[Html]:
    there = [_table(one) for one in found if one is not None]
    if there:
        yield element("div", *there, class_=kind)
    else:
        yield element("p", otherwise)


def _table(one: Table) -> Html:
    bounds = [plots.bound([line.interval for row in one.rows for line in row[i]]) for i in range(len(one.header))]
    header = [element("th", name, scope="col", class_=_kind(i, one)) for i, name in enumerate(one.header)]
    rows, before = [], ""
    for row in one.rows:
        first = row[0][0].text.rpartition(" at ")[0] or row[0][0].text
        cells = [
            element("td" if i else "th", *_lines(cell, bounds[i]), class_=_kind(i, one), scope=None if i else "row")
            for i, cell in enumerate(row)
        ]
        rows.append(element("tr", *cells, class_="new" if first != before else None))
        before = first
    body = element(
        "table",
        element("thead", element("tr", *header)),
        element("tbody", *rows),
        class_="stacked" if one.stacked else None,
    )
    box = element("div", body, class_="box", tabindex=0, role="region", aria_label=one.caption)
    return element("figure", element("figcaption", one.caption, dir="auto"), box)


def _kind(column: int, one: Table) -> str | None:
    return "name" if column < one.left else None


def _lines(cell: Sequence[Line], bound: float) -> list[Html]:
    found = []
    for line in cell:
        kind = f"badge {line.tone}" if line.tone in BADGES else f"line {line.tone}"
        found.append(element("span", clean(line.text, LONGEST), class_=kind))
        if line.interval is not None:
            found.append(plots.whisker(line.interval, bound))
    return found


def _regressions(found: Sequence[Regression]) -> Iterator[Html]:
    if not found:
        yield element("p", "No sample that the unpatched model answered right was answered wrong.")
        return
    text = "The unpatched model was right, the method was not."
    text += " Pictures show what it kept." if any(one.picture for one in found) else ""
    text += " The run kept neither questions nor pictures." if all(one.prompt is None for one in found) else ""
    yield element("p", text)
    yield element("div", *map(_regression, found), class_="regressions")


def _regression(one: Regression) -> Html:
    parts = [element("h3", f"{clean(one.task, 80)}, sample {clean(one.sample, 200)}", dir="auto")]
    if one.picture is not None:
        width, height = one.size
        alt = f"What {clean(str(one.cell), 80)} kept of sample {clean(one.sample, 200)}"
        parts.append(element("img", src=one.source, alt=alt, width=width, height=height, loading="lazy"))
    elif one.missing is not None:
        parts.append(element("p", clean(one.missing, 300), class_="missing"))
    said = [
        ("asked", one.prompt, None),
        ("right", one.reference, None),
        ("unpatched", one.unpatched, "was-right"),
        (clean(str(one.cell), 80), one.answer, "was-wrong"),
    ]
    texts = [_pair(name, _shown(text), kind) for name, text, kind in said if text is not None]
    return element("article", *parts, element("dl", *texts, class_="said"))


def _shown(text: str) -> Html:
    """Line ends of a question or an answer are its own."""
    whole = clean(text, _LONGEST, lines=True)
    if not whole.strip():
        return element("i", "empty" if not whole else "white space")
    return Html(element("span", *(part for part in _broken(whole))))


def _broken(text: str) -> Iterator[Html | str]:
    for number, line in enumerate(text.split("\n")):
        if number:
            yield element("br")
        yield line
