"""No text of a dataset, a model or a configuration becomes markup, a script, a link, a formula or a request."""

import csv
import json
import re
from pathlib import Path

import html5lib
import pytest
from markdown_it import MarkdownIt

from vlm_budget.eval.report import write_report
from vlm_budget.eval.report.words import clean

from .conftest import HOSTILE, elements, hostile_summary, parse, text_of

PAGE = re.compile(
    "html|head|body|meta|title|style|header|nav|main|footer|section|article|figure|figcaption|div|p|h1|h2|h3|ul|li|a|b|i"
    "|bdi|span|br|dl|dt|dd|table|thead|tbody|tr|th|td|details|summary|img|svg|g|path|text"
)
MARKDOWN = re.compile("DOCUMENT_FRAGMENT|h1|h2|ul|li|p|strong|table|thead|tbody|tr|th|td|br")
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\u2028\u2029\ufffe\uffff]")


@pytest.fixture(scope="module", params=range(len(HOSTILE)), ids=[ascii(text[:24]) for text in HOSTILE])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    text = HOSTILE[request.param]
    folder = tmp_path_factory.mktemp("hostile")
    entry = dict.fromkeys(
        ("task", "sample", "methods", "budget", "prompt", "reference", "unpatched_answer", "answer", "picture"), text
    )
    (folder / "regressions.json").write_text(json.dumps([entry]))
    write_report(hostile_summary(folder, text), folder)
    return text, folder


def test_page_is_valid_and_holds_no_script_link_or_resource(written: tuple[str, Path]) -> None:
    page = (written[1] / "report.html").read_text(encoding="utf-8")
    assert not UNSEEN.search(page)
    for name, attributes in elements(parse(page)):
        assert PAGE.fullmatch(name), name
        assert not [one for one in attributes if one.lower().startswith("on") or one in ("style", "srcset")]
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")


def test_page_shows_the_text_as_it_is(written: tuple[str, Path]) -> None:
    root = parse((written[1] / "report.html").read_text(encoding="utf-8"))
    (heading,) = root.iter("h1")
    shown = "".join(heading.itertext())
    assert shown == clean(written[0], 200)
    assert shown in text_of(root).replace(shown, "", 1)  # and elsewhere


def test_the_style_is_the_same_whatever_is_shown(written: tuple[str, Path]) -> None:
    (style,) = parse((written[1] / "report.html").read_text(encoding="utf-8")).iter("style")
    assert not re.search(r"url\(|@import|https?:|expression|evil|pwned|www", style.text or "")


def test_markdown_holds_no_markup_but_its_own(written: tuple[str, Path]) -> None:
    text = (written[1] / "report.md").read_text(encoding="utf-8")
    assert not UNSEEN.search(text)
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    names = {name for name, _ in elements(html5lib.parseFragment(rendered, namespaceHTMLElements=False))}
    assert [name for name in names if not MARKDOWN.fullmatch(name)] == []
    assert not re.search(r"https?://|www\.", text)  # GitHub makes links of bare addresses


def test_markdown_tables_keep_their_columns(written: tuple[str, Path]) -> None:
    widths: list[int] = []
    for line in (written[1] / "report.md").read_text(encoding="utf-8").splitlines():
        width = len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) if line.startswith("|") else 0
        if width and widths and widths[-1]:
            assert width == widths[-1], line[:200]
        widths.append(width)
    assert max(widths) > 5


def test_csv_holds_no_formula(written: tuple[str, Path]) -> None:
    with (written[1] / "results.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert rows
    for row in rows:
        assert len(row) == len(header)
        for name, value in zip(header, row, strict=True):
            if name in ("task", "methods", "budget", "kind", "figure"):
                assert value.lstrip()[:1] not in tuple("=+-@"), value[:80]
            else:
                assert not value or float(value) is not None
