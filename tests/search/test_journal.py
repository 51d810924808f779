"""The journal: nothing that was evaluated is lost, and nothing foreign is believed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_budget.errors import JournalError, OptionError
from vlm_budget.search.journal import Journal, check_place

MINE = {"model": "toy 1", "calibration": "abc", "metric": "accuracy"}


def never() -> dict[str, Any]:
    raise AssertionError("evaluated what the journal holds")


def filled(path: Path, count: int = 3) -> Journal:
    journal = Journal(path, MINE)
    for index in range(count):
        journal.remember({"rates": [1, index / 7]}, lambda index=index: {"quality": index / 3})
    return journal


def test_points_are_known_after_a_restart_to_the_last_bit(tmp_path: Path) -> None:
    filled(tmp_path / "j")
    again = Journal(tmp_path / "j", MINE)
    assert [again.remember({"rates": [1, i / 7]}, never)["quality"] for i in range(3)] == [0, 1 / 3, 2 / 3]
    assert (again.new, again.reused, len(again)) == (0, 3, 3)


def test_a_point_is_evaluated_once(tmp_path: Path) -> None:
    journal = filled(tmp_path / "j", 1)
    assert journal.remember({"rates": [1, 0 / 7]}, never) == {"quality": 0}
    assert (journal.new, journal.reused) == (1, 1)


def test_without_a_file_points_live_as_long_as_the_journal() -> None:
    journal = Journal(None, MINE)
    journal.remember({"rates": []}, lambda: {"quality": 1})
    assert journal.remember({"rates": []}, never) == {"quality": 1}


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_costs_that_point_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    filled(path)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, MINE)
    assert len(again) == 2
    again.remember({"rates": [1, 2 / 7]}, lambda: {"quality": 2 / 3})
    assert len(Journal(path, MINE)) == 3


def test_a_damaged_last_line_counts_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "j"
    filled(path)
    with path.open("ab") as file:
        file.write(b"\0\0\0\0\n")
    assert len(Journal(path, MINE)) == 3
    assert len(Journal(path, MINE)) == 3


def test_a_torn_header_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, MINE)
    path.write_bytes(path.read_bytes()[:10])
    assert len(filled(path)) == 3
    assert len(Journal(path, MINE)) == 3


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    filled(path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], lines[2][:-9], *lines[3:]]))
    with pytest.raises(JournalError, match="line 3 .*damaged"):
        Journal(path, MINE)


def test_an_edited_point_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    filled(path)
    path.write_text(path.read_text().replace(str(1 / 7), "0.5"))
    with pytest.raises(JournalError, match="line 3 .*edited"):
        Journal(path, MINE)


@pytest.mark.parametrize("what", list(MINE))
def test_a_journal_of_another_search_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    path = tmp_path / "j"
    filled(path)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=f"another search: its {what} differ"):
        Journal(path, {**MINE, what: "other"})
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["{}\n", '{"kind": "recipe"}\n', "[1]\n", '{"version": 1}\n{"key": 1}\n'])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "j"
    path.write_text(text)
    with pytest.raises(JournalError):
        Journal(path, MINE)
    assert path.read_text() == text


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot write journal .*no_such"):
        Journal(tmp_path / "no_such" / "j", MINE)
    with pytest.raises(JournalError, match="cannot read journal"):
        Journal(tmp_path, MINE)


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Journal(tmp_path / "j", MINE).remember({"rates": []}, lambda: {"quality": float("nan")})
    assert len(Journal(tmp_path / "j", MINE)) == 0


KILLED = """
import sys, time
from vlm_budget.search.journal import Journal

def slow(index):
    print(index, flush=True)  # the parent kills somewhere behind one of these
    time.sleep(0.01)
    return {"quality": index / 3}

journal = Journal(sys.argv[1], {"model": "toy 1", "calibration": "abc", "metric": "accuracy"})
for index in range(10_000):
    journal.remember({"rates": [index]}, lambda: slow(index))
"""


def test_a_killed_process_loses_no_evaluated_point(tmp_path: Path) -> None:
    path = tmp_path / "j"
    script = tmp_path / "search.py"
    script.write_text(textwrap.dedent(KILLED))
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen([sys.executable, str(script), str(path)], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    for _ in range(7):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    done = int((process.stdout.read().split() or [6])[-1])
    process.wait()
    journal = Journal(path, MINE)
    assert len(journal) in (done, done + 1) and done >= 6
    for index in range(done):
        assert journal.remember({"rates": [index]}, never) == {"quality": index / 3}
    assert all(json.loads(line) for line in path.read_text().splitlines())


# --- files of the user, and edits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"image": "a.png"}\n{"image": "b.png"}',  # no newline behind the last line
        "one line",
        "one line\n",
        "{",
        "first\n\0\0\n",
        "[" * 100_000 + "\n",
    ],
)
def test_a_file_of_the_user_is_never_changed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(JournalError, match="is no search journal; it was left as it is"):
        Journal(path, MINE)
    if "\n" in text:
        with pytest.raises(JournalError, match="is no search journal"):
            check_place(path)
    assert path.read_text() == text


def test_a_torn_journal_of_another_search_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    filled(path)
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    with pytest.raises(JournalError, match="its metric differs"):
        Journal(path, {**MINE, "metric": "kl"})
    with pytest.raises(JournalError, match="its model and metric differ"):
        Journal(path, {**MINE, "metric": "kl", "model": "toy 2"})
    assert path.read_bytes() == before


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    lines = path.read_text().splitlines()
    row = json.loads(lines[2])
    change(row)
    path.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row["found"].update(quality=1.0),
        lambda row: row.update(found={}),
        lambda row: row.update(found=3),
        lambda row: row.update(more=1),
        *(lambda row, name=name: row.pop(name) for name in ("key", "point", "found", "checksum")),
        dict.clear,
    ],
)
def test_a_line_that_is_not_what_was_written_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "j"
    filled(path)
    edited(path, lambda row: None)
    assert len(Journal(path, MINE)) == 3
    edited(path, change)
    before = path.read_bytes()
    with pytest.raises(JournalError, match="line 3 .*edited"):
        Journal(path, MINE)
    assert path.read_bytes() == before


def test_a_journal_of_another_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "j"
    filled(path)
    path.write_text(path.read_text().replace('"version": 2', '"version": 1', 1))
    with pytest.raises(JournalError, match="of this version, which is 2: it has version 1"):
        Journal(path, MINE)


def test_a_place_is_checked_without_touching_it(tmp_path: Path) -> None:
    check_place(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    filled(tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    check_place(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == before
    with pytest.raises(JournalError, match="there is no folder"):
        check_place(tmp_path / "no_such" / "j")
    with pytest.raises(JournalError, match="cannot read journal"):
        check_place(tmp_path)


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(OptionError, match="journal must be a path, got 5"):
        Journal(5, MINE)  # type: ignore[arg-type]
