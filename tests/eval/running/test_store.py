"""A run's folder loses nothing that was written, and believes nothing that was not."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm_budget.errors import RunError
from vlm_budget.eval import store
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.store import Answer, BatchTime, Store, answered, begin, locked, note_session, read_run

MANIFEST = {
    "model": {"name": "m"},
    "tasks": {"t": 1},
    "cells": [],
    "data": {},
    "samples": {},
    "options": {},
    "config": {},
}
CELL = Cell("hired", "40%")


def answers(count: int, start: int = 0) -> list[Answer]:
    return [
        Answer("t", f"s{i}", CELL, f"c{i}", "yes", {"accuracy": 1.0}, {"kept": 3}) for i in range(start, start + count)
    ]


def times(found: list[Answer]) -> BatchTime:
    return BatchTime("t", CELL, tuple(one.sample for one in found), {"prefill": 2.0})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    begin(tmp_path / "run", MANIFEST)
    return tmp_path / "run"


def test_what_was_added_is_read_in_order(folder: Path) -> None:
    Store(folder, 1).add(answers(2, 2), times(answers(2, 2)))
    Store(folder, 0).add(answers(2), times(answers(2)))
    run = read_run(folder)
    assert run.answers == tuple(answers(4))
    assert [one.samples for one in run.times] == [("s0", "s1"), ("s2", "s3")]
    assert answered(folder) == {one.key for one in answers(4)}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_last_line_that_a_kill_cut_off_is_dropped(folder: Path, cut: int) -> None:
    Store(folder).add(answers(3))
    path = folder / "answers-00000.jsonl"
    whole = path.read_bytes()
    os.truncate(path, len(whole) - cut)
    assert read_run(folder).answers == tuple(answers(2))  # reading alone mends nothing
    assert path.stat().st_size == len(whole) - cut
    Store(folder).add(answers(1, 2))
    assert read_run(folder).answers == tuple(answers(3))


def test_times_of_a_batch_that_was_not_written_count_for_nothing(folder: Path) -> None:
    Store(folder).add(answers(2), times(answers(2)))
    with (folder / "times-00000.jsonl").open("a") as file:
        file.write(
            json.dumps({"task": "t", "cell": vars(CELL), "samples": ["s0", "s9"], "ms": {"prefill": 9.0}}) + "\n"
        )
    assert len(read_run(folder).times) == 1


def test_damage_in_the_middle_is_refused(folder: Path) -> None:
    Store(folder).add(answers(3))
    path = folder / "answers-00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for bad, message in (
        ("{nonsense\n", "line 2"),
        ("[]\n", "no object"),
        ('{"task": "t"}\n', "no answer of this version"),
    ):
        path.write_text(lines[0] + bad + lines[2])
        with pytest.raises(RunError, match=message):
            read_run(folder)


def test_two_answers_to_one_question_are_refused_unless_equal(folder: Path) -> None:
    Store(folder).add(answers(1))
    Store(folder, 1).add(answers(1))
    assert len(read_run(folder).answers) == 1
    Store(folder, 2).add([Answer("t", "s0", CELL, "c0", "no", {"accuracy": 0.0}, {"kept": 3})])
    with pytest.raises(RunError, match="a second time"):
        read_run(folder)


def test_a_folder_of_other_files_or_of_another_run_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="holds other files"):
        begin(tmp_path / "other", MANIFEST)
    begin(folder, MANIFEST)
    with pytest.raises(RunError, match="another model and another tasks"):
        begin(folder, {**MANIFEST, "model": {"name": "n"}, "tasks": {"t": 2}})
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot read"), ("[]", "no object"), ('{"version": 99}', "version 1")]
)
def test_a_damaged_manifest_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_run(folder)
    with pytest.raises(RunError, match="holds no run"):
        read_run(folder.parent)


def test_a_second_run_in_the_folder_is_refused_at_once(folder: Path) -> None:
    other = (
        "import sys, time\nfrom pathlib import Path\nfrom vlm_budget.eval.store import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", other, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another run writes"), locked(folder):
            pass
        process.kill()
    with locked(folder):  # the lock died with its process
        pass


def test_a_full_disk_is_said_and_what_was_written_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Store(folder)
    kept.add(answers(2))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device. What it held is kept"):
        kept.add(answers(2, 2))
    monkeypatch.undo()
    assert read_run(folder).answers == tuple(answers(2))
    kept.add(answers(2, 2))
    assert read_run(folder).answers == tuple(answers(4))


def test_a_file_that_may_grow_no_further_holds_whole_lines(folder: Path) -> None:
    """The system's own limit, as a disk that fills in the middle of a batch."""
    kept = Store(folder)
    kept.add(answers(3))
    before = kept.answers.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(RunError, match="cannot write"):
            kept.add(answers(20, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert kept.answers.read_bytes() == before
    kept.add(answers(20, 3))
    assert read_run(folder).answers == tuple(sorted(answers(23), key=lambda one: one.key))


@pytest.mark.parametrize(
    "change",
    [
        {"sample": [1]},
        {"sample": None},
        {"scores": {}},
        {"scores": {"accuracy": "x"}},
        {"scores": [1]},
        {"cost": {"flops": None}},
        {"cell": {"methods": 5, "budget": ""}},
        {"cell": {"method": "hired"}},
        {"facts": 3},
        {"answer": 5},
        {"error": 5},
        {"error": []},
        {"error": 0},
        {"scores": {"accuracy": float("nan")}},
        {"scores": {"accuracy": 10**400}},
        {"more": 1},
    ],
)
def test_lines_of_another_kind_are_refused(folder: Path, change: dict[str, Any]) -> None:
    Store(folder).add(answers(2))
    path = folder / "answers-00000.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps({**json.loads(second), **change})}\n")
    with pytest.raises(RunError, match="answers-00000.jsonl line 2 is no answer"):
        read_run(folder)


def test_what_cannot_be_written_down_is_not_half_written(folder: Path) -> None:
    kept = Store(folder)
    bad = [*answers(1), Answer("t", "s9", CELL, "c", "yes", {"accuracy": float("nan")})]
    with pytest.raises(ValueError, match="Out of range"):
        kept.add(bad, times(bad))
    assert not kept.answers.read_bytes()
    assert not kept.times.read_bytes()


def test_every_start_is_remembered(folder: Path) -> None:
    note_session(folder, {"git": "a"})
    with (folder / "sessions.jsonl").open("a") as file:
        file.write('{"git": "cut o')
    note_session(folder, {"git": "b"})
    assert [one["git"] for one in read_run(folder).sessions] == ["a", "b"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """Through /dev/full, where the system has it, so that nothing is pretended."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    begin(tmp_path / "run", MANIFEST)
    kept = Store(tmp_path / "run")
    kept.add(answers(1))
    kept.answers = Path("/dev/full")
    with pytest.raises(RunError, match="No space left"):
        kept.add(answers(1, 1))
    assert read_run(tmp_path / "run").answers == tuple(answers(1))


def test_a_read_only_place_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    with pytest.raises(RunError, match="cannot write to"):
        begin(place / "run", MANIFEST)
    with pytest.raises(RunError, match="cannot write to"), locked(place / "run"):
        pass
    assert place.read_text() == "in the way"
