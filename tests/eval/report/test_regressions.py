import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlm_budget.errors import RunError
from vlm_budget.eval.report import write_report
from vlm_budget.eval.report.regressions import find_regressions
from vlm_budget.eval.summary import Summary

from .conftest import parse, text_of

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (7).to_bytes(4, "big") + (5).to_bytes(4, "big") + b"secret"


def entry(**changes: Any) -> dict[str, Any]:
    names = ("task", "sample", "methods", "budget", "prompt", "reference", "unpatched_answer", "answer")
    return {**{name: f"a {name}" for name in names}, "picture": None, **changes}


def save(folder: Path, *entries: Any) -> Path:
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "regressions.json").write_text(json.dumps(entries))
    return folder


def test_a_picture_is_embedded_with_its_size(tmp_path: Path, summary: Summary) -> None:
    save(tmp_path, entry(picture="a.png"))
    (tmp_path / "pictures" / "a.png").write_bytes(PNG)
    (one,) = find_regressions(summary, tmp_path)
    assert (one.picture, one.size, one.missing) == (PNG, (7, 5), None)
    assert one.source.startswith("data:image/png;base64,iVBORw0KGgo")


@pytest.mark.parametrize(
    "name", ["../secret.png", "../pictures2/secret.png", "link.png", "linked/secret.png", "a\0.png", ".", "", "loop"]
)
def test_no_path_leaves_the_pictures(tmp_path: Path, summary: Summary, name: str) -> None:
    save(tmp_path, entry(picture=name))
    (tmp_path / "pictures2").mkdir()
    for place in (tmp_path, tmp_path / "pictures2"):
        (place / "secret.png").write_bytes(PNG)
    os.symlink(tmp_path / "secret.png", tmp_path / "pictures" / "link.png")
    os.symlink(tmp_path / "pictures2", tmp_path / "pictures" / "linked")
    os.symlink("loop", tmp_path / "pictures" / "loop")
    (one,) = find_regressions(summary, tmp_path)
    assert one.picture is None
    assert one.missing is not None
    write_report(summary, tmp_path, formats=("html",))
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_an_absolute_path_is_refused(tmp_path: Path, summary: Summary) -> None:
    save(tmp_path, entry(picture=str(tmp_path / "secret.png")))
    (tmp_path / "secret.png").write_bytes(PNG)
    assert find_regressions(summary, tmp_path)[0].picture is None


def test_pictures_that_are_a_link_elsewhere_are_refused(tmp_path: Path, summary: Summary) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "a.png").write_bytes(PNG)
    os.symlink(elsewhere, folder / "pictures")
    save(folder, entry(picture="a.png"))
    assert find_regressions(summary, folder)[0].picture is None


@pytest.mark.parametrize("data", [b"", b"<svg onload=alert(1)>" + b" " * 40, PNG[:20]])
def test_a_file_that_is_no_png_is_not_embedded(tmp_path: Path, summary: Summary, data: bytes) -> None:
    save(tmp_path, entry(picture="a.png"))
    (tmp_path / "pictures" / "a.png").write_bytes(data)
    (one,) = find_regressions(summary, tmp_path)
    assert one.picture is None
    assert "no PNG" in str(one.missing)


def test_a_pipe_is_not_waited_for(tmp_path: Path, summary: Summary) -> None:
    save(tmp_path, entry(picture="pipe.png"))
    os.mkfifo(tmp_path / "pictures" / "pipe.png")
    assert find_regressions(summary, tmp_path)[0].picture is None


@pytest.mark.parametrize("data", [b"{", b"{}", b"[1]", b"[{}]", b"\xff", b"[" * 100_000, b'[{"task": "x"}]'])
def test_a_damaged_list_is_refused_with_its_name(tmp_path: Path, summary: Summary, data: bytes) -> None:
    (tmp_path / "regressions.json").write_bytes(data)
    with pytest.raises(RunError, match="regressions.json"):
        write_report(summary, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_without_a_list_the_worst_answers_are_shown(tmp_path: Path, summary: Summary) -> None:
    found = find_regressions(summary, tmp_path)
    assert found
    scores = {(one.task, one.sample, one.cell): one.scores for one in summary.run.answers}
    for one in found:
        assert scores[one.task, one.sample, one.cell] == {"accuracy": 0.0}
        assert any(key[:2] == (one.task, one.sample) and key[2].unpatched for key in scores)
    assert len({(one.task, one.sample) for one in found}) == len(found)


def test_the_page_shows_questions_and_both_answers(tmp_path: Path, summary: Summary) -> None:
    save(tmp_path, entry(prompt="What\nis it?", reference=["a cat", "cat"], answer="", picture="gone.png"))
    write_report(summary, tmp_path, formats=("html",))
    text = text_of(parse((tmp_path / "report.html").read_text()))
    for said in ("Whatis it?", "a cat | cat", "a unpatched_answer", "empty", "picture 'gone.png' is missing"):
        assert said in text
