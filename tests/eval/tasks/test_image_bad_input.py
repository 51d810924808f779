"""Faulty records, missing pictures and hostile texts in every image dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from public_records import (
    CHART_GOOD,
    GQA_GOOD,
    HOSTILE,
    NAMES,
    OCR_GOOD,
    SHORT,
    TEXTVQA,
    bad,
    docvqa,
    from_hub,
    good,
    local,
    paint,
    picture,
    pope,
    science,
    with_records,
    write,
)
from vlm_budget.errors import DataError, ImageError
from vlm_budget.eval.sample import Broken, Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import read_task
from vlm_budget.eval.tasks import records

OUT = "../../etc/passwd"


@pytest.mark.parametrize(
    ("name", "record", "word"),
    [
        ("textvqa", bad(TEXTVQA[1], "question"), "question"),
        ("textvqa", {**TEXTVQA[1], "question": 7}, "int"),
        ("textvqa", {**TEXTVQA[1], "answers": ["a"] * 9}, "10 are expected"),
        ("textvqa", {**TEXTVQA[1], "answers": [1] * 10}, "list of texts"),
        ("textvqa", {**TEXTVQA[1], "image_id": OUT}, "leads out"),
        ("textvqa", {**TEXTVQA[1], "image_id": "a\0b"}, "no usable path"),
        ("textvqa", TEXTVQA[0], "was there before"),
        ("docvqa", docvqa(2, answers=[]), "answers"),
        ("docvqa", docvqa(2, answers=None), "answers"),
        ("docvqa", docvqa(2, image=OUT), "leads out"),
        ("docvqa", docvqa(2, image="/etc/passwd"), "leads out"),
        ("docvqa", docvqa(2, questionId=True), "questionId"),
        ("docvqa", ["a list"], "list where an object"),
        ("chartqa", bad(CHART_GOOD, "label"), "label"),
        ("chartqa", {**CHART_GOOD, "label": 14}, "int"),
        ("chartqa", {**CHART_GOOD, "imgname": f"../{OUT}"}, "leads out"),
        ("ocrbench", {**OCR_GOOD, "answers": ["a", " "]}, "empty reference"),
        ("ocrbench", {**OCR_GOOD, "answers": 5}, "list of texts"),
        ("ocrbench", {**OCR_GOOD, "image_path": OUT}, "leads out"),
        ("ocrbench", None, "NoneType"),
        ("pope", pope(2, "maybe"), "yes or no"),
        ("pope", pope(2, "yes", OUT), "leads out"),
        ("pope", bad(pope(2, "yes"), "image"), "image"),
        ("pope", '{"question_id": 2, "ima', "no record"),
        ("pope", "[1, 2]", "not an object"),
        ("scienceqa", science(answer=3), "one of 3 choices"),
        ("scienceqa", science(answer=-1), "one of 3 choices"),
        ("scienceqa", science(answer="A"), "one of 3 choices"),
        ("scienceqa", science(choices="West Virginia"), "choices"),
        ("scienceqa", science(image=f"../{OUT}"), "leads out"),
        ("scienceqa", "a text", "object"),
        ("vqav2", {"image_id": 458752, "question": "What?", "question_id": 9}, "no question 9"),
        ("vqav2", {"image_id": 458752, "question": "What?", "question_id": 3}, "list of 10"),
        ("vqav2", {"image_id": OUT, "question": "What?", "question_id": 2}, "number"),
        ("vqav2", {"image_id": 458752, "question_id": 2}, "question"),
        ("gqa", {**GQA_GOOD, "imageId": OUT}, "leads out"),
        ("gqa", bad(GQA_GOOD, "answer"), "answer"),
        ("gqa", [], "list where an object"),
    ],
)
def test_a_faulty_record_is_named_and_the_others_stay(tmp_path: Path, name: str, record: Any, word: str):
    with_records(name, tmp_path, record)
    first, broken = local(name, tmp_path)
    assert isinstance(first, Sample) and first.images[0].load().size == (8, 6)
    assert isinstance(broken, Broken) and word in broken.error and broken.id


def test_mme_names_faulty_lines_and_missing_pictures_and_goes_on(tmp_path: Path):
    write(tmp_path / "count/1.txt", "Two dogs?\tYes\nno tab here\nThree dogs?\tmaybe\n")
    paint(tmp_path / "count/1.jpg")
    write(tmp_path / "count/2.txt", "Two dogs?\tYes\nThree dogs?\tNo\n")
    write(tmp_path / "count/3.txt", "Two cats?\tYes\n")
    paint(tmp_path / "count/3.png")
    (tmp_path / "count/4.txt").write_bytes(b"\xff\xfe broken \xff\n")
    paint(tmp_path / "count/4.png")
    found = local("mme", tmp_path)
    assert [one.id for one in found if isinstance(one, Sample)] == ["count/1.jpg-1", "count/3.png-1"]
    errors = " / ".join(one.error for one in found if isinstance(one, Broken))
    assert "tab" in errors and "yes or no" in errors and "no picture 2" in errors and len(found) == 6


def test_mme_follows_no_link_out_of_the_folder(tmp_path: Path):
    paint(tmp_path / "secret.png")
    root = tmp_path / "mme"
    write(root / "count/1.txt", "Two dogs?\tYes\n")
    (root / "count/1.png").symlink_to(tmp_path / "secret.png")
    write(tmp_path / "secret.txt", "Two dogs?\tYes\n")
    paint(root / "count/2.png")
    (root / "count/2.txt").symlink_to(tmp_path / "secret.txt")
    broken = local("mme", root)
    assert [one.error for one in broken if isinstance(one, Broken) and "leads out" in one.error] and len(broken) == 2
    assert all(isinstance(one, Broken) for one in broken)


@pytest.mark.parametrize("name", ["textvqa", "docvqa", "chartqa", "ocrbench", "pope", "scienceqa", "vqav2", "gqa"])
def test_a_missing_or_damaged_picture_is_said_when_it_is_read(tmp_path: Path, name: str):
    with_records(name, tmp_path)
    (sample,) = good(local(name, tmp_path))
    file = sample.images[0].source
    assert isinstance(file, Path)
    file.write_bytes(b"no picture")
    with pytest.raises(ImageError, match="not a picture"):
        sample.images[0].load()
    file.unlink()
    with pytest.raises(ImageError, match="no file"):
        sample.images[0].load()


@pytest.mark.parametrize("name", NAMES)
def test_another_folder_is_refused_before_anything_is_read(tmp_path: Path, name: str):
    with pytest.raises(DataError, match="layout"):
        local(name, tmp_path)
    with pytest.raises(DataError, match="no data folder"):
        local(name, tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("textvqa", "TextVQA_0.5.1_val.json"),
        ("docvqa", "val_v1.0.json"),
        ("chartqa", "test/test_augmented.json"),
        ("ocrbench", "OCRBench.json"),
        ("scienceqa", "pid_splits.json"),
        ("scienceqa", "problems.json"),
        ("vqav2", "v2_mscoco_val2014_annotations.json"),
        ("gqa", "testdev_balanced_questions.json"),
    ],
)
def test_a_damaged_file_is_refused_before_the_first_sample(tmp_path: Path, name: str, file: str):
    with_records(name, tmp_path)
    for text, word in (("{", "cannot read"), ("7", "holds a int|has no")):
        write(tmp_path / file, text)
        with pytest.raises(DataError, match=word):
            next(iter(read_task(name).samples(Source(root=tmp_path))))


def test_pope_needs_all_three_files_before_the_first_sample(tmp_path: Path):
    with_records("pope", tmp_path)
    (tmp_path / "coco_pope_adversarial.json").unlink()
    with pytest.raises(DataError, match="coco_pope_adversarial.json"):
        next(iter(read_task("pope").samples(Source(root=tmp_path))))


@pytest.mark.parametrize("name", ["textvqa", "docvqa", "chartqa", "ocrbench", "vqav2", "gqa"])
def test_hostile_questions_are_kept_as_they_are(tmp_path: Path, name: str):
    record = {
        "textvqa": {**TEXTVQA[1], "question": HOSTILE},
        "docvqa": docvqa(2, question=HOSTILE),
        "chartqa": {**CHART_GOOD, "query": HOSTILE},
        "ocrbench": {**OCR_GOOD, "question": HOSTILE},
        "vqav2": {"image_id": 458752, "question": HOSTILE, "question_id": 2},
        "gqa": {**GQA_GOOD, "question": HOSTILE},
    }[name]
    with_records(name, tmp_path, record)
    assert good(local(name, tmp_path))[1].prompt.removesuffix(SHORT) == HOSTILE


def test_a_hub_row_without_a_picture_is_named(hub: Callable[..., Path]):
    rows = [{**TEXTVQA[0], "image": picture()}, {**TEXTVQA[1], "image": None}]
    first, broken = from_hub("textvqa", hub("validation", default=rows))
    assert isinstance(first, Sample)
    assert isinstance(broken, Broken) and "no image" in broken.error


def test_a_hub_dataset_that_is_not_there_is_said(tmp_path: Path):
    pytest.importorskip("datasets", reason="hub datasets are read with datasets: pip install datasets")
    with pytest.raises(DataError, match="cannot load dataset"):
        from_hub("textvqa", tmp_path / "nowhere")


def test_a_hub_picture_may_come_as_bytes_and_is_judged_when_it_is_read(tmp_path: Path):
    paint(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    for cell in (data, {"bytes": data, "path": "red.png"}):
        assert records.picture({"image": cell}, "red").load().size == (8, 6)
    with pytest.raises(ImageError, match="'red' is not a picture"):
        records.picture({"image": {"bytes": data[:40], "path": None}}, "red").load()
    for cell in ({"bytes": None, "path": "/etc/passwd"}, "/etc/passwd", 7, []):
        with pytest.raises(DataError, match="no picture"):
            records.picture({"image": cell}, "red")


def test_pictures_with_equal_content_have_equal_fingerprints():
    red, again, blue = (
        records.picture({"image": Image.new("RGB", (4, 4), one)}, "x") for one in ("red", "red", "blue")
    )
    assert records.fingerprint(red) == records.fingerprint(again) != records.fingerprint(blue)


def test_a_folder_of_pictures_may_be_a_link_and_a_picture_may_not(tmp_path: Path):
    with_records("pope", tmp_path / "pope", pope(2, "no", "other.jpg"))
    (tmp_path / "pope/val2014").rename(tmp_path / "coco")
    (tmp_path / "pope/val2014").symlink_to(tmp_path / "coco")
    paint(tmp_path / "other.jpg")
    (tmp_path / "coco/other.jpg").symlink_to(tmp_path / "other.jpg")
    first, broken = local("pope", tmp_path / "pope")
    assert isinstance(first, Sample) and first.images[0].load().size == (8, 6)
    assert isinstance(broken, Broken) and "leads out" in broken.error


def test_a_photograph_missing_in_the_hub_breaks_its_questions_only(hub: Callable[..., Path]):
    questions = [{**GQA_GOOD, "id": str(number), "imageId": f"n{number}"} for number in (1, 2)]
    pictures = [{"id": "n1", "image": picture()}, {"id": "n2", "image": None}]
    folder = hub("testdev", testdev_balanced_instructions=questions, testdev_balanced_images=pictures)
    first, broken = from_hub("gqa", folder)
    assert isinstance(first, Sample) and isinstance(broken, Broken) and "'n2'" in broken.error
