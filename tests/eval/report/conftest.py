"""A run made by hand, a hostile one, and ways to look into what was written."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import pytest

from synthetic_run import add_regressions, answers, make_run, manifest, times
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.report import write_report
from vlm_budget.eval.store import Answer, Run
from vlm_budget.eval.summary import Summary, summarise
from vlm_budget.eval.task import read_task

HOSTILE = (
    "<script>window.pwned=1</script>",
    "</style></title></textarea><script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "' onload='window.pwned=1' x='",
    "javascript:window.pwned=1",
    "</text></svg><svg onload=window.pwned=1>",
    "]]><!-- --><?php --!>",
    "a\x00b\x07\x1b[31m\x85c",
    "\u202egnp.exe \u2066x\u2069 \ufeff",
    "half \ud800 of a pair, \ufffe and \U0001ffff",
    "one\u2028two\r\nthree\rfour\tfive",
    "| a | `b` | **c** | [d](javascript:e) | ![f](http://evil.example/g.png) | <http://evil.example>",
    "http://evil.example/x.png www.evil.example",
    '=HYPERLINK("http://evil.example")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "&lt;b&gt; &amp;&#60;",
    "w" * 3000,
)


@pytest.fixture(scope="session")
def summary(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarise(make_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="session")
def report(summary: Summary) -> Path:
    """Folder of a report with regressions and pictures."""
    folder = summary.run.folder
    add_regressions(folder)
    write_report(summary, folder)
    return folder


def hostile_summary(folder: Path, text: str) -> Summary:
    """A run in which every text is hostile: names of model, task, metric, methods, samples, costs, answers, errors."""
    task = replace(read_task("nano_count"), name=text, title=text, metric=text, reads_text=True)
    columns = [Cell(), Cell("random", "0.4"), Cell("random", text), Cell(text, "0.4"), Cell(text, text)]
    place = {column: Cell(column.methods, "0.4") if column.budget == text else column for column in columns}
    known = {one: answers("nano_count", [place[one]], 8) for one in columns}
    found: list[Answer] = []
    for column, given in known.items():
        for one in given:
            error = None if one.error is None else text
            scores = dict.fromkeys([text, f"extra {text}"], one.scores["accuracy"]) if one.scores else {}
            cost = {**one.cost, f"odd {text}": 1.5} if one.cost else {}
            found.append(Answer(text, f"{one.sample} {text}", column, one.cluster, text, scores, cost, {}, error))
    clocks = [replace(clock, task=text) for clock in times("nano_count", columns[:2], 8)]
    said = manifest(columns, 8, tasks={text: task.version}, samples={text: 8}, data={text: text}, created=text)
    said["model"] = dict.fromkeys(said["model"], text)
    said["options"] = {text: text}
    said["environment"] = {"date": text, "git": text, "device": text, "threads": text, "versions": {text: text}}
    return summarise(Run(folder, said, tuple(found), tuple(clocks)), [task])


def parse(text: str) -> Element:
    """A page's elements; any fault of the page raises."""
    parser = html5lib.HTMLParser(tree=html5lib.getTreeBuilder("etree"), strict=True, namespaceHTMLElements=False)
    found: Element = parser.parse(text)
    return found


def elements(root: Element) -> Iterator[tuple[str, dict[str, str]]]:
    """Names without namespace, and attributes."""
    for one in root.iter():
        if isinstance(one.tag, str):
            yield one.tag.rpartition("}")[2], {str(name): value for name, value in one.attrib.items()}


def text_of(root: Element) -> str:
    """All that can be read on a page, the style apart."""
    for style in list(root.iter("style")):
        style.text = ""
    return " ".join("".join(root.itertext()).split())
