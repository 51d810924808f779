import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from synthetic_run import add_regressions, make_run
from vlm_budget.errors import OptionError, RunError
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.report import words, write_report
from vlm_budget.eval.summary import Summary, summarise

from .conftest import elements, parse, text_of

SECTIONS = ["run", "beware", "glance", "cost", "equal", "tasks", "paired", "regressions", "errors"]


def test_page_is_valid_and_loads_nothing(report: Path) -> None:
    page = (report / "report.html").read_text(encoding="utf-8")
    root = parse(page)
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)
    assert [one.attrib["id"] for one in root.iter("section")] == SECTIONS
    links = {attributes["href"] for name, attributes in elements(root) if name == "a"}
    assert links == {f"#{name}" for name in SECTIONS}


def test_every_table_scrolls_in_a_named_box_of_its_own(report: Path) -> None:
    root = parse((report / "report.html").read_text(encoding="utf-8"))
    boxes = [one for one in root.iter("div") if one.attrib.get("class") == "box"]
    assert len(boxes) == len(list(root.iter("table"))) > 8
    assert all(one.attrib["aria-label"] and one.attrib["tabindex"] == "0" for one in boxes)


def test_page_and_markdown_and_csv_hold_the_same_figures(summary: Summary, report: Path) -> None:
    page = text_of(parse((report / "report.html").read_text(encoding="utf-8")))
    markdown = (report / "report.md").read_text(encoding="utf-8").replace("\\", "")
    with (report / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    place = {(row["task"], row["methods"], row["budget"], row["kind"], row["figure"]): row for row in rows}
    assert len(place) == len(rows)
    for one in summary.results:
        key = (one.task, one.cell.methods, one.cell.budget)
        row = place[(*key, "score", "accuracy")]
        assert float(row["value"]) == pytest.approx(one.main.mean, abs=1e-9)
        assert float(row["se"]) == pytest.approx(one.main.se, abs=1e-9)
        assert words.mean(one.main) in page and words.mean(one.main) in markdown
        assert place[(*key, "error", "ImageError: picture 'page-29.png' is damaged")]["value"] == "1"
        if one.minus_random is not None:
            assert words.interval(one.minus_random) in page and words.interval(one.minus_random) in markdown
            assert float(place[(*key, "difference", "minus_random")]["low"]) == pytest.approx(one.minus_random.low)
        assert float(place[(*key, "share", "prefill_ms")]["value"]) == pytest.approx(one.share["prefill_ms"])


def test_page_says_what_was_run(report: Path) -> None:
    text = text_of(parse((report / "report.html").read_text(encoding="utf-8")))
    for said in (
        "LlavaNextForConditionalGeneration",
        "torch 2.8.0",
        "2a0500d1c3b5e7f9a1b3c5d7e9f1a3b5c7d9e1f3",
        "seed = 7",
        "1,021,440",
        "finished: 1,920 of 1,920 answers",
        "version 1, 60 samples",
        "unpatched; random, uniform, hired, divprune, fastv at 0.4, 0.2, 0.1",
    ):
        assert said in text


def test_without_times_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for number, created in enumerate(("2026-01-02T03:04:05+00:00", "2027-05-06T07:08:09+00:00")):
        folder = tmp_path / f"run {number}"
        run = make_run(folder, speed=1 + number, created=created)
        environment = {**run.manifest["environment"], "date": created}
        run = replace(run, manifest={**run.manifest, "environment": environment})
        add_regressions(folder)
        pages.append([path.read_bytes() for path in write_report(summarise(run), folder, times=False)])
    assert pages[0] == pages[1]
    for page in pages[0]:
        assert not re.search(rb"prefill_ms|measured prefill|[0-9] ms\b|milliseconds|2026", page.lower())


def test_with_times_the_same_run_gives_the_same_bytes(summary: Summary, report: Path, tmp_path: Path) -> None:
    add_regressions(tmp_path)
    for path in write_report(summary, tmp_path):
        assert path.read_bytes() == (report / path.name).read_bytes()


def test_only_what_is_asked_for_is_written(summary: Summary, tmp_path: Path) -> None:
    assert write_report(summary, tmp_path / "new", formats=("csv",)) == [tmp_path / "new" / "results.csv"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["results.csv"]


def test_an_unknown_format_is_refused(summary: Summary, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="pdf.*html, md, csv"):
        write_report(summary, tmp_path, formats=("html", "pdf"))


def test_a_folder_that_cannot_be_is_refused(summary: Summary, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write the report"):
        write_report(summary, tmp_path / "file")


@pytest.mark.parametrize("cells", [[Cell()], [Cell("hired", "0.2")], []])
def test_a_run_with_few_cells_has_a_valid_report(tmp_path: Path, cells: list[Cell]) -> None:
    run = make_run(tmp_path)
    said = [{"methods": cell.methods, "budget": cell.budget} for cell in cells]
    run = replace(
        run,
        manifest={**run.manifest, "cells": said},
        answers=tuple(one for one in run.answers if one.cell in cells),
        times=tuple(one for one in run.times if one.cell in cells),
    )
    for path in write_report(summarise(run), tmp_path):
        assert path.stat().st_size
    parse((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_run_of_errors_only_has_a_valid_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, samples=1)
    write_report(summarise(run), tmp_path)
    text = text_of(parse((tmp_path / "report.html").read_text(encoding="utf-8")))
    assert "no answers" in text
    assert "every method" in text


def test_a_manifest_with_nothing_but_tasks_and_cells_has_a_valid_report(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    bare = {name: run.manifest[name] for name in ("version", "tasks", "cells")}
    write_report(summarise(replace(run, manifest=bare)), tmp_path)
    assert "1,920 answers" in text_of(parse((tmp_path / "report.html").read_text(encoding="utf-8")))
