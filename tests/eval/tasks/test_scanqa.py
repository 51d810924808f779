from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from dataset_files import HOSTILE, parquet, split, write
from vlm_budget.errors import DataError
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import read_task
from vlm_budget.eval.tasks.scanqa import normalise


def scanqa_row(**changes) -> dict:
    row = {
        "answers": ["brown wooden door", "Brown door."],
        "object_ids": [8],
        "object_names": ["door"],
        "question": "What is in the right corner of room by curtains?",
        "question_id": "val-scene0011-0",
        "scene_id": "scene0011_00",
    }
    return {**row, **changes}


def views(folder: Path, count: int, suffix: str = "jpg") -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number * 20}.{suffix}")


@pytest.mark.parametrize("layout", ["scenes/{}", "frames_square/{}/color", "posed_images/{}", "scans/{}/color"])
def test_scanqa_takes_views_of_the_scene(tmp_path, layout):
    write(tmp_path / "ScanQA_v1.0_val.json", [scanqa_row(), scanqa_row(question_id="val-1", question="Where is it?")])
    views(tmp_path / layout.format("scene0011_00"), 40)
    good, broken = split(read_task("scanqa").samples(Source(tmp_path)))
    assert not broken and [one.id for one in good] == ["val-scene0011-0", "val-1"]
    # 40 pictures in 16 pieces of 2.5: the middles are 1.25, 3.75, ... and so pictures 1, 3, 6, 8, ..., 38.
    names = [int(Path(one.name).stem) // 20 for one in good[0].images]
    assert names == [1, 3, 6, 8, 11, 13, 16, 18, 21, 23, 26, 28, 31, 33, 36, 38]
    assert good[0].images[0].load().size == (8, 8)
    assert good[0].prompt == (
        "What is in the right corner of room by curtains?\nAnswer the question using a single word or phrase."
    )
    assert good[0].answers == ("brown wooden door", "Brown door.") and good[0].group == "scene0011_00"
    assert [one.facts["kind"] for one in good] == ["object", "place"] and good[0].clip is None


def test_scanqa_from_the_hub(tmp_path):
    parquet(tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet", [scanqa_row()])
    views(tmp_path / "hub" / "scenes" / "scene0011_00", 3)
    (only,), _ = split(read_task("scanqa").samples(Source(hub=str(tmp_path / "hub"))))
    assert len(only.images) == 3 and only.answers[0] == "brown wooden door"
    with pytest.raises(DataError, match="no dataset is named"):
        next(iter(read_task("scanqa").samples(Source())))


def test_scanqa_faulty_records_go_by(tmp_path):
    write(tmp_path / "ScanQA_v1.0_val.json", [scanqa_row()])
    with pytest.raises(DataError, match="holds no pictures of scenes"):
        next(iter(read_task("scanqa").samples(Source(tmp_path))))
    rows = [scanqa_row(scene_id="../../etc"), scanqa_row(scene_id="scene9999_00"), scanqa_row(answers=[])]
    rows += [scanqa_row(answers=[None]), scanqa_row(question=""), "text", scanqa_row(scene_id="a" * 5000)]
    rows += [scanqa_row(answers=[HOSTILE])]
    write(tmp_path / "ScanQA_v1.0_val.json", rows)
    views(tmp_path / "scenes" / "scene0011_00", 2)
    good, broken = split(read_task("scanqa").samples(Source(tmp_path)))
    assert len(good) == 1 and good[0].answers == (HOSTILE.strip(),) and len(broken) == 7
    errors = [one.error for one in broken]
    assert any("plain name" in one for one in errors) and any("no pictures of scene" in one for one in errors)


def test_a_view_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    write(tmp_path / "in" / "ScanQA_v1.0_val.json", [scanqa_row()])
    views(tmp_path / "out", 2)
    (tmp_path / "in" / "scenes").mkdir()
    (tmp_path / "in" / "scenes" / "scene0011_00").symlink_to(tmp_path / "out")
    good, broken = split(read_task("scanqa").samples(Source(tmp_path / "in")))
    assert not good and "leads out" in broken[0].error


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("The brown door.", "brown door"),
        ("2", "two"),
        ("2 chairs", "two chairs"),
        ("20", "twenty"),
        ("21", "21"),
        ("0", "zero"),
        ("a white, round table!", "white, round table"),
        ("To the left of a TV", "to left of tv"),
        ("no1", "no"),
        ("  Yes ", "yes"),
        ("a", "a"),
        ("", ""),
    ],
)
def test_scanqa_normalisation(said, wanted):
    assert normalise(said) == wanted


def test_scanqa_scores_by_hand(tmp_path):
    task = read_task("scanqa")
    write(tmp_path / "ScanQA_v1.0_val.json", [scanqa_row(), scanqa_row(question_id="b", answers=["two chairs"])])
    views(tmp_path / "scenes" / "scene0011_00", 2)
    (first, second), _ = split(task.samples(Source(tmp_path)))
    whole = task.scores("The brown door", first)
    assert whole["exact_match"] == whole["refined_match"] == 1.0
    part = task.scores("brown", first)  # a part of a reference
    assert part["exact_match"] == 0.0 and part["refined_match"] == 1.0
    assert task.scores("There are 2 chairs in the room", second)["refined_match"] == 1.0
    for said in ("", "   ", "...", "green"):
        found = task.scores(said, first)
        assert found["exact_match"] == found["refined_match"] == found["rouge_l"] == found["cider"] == 0.0
    rows = [(task.scores("brown wooden door", first), first.facts), (task.scores("sofa", second), second.facts)]
    figures = task.figures(rows)
    # Of four words three match; the answers have 3 + 1 words, their nearest references 3 + 2.
    assert figures["bleu_1"] == pytest.approx(3 / 4 * math.exp(1 - 5 / 4))
    assert figures["bleu_4"] == 0.0 and figures["exact_match"] == 0.5
    assert figures["exact_match, kind object"] == 0.5
