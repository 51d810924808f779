"""Loaders of tasks about photographs and school pictures, on records in the public schema, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from public_records import (
    BLUE,
    RED,
    SHORT,
    colours,
    from_hub,
    good,
    lines,
    local,
    paint,
    picture,
    pope,
    science,
    vqa,
    vqav2,
    write,
)
from vlm_budget.eval.sample import Broken, Sample
from vlm_budget.eval.task import read_task


@pytest.mark.parametrize("place", ["", "coco/", "output/coco/"])
def test_pope_from_its_own_files(tmp_path: Path, place: str):
    for category in ("random", "popular", "adversarial"):
        write(tmp_path / place / f"coco_pope_{category}.json", lines(pope(1, "yes"), pope(2, "no")))
    paint(tmp_path / "val2014/COCO_val2014_000000310196.jpg")
    found = good(local("pope", tmp_path))
    assert [one.id for one in found] == [
        *("random-1", "random-2", "popular-1", "popular-2"),
        *("adversarial-1", "adversarial-2"),
    ]
    assert {one.cluster for one in found} == {"COCO_val2014_000000310196"}
    assert found[0].prompt == "Is there a snowboard in the image?" + SHORT
    assert colours(found) == [RED] * 6


def test_pope_from_the_hub(hub: Callable[..., Path]):
    row = {"id": "0", "question_id": "1", "question": "Is there a snowboard in the image?", "answer": "yes"}
    row |= {"image_source": "COCO_val2014_000000310196", "image": picture(), "category": "adversarial"}
    found, broken = from_hub("pope", hub("test", default=[row, {**row, "category": "easy"}]))
    (sample,) = good([found])
    assert (sample.id, sample.cluster, sample.answers) == ("adversarial-1", "COCO_val2014_000000310196", ("yes",))
    assert isinstance(broken, Broken) and "'easy'" in broken.error


def test_pope_figures_by_hand():
    def row(label: str, said: str) -> tuple[dict[str, float], Mapping[str, Any]]:
        facts = {"category": category, "label": label}
        return task.scores(said, Sample("x", "q", (label,), facts=facts)), facts

    task = read_task("pope")
    category = "random"
    # Six that are there, three found; four that are not, one false alarm: 3 / 4 of what was said, 3 / 6 of what is.
    rows = [row("yes", "Yes, there is.")] * 3 + [row("yes", "No")] * 3 + [row("no", "yes")] + [row("no", "not")] * 3
    figures = task.figures(rows)
    assert figures["accuracy"] == pytest.approx(0.6)
    assert (figures["precision"], figures["recall"]) == (0.75, 0.5)
    assert figures["f1"] == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert figures["yes_rate"] == pytest.approx(0.4)
    category = "popular"
    both = task.figures([*rows, row("no", "")])  # neither no nor not: a yes
    assert both["yes_rate"] == pytest.approx(5 / 11)
    assert both["f1, category random"] == pytest.approx(0.6)
    assert (both["accuracy, category popular"], both["yes_rate, category popular"]) == (0, 1)
    assert (both["precision, category popular"], both["f1, category popular"]) == (0, 0)
    assert "f1, category adversarial" not in both


@pytest.mark.parametrize("place", ["", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark"])
def test_mme_reads_both_layouts_of_a_category(tmp_path: Path, place: str):
    root = tmp_path / place
    logo = 'Is the word in the logo "angie\'s"? Please answer yes or no.'
    write(root / "OCR/0001.txt", f"{logo}\tYes\r\n{logo.replace('angie', 'angle')}\tNo\r\n\r\n")
    paint(root / "OCR/0001.jpg", RED)
    write(
        root / "artwork/questions_answers_YN/10002.txt", "Is it a painting? Please answer yes or no.\tYes\nGlass?\tNo\n"
    )
    paint(root / "artwork/images/10002.png", BLUE)
    write(root / "eval_tool/readme.txt", "no category")
    found = good(local("mme", tmp_path))
    assert [one.id for one in found] == [
        *("artwork/10002.png-1", "artwork/10002.png-2"),
        *("OCR/0001.jpg-1", "OCR/0001.jpg-2"),
    ]
    assert [one.answers[0] for one in found] == ["yes", "no", "yes", "no"]
    assert found[2].prompt == logo
    assert found[0].cluster == found[1].cluster != found[2].cluster
    assert colours(found) == [BLUE, BLUE, RED, RED]


def test_mme_from_the_hub_has_the_ids_of_the_files(hub: Callable[..., Path]):
    base = {"question_id": "code_reasoning/0020.png", "image": picture(), "category": "code_reasoning"}
    rows = [{**base, "question": "Is it 5? Please answer yes or no.", "answer": one} for one in ("Yes", "No")]
    found = good(from_hub("mme", hub("test", default=rows)))
    assert [one.id for one in found] == ["code_reasoning/0020.png-1", "code_reasoning/0020.png-2"]
    assert found[0].cluster == found[1].cluster == "code_reasoning/0020.png"


def test_mme_scores_by_hand():
    def rows(category: str, *pictures: tuple[int, ...]) -> list[tuple[dict[str, float], Mapping[str, Any]]]:
        return [
            ({"accuracy": float(right)}, {"category": category, "image": f"{category}/{number}"})
            for number, answers in enumerate(pictures)
            for right in answers
        ]

    found = rows("count", (1, 1), (1, 0)) + rows("OCR", (1, 1)) + rows("code_reasoning", (0, 1), (0, 0), (1,))
    figures = read_task("mme").figures(found)
    assert figures["accuracy, category count"] == 0.75
    assert figures["accuracy+, category count"] == 0.5
    assert figures["perception"] == pytest.approx(75 + 50 + 100 + 100)
    assert figures["accuracy, category code_reasoning"] == pytest.approx(2 / 5)
    assert figures["accuracy+, category code_reasoning"] == 0  # of the two pictures with both questions
    assert figures["cognition"] == pytest.approx(40)
    assert figures["total"] == pytest.approx(365)


@pytest.mark.parametrize(
    ("said", "right"), [("Yes", 1), ("yes, there is", 1), ("YES.", 1), ("No", 0), ("", 0), ("It is", 0)]
)
def test_mme_reads_the_beginning_of_an_answer(said: str, right: float):
    assert read_task("mme").scores(said, Sample("x", "q", ("yes",))) == {"accuracy": right}


SCIENCE_PROMPT = (
    "Context: Look at the map {question}.\nWhich of these states is farthest north?\n"
    "A. West Virginia\nB. Louisiana\nC. Arizona\nAnswer with the option's letter from the given choices directly."
)


@pytest.mark.parametrize(("place", "images"), [("", "images/test"), ("", "test"), ("data/scienceqa/", "images/test")])
def test_scienceqa_takes_test_questions_with_a_picture(tmp_path: Path, place: str, images: str):
    problems = {"4": science(), "5": science(image=None), "11": science(answer=2, hint=""), "7": science(split="train")}
    write(tmp_path / place / "problems.json", problems)
    write(tmp_path / place / "pid_splits.json", {"train": ["7"], "val": [], "test": ["11", "4", "5"]})
    for name in ("4", "11"):
        paint(tmp_path / place / images / name / "image.png")
    second, first = good(local("scienceqa", tmp_path))
    assert (first.id, first.prompt, first.answers) == ("4", SCIENCE_PROMPT, ("A",))
    assert (second.id, second.prompt.startswith("Which of"), second.answers) == ("11", True, ("C",))
    assert colours([first, second]) == [RED, RED]
    task = read_task("scienceqa")
    for said in ("A", "a.", "(A)", "A. West Virginia", "The answer is A."):
        assert task.scores(said, first)["accuracy"] == 1, said
    for said in ("B", "", "It depends", "A or B"):
        assert task.scores(said, first)["accuracy"] == 0, said
    assert task.figures([(task.scores("A", first), first.facts)])["accuracy, subject social science"] == 1


def test_scienceqa_from_the_hub(hub: Callable[..., Path]):
    rows = [science(image=picture()), science(image=picture(BLUE), answer=1, hint="")]
    found = good(from_hub("scienceqa", hub("test", ScienceQA__IMG=rows), "ScienceQA-IMG"))
    assert [one.id for one in found] == ["row-0001", "row-0002"]
    assert (found[0].prompt, found[1].answers) == (SCIENCE_PROMPT, ("B",))
    assert colours(found) == [RED, BLUE]


def test_vqav2_from_its_own_files(tmp_path: Path):
    questions = [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 458752, "question": "How many?", "question_id": 458752001},
    ]
    counted = vqa(458752001, *["2"] * 3, *["3"] * 7, answer_type="number")
    vqav2(tmp_path, questions, [counted, vqa(458752000)])  # annotations are found by id, not by place
    first, second = good(local("vqav2", tmp_path))
    assert (first.id, first.cluster, first.answers) == ("458752000", "458752", ("net",) * 10)
    assert first.prompt == "What is this photo taken looking through?" + SHORT
    assert colours([first, second]) == [RED, RED]
    task = read_task("vqav2")
    scores = [task.scores("a net", first), task.scores("Two", second)]
    assert [one["accuracy"] for one in scores] == [1, pytest.approx(0.9)]
    figures = task.figures([(one, sample.facts) for one, sample in zip(scores, (first, second), strict=True)])
    assert figures["accuracy, type number"] == pytest.approx(0.9)
    assert figures["accuracy, type other"] == 1


def test_vqav2_from_the_hub(hub: Callable[..., Path]):
    row = vqa(458752000, question="What is this?", image=picture())
    (found,) = good(from_hub("vqav2", hub("validation", default=[row])))
    assert (found.id, found.cluster, found.answers) == ("458752000", "458752", ("net",) * 10)
    assert found.facts["type"] == "other"


@pytest.mark.parametrize("place", ["", "questions1.2/"])
def test_gqa_from_its_own_files(tmp_path: Path, place: str):
    questions = {
        "201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "isBalanced": True},
        "201640614": {"imageId": "n235859", "question": "Who is wearing the dress?", "answer": "woman"},
    }
    write(tmp_path / place / "testdev_balanced_questions.json", questions)
    paint(tmp_path / "images/n161313.jpg", RED)
    paint(tmp_path / "images/n235859.jpg", BLUE)
    found = good(local("gqa", tmp_path))
    assert [(one.id, one.cluster, one.answers) for one in found] == [
        ("201307251", "n161313", ("no",)),
        ("201640614", "n235859", ("woman",)),
    ]
    assert colours(found) == [RED, BLUE]
    task = read_task("gqa")
    assert task.scores("Woman.", found[1]) == {"accuracy": 1.0}
    assert task.scores("the woman", found[1]) == {"accuracy": 0.0}


@pytest.mark.parametrize("configuration", ["", "testdev_balanced_instructions"])
def test_gqa_from_the_hub_joins_questions_and_pictures(hub: Callable[..., Path], configuration: str):
    questions = [
        {"id": "201307251", "imageId": "n161313", "question": "Is it overcast?", "answer": "no"},
        {"id": "201640614", "imageId": "n235859", "question": "Who wears it?", "answer": "woman"},
        {"id": "201640615", "imageId": "n000000", "question": "Who wears it?", "answer": "woman"},
    ]
    pictures = [{"id": "n235859", "image": picture(BLUE)}, {"id": "n161313", "image": picture(RED)}]
    folder = hub("testdev", testdev_balanced_instructions=questions, testdev_balanced_images=pictures)
    *found, broken = from_hub("gqa", folder, configuration)
    assert [one.id for one in good(found)] == ["201307251", "201640614"]
    assert colours(good(found)) == [RED, BLUE]
    assert isinstance(broken, Broken) and "n000000" in broken.error
