"""Loaders of tasks about text in pictures, on records in the public schema: their own files, and their hub mirrors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from public_records import (
    BLUE,
    HOSTILE,
    NAMES,
    RED,
    SHORT,
    TEXTVQA,
    chartqa,
    colours,
    docvqa,
    from_hub,
    good,
    local,
    paint,
    picture,
    write,
)
from vlm_budget.eval.sample import Broken
from vlm_budget.eval.task import find_tasks, read_task


@pytest.mark.parametrize("place", ["train_images", "train_val_images/train_images"])
def test_textvqa_from_its_own_files(tmp_path: Path, place: str):
    write(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": TEXTVQA})
    paint(tmp_path / place / "003a8ae2ef43b901.jpg", RED)
    paint(tmp_path / place / "0054c91397f2fe05.jpg", BLUE)
    first, second = good(local("textvqa", tmp_path))
    assert (first.id, first.cluster, first.prompt) == ("34602", "003a8ae2ef43b901", "what brand is it?" + SHORT)
    assert first.answers == ("dakota",) * 10
    assert second.prompt == HOSTILE + SHORT
    assert colours([first, second]) == [RED, BLUE]
    task = read_task("textvqa")
    assert task.scores("Dakota.", first) == {"accuracy": 1.0}
    assert task.scores("10", second) == {"accuracy": 1.0}
    assert task.scores("", first) == {"accuracy": 0.0}


def test_textvqa_from_the_hub(hub: Callable[..., Path]):
    rows = [{**one, "image": picture(colour)} for one, colour in zip(TEXTVQA, (RED, BLUE), strict=True)]
    found = good(from_hub("textvqa", hub("validation", default=rows)))
    assert [one.id for one in found] == ["34602", "34603"]
    assert [one.prompt for one in found] == ["what brand is it?" + SHORT, HOSTILE + SHORT]
    assert colours(found) == [RED, BLUE]


@pytest.mark.parametrize(
    ("file", "page"),
    [
        ("val_v1.0.json", "documents"),
        ("val/val_v1.0.json", "val/documents"),
        ("spdocvqa_qas/val_v1.0_withQT.json", "spdocvqa_images"),
    ],
)
def test_docvqa_from_its_own_files(tmp_path: Path, file: str, page: str):
    write(tmp_path / file, {"dataset_name": "docvqa", "dataset_split": "val", "data": [docvqa(49153), docvqa(24580)]})
    paint(tmp_path / page / "xnbl0037_1.png")
    first, second = good(local("docvqa", tmp_path))
    assert (first.id, second.id, first.cluster) == ("49153", "24580", "xnbl0037_1")
    assert first.prompt == "What is the name of the company?" + SHORT
    assert colours([first]) == [RED]
    task = read_task("docvqa")
    assert task.scores("ITC limited", first) == {"anls": 1.0}
    assert task.scores("ITC limitec", first) == {"anls": pytest.approx(1 - 1 / 11)}
    assert task.scores("", first) == {"anls": 0.0}


def test_docvqa_from_the_hub_groups_by_page_as_the_files_do(hub: Callable[..., Path]):
    row = {**docvqa(0, questionId="49153", image=picture()), "question_types": ["handwritten", "form"]}
    (found,) = good(from_hub("docvqa", hub("validation", DocVQA=[row]), "DocVQA"))
    assert (found.id, found.cluster, found.answers) == ("49153", "xnbl0037_1", ("itc limited", "ITC Limited"))
    assert colours([found]) == [RED]


def test_chartqa_from_its_own_files(tmp_path: Path):
    human = [
        {"imgname": "41699051005347.png", "query": "How many food item is shown in the bar graph?", "label": "14"},
        {"imgname": "41699051005347.png", "query": "Is it rising?", "label": "Yes"},
    ]
    chartqa(tmp_path, human, [{"imgname": "two_col_1229.png", "query": "Which share?", "label": "57.5"}])
    found = good(local("chartqa", tmp_path))
    assert [one.id for one in found] == ["human-0001", "human-0002", "augmented-0001"]
    assert [one.cluster for one in found] == ["41699051005347.png", "41699051005347.png", "two_col_1229.png"]
    assert colours(found) == [RED, RED, BLUE]
    task = read_task("chartqa")
    scores = [task.scores(said, one) for said, one in zip(("14.5", "no", "57.5"), found, strict=True)]
    assert [one["relaxed_accuracy"] for one in scores] == [1, 0, 1]
    figures = task.figures([(one, sample.facts) for one, sample in zip(scores, found, strict=True)])
    assert figures["relaxed_accuracy"] == pytest.approx(2 / 3)
    assert figures["relaxed_accuracy, part human"] == 0.5
    assert figures["relaxed_accuracy, part augmented"] == 1


def test_chartqa_from_the_hub_groups_questions_about_one_chart(hub: Callable[..., Path]):
    rows = [
        {"type": "human_test", "question": "How many?", "answer": "14", "image": picture()},
        {"type": "human_test", "question": "Rising?", "answer": "Yes", "image": picture()},
        {"type": "augmented_test", "question": "Which share?", "answer": "57.5", "image": picture(BLUE)},
        {"type": "train", "question": "Which share?", "answer": "57.5", "image": picture(BLUE)},
    ]
    *found, broken = from_hub("chartqa", hub("test", default=rows))
    assert [one.id for one in good(found)] == ["human-0001", "human-0002", "augmented-0003"]
    assert [one.facts["part"] for one in good(found)] == ["human", "human", "augmented"]
    assert found[0].cluster == found[1].cluster != found[2].cluster
    assert isinstance(broken, Broken) and "human_test or augmented_test" in broken.error


OCRBENCH = [
    ("IIIT5K", "Regular Text Recognition", "what is written in the image?", ["CENTRE"]),
    ("HME100k", "Handwritten Mathematical Expression Recognition", "Please write out the expression.", ["x^{2}"]),
    ("docVQA", "Doc-oriented VQA", "what is the date?", ["3/4/98", "March 4"]),
]


@pytest.mark.parametrize("place", ["", "OCRBench/"])
def test_ocrbench_from_its_own_files(tmp_path: Path, place: str):
    records = [
        {
            "dataset_name": name,
            "id": 0,
            "type": kind,
            "question": question,
            "answers": answers,
            "image_path": f"{name}/1.jpg",
        }
        for name, kind, question, answers in OCRBENCH
    ]
    records[0]["answers"] = "CENTRE"  # one reference may stand alone
    write(tmp_path / place / "OCRBench.json", records)
    for name, *_ in OCRBENCH:
        paint(tmp_path / "OCRBench_Images" / name / "1.jpg")
    found = good(local("ocrbench", tmp_path))
    assert [one.id for one in found] == ["IIIT5K-0001", "HME100k-0002", "docVQA-0003"]
    assert found[0].answers == ("CENTRE",) and found[0].prompt == "what is written in the image?"
    assert colours(found) == [RED] * 3
    task = read_task("ocrbench")
    scores = [
        task.scores(said, one) for said, one in zip(("It says Centre.", "X ^ {2}", "march 4"), found, strict=True)
    ]
    assert [one["accuracy"] for one in scores] == [1, 0, 1]
    assert task.scores("so x ^ {2}", found[1]) == {"accuracy": 1.0}
    figures = task.figures([(one, sample.facts) for one, sample in zip(scores, found, strict=True)])
    assert figures["score"] == pytest.approx(1000 * 2 / 3)
    assert figures["accuracy, kind Regular Text Recognition"] == 1


def test_ocrbench_from_the_hub(hub: Callable[..., Path]):
    rows = [
        {"dataset": name, "question": question, "question_type": kind, "answer": answers, "image": picture()}
        for name, kind, question, answers in OCRBENCH
    ]
    found = good(from_hub("ocrbench", hub("test", default=rows)))
    assert [one.id for one in found] == ["IIIT5K-0001", "HME100k-0002", "docVQA-0003"]
    assert found[2].answers == ("3/4/98", "March 4")
    assert found[1].facts["dataset"] == "HME100k"


def test_tasks_that_read_small_print_say_so():
    tasks = {task.name: task for task in find_tasks(NAMES)}
    assert {name for name, task in tasks.items() if task.reads_text} == {"textvqa", "docvqa", "chartqa", "ocrbench"}
    for task in tasks.values():
        assert task.needs_data and task.version == 1 and task.modality == "image"
        assert {"url", "paper", "licence", "hub", "split", "files", "metric"} == set(task.data)
