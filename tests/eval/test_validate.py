"""A dataset looked through without a model: every fault is counted, and the first of them are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from poster_task import TASKS, write_posters, write_records
from vlm_budget.errors import DataError
from vlm_budget.eval import task as task_module
from vlm_budget.eval.config import EvalConfig
from vlm_budget.eval.sample import Clip, Picture, Sample
from vlm_budget.eval.task import FOLDERS
from vlm_budget.eval.validate import _fault, look_through


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that a test names are gone after it."""
    monkeypatch.setattr(task_module, "FOLDERS", FOLDERS[:1])


@pytest.fixture
def posters(tmp_path: Path) -> Path:
    """Twelve questions on two pages."""
    write_posters(tmp_path / "posters", 2)
    return tmp_path / "posters"


def records(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def looked(folder: Path, pictures: bool = True, **changes: Any) -> dict[str, Any]:
    given = {"model": "none", "tasks": ["posters"], "data": {"posters": str(folder)}, "task_folders": [str(TASKS)]}
    found = look_through(EvalConfig.of({**given, **changes}), pictures)
    assert list(found) == ["posters"]
    return found["posters"]


def test_a_good_dataset_has_no_faults(posters: Path) -> None:
    assert looked(posters) == {"samples": 12, "broken": 0, "faults": []}
    assert looked(posters, limit=5) == {"samples": 5, "broken": 0, "faults": []}


def test_every_fault_is_named(posters: Path) -> None:
    good = records(posters)
    page = (posters / "pages" / "0.png").read_bytes()
    (posters / "pages" / "torn.png").write_bytes(page[: len(page) // 2])
    bad = {
        "gone": {"page": "gone.png"},
        "torn": {"page": "torn.png"},
        "folder": {"page": "."},
        "long": {"page": "n" * 5000},
        good[0]["id"]: {},
    }
    made = [{**good[0], "id": name, **change} for name, change in bad.items()]
    write_records(posters, [*good, *made, {**good[1], "page": "../../secret.png"}, {"answer": "x"}])
    with (posters / "questions.jsonl").open("a") as file:
        file.write("{cut\n")
    found = looked(posters)
    assert (found["samples"], found["broken"]) == (20, 8)
    said = dict(fault.split(": ", 1) for fault in found["faults"])
    assert len(said) == 8
    for name, words in {
        "gone": "there is no file",
        "torn": "damaged or truncated",
        "folder": "is a directory",
        "long": "cannot be read",
        f"{good[0]['id']} #2": "its id stands twice",
        "record 17": "leads out of the data folder",
        "record 18": "the record has no question",
        "questions.jsonl line 20": "no record",
    }.items():
        assert words in said[name]


def test_without_pictures_only_records_are_read(posters: Path) -> None:
    (posters / "pages" / "0.png").unlink()
    (posters / "pages" / "1.png").write_bytes(b"x")
    assert looked(posters)["broken"] == 12
    assert looked(posters, pictures=False) == {"samples": 12, "broken": 0, "faults": []}


def test_of_many_faults_all_are_counted_and_the_first_are_said(posters: Path) -> None:
    write_records(posters, [{"id": str(number)} for number in range(50)])
    found = looked(posters)
    assert (found["samples"], found["broken"], len(found["faults"])) == (50, 50, 20)
    assert found["faults"][0].startswith("record 0: ")


def test_a_missing_dataset_is_refused(posters: Path) -> None:
    (posters / "questions.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds none of questions\.jsonl"):
        looked(posters)
    with pytest.raises(DataError, match="needs its dataset"):
        looked(posters, data={})


def test_a_task_made_on_the_spot_is_looked_through() -> None:
    found = look_through(EvalConfig("none", ("nano",), limit=3))
    assert list(found) == ["nano_count", "nano_existence", "nano_place", "nano_retrieval"]
    assert set(map(str, found.values())) == {str({"samples": 3, "broken": 0, "faults": []})}


def test_a_video_must_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    (tmp_path / "folder.mp4").mkdir()

    def fault(name: str) -> str | None:
        return _fault(Sample(name, "p", (), clip=Clip(name, tmp_path / name)), True)

    assert fault("film.mp4") is None
    assert fault("folder.mp4") == "there is no video 'folder.mp4'"
    assert fault("gone.mp4") == "there is no video 'gone.mp4'"
    assert "too long" in str(fault("n" * 300))


def test_the_second_picture_is_opened_too(posters: Path) -> None:
    pictures = tuple(Picture.inside(posters, f"pages/{name}") for name in ("0.png", "9.png"))
    assert "there is no file" in str(_fault(Sample("a", "p", (), pictures), True))
    assert _fault(Sample("a", "p", (), pictures[:1]), True) is None
