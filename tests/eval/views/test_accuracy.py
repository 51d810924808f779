"""The tables of rooms, clips and search: asked through the real engine, and written into the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlm_budget.eval import views
from vlm_budget.eval.views import accuracy, clips, report, rooms, scorer
from vlm_budget.eval.views.asking import Clip, Model, Room, Things, ask_clips, ask_rooms
from vlm_budget.eval.views.held_out import prepare, score
from vlm_budget.registry import PRUNERS

ROOT = Path(__file__).parents[3]
SEED = 31_338


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(*views.load())


@pytest.fixture(scope="module")
def some_rooms() -> list[rooms.RoomSample]:
    return list(rooms.test_set(2, SEED))


@pytest.fixture(scope="module")
def some_clips() -> list[clips.ClipSample]:
    return list(clips.test_set(2, SEED))


def test_asking_with_all_tokens_gives_what_the_packed_path_gives(
    model: Model, some_rooms: list[rooms.RoomSample], some_clips: list[clips.ClipSample]
) -> None:
    ready = [Room.of(model, sample) for sample in some_rooms]
    found = ask_rooms(model, ready, None, 1.0)
    assert ready[0].inputs["input_ids"].shape == (6, 1 + 444 + rooms.PROMPT_WORDS)
    assert np.array_equal(found, np.array(score(model.model, prepare(model.model, some_rooms))))
    shown = [Clip(sample, accuracy.queries_of(sample), accuracy.FRAMES) for sample in some_clips]
    found, _ = ask_clips(model, shown, None, None)
    assert np.array_equal(found, np.array(score(model.model, prepare(model.model, some_clips))))


def test_a_budget_of_all_tokens_changes_no_answer(model: Model, some_rooms: list[rooms.RoomSample]) -> None:
    ready = [Room.of(model, sample) for sample in some_rooms]
    assert np.array_equal(ask_rooms(model, ready, PRUNERS.get("segpruner")(), 1.0), ask_rooms(model, ready, None, 1.0))


def test_labels_keep_patches_of_things_only(model: Model, some_rooms: list[rooms.RoomSample]) -> None:
    ready = [Room.of(model, sample) for sample in some_rooms]
    known = ask_rooms(model, ready, Things(positions="original"), 0.2)
    blind = ask_rooms(model, ready, PRUNERS.get("random")(positions="original"), 0.03)
    assert known.mean() > blind.mean()


def test_every_table_is_made_and_written(
    model: Model,
    some_rooms: list[rooms.RoomSample],
    some_clips: list[clips.ClipSample],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(accuracy, "ROOM_SETTINGS", ((0.09, "packed"),))
    monkeypatch.setattr(accuracy, "CLIP_SHARES", (0.5,))
    judge = scorer.load()
    made = {
        "rooms": accuracy.rooms_table(model, some_rooms),
        "haystack": accuracy.clips_table(model, judge, some_clips[:1] * 2),
        "search": accuracy.search_table(judge, some_clips),
    }
    for name, data in made.items():
        (tmp_path / f"views_{name}.json").write_text(json.dumps(data))
    assert made["rooms"]["visual_tokens"] == 444 and made["haystack"]["tokens"] == 289
    assert {row["tokens"] for row in made["haystack"]["rows"]} == {144, 145, 289}
    page = tmp_path / "views.md"
    page.write_text((ROOT / "docs" / "views.md").read_text())
    report.main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "SeGPruner keeps" in text and "At 144 tokens QuoTA reaches" in text and "T*, looking at" in text


def test_the_page_says_what_was_recorded(tmp_path: Path) -> None:
    page = tmp_path / "views.md"
    page.write_text((ROOT / "docs" / "views.md").read_text())
    report.main(["--results", str(ROOT / "benchmarks" / "results"), "--page", str(page)])
    assert page.read_text() == (ROOT / "docs" / "views.md").read_text(), "run make docs"


def test_the_recorded_tables_are_of_the_shipped_weights() -> None:
    import hashlib

    shipped = hashlib.sha256((views.folder() / "model.safetensors").read_bytes()).hexdigest()
    for name in report.SECTIONS:
        data = json.loads((ROOT / "benchmarks" / "results" / f"views_{name}.json").read_text())
        assert (data["weights"], data["seeds"]) == (shipped, "TEST_SEED")
