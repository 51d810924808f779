"""VQAv2: questions about COCO photographs, ten answers each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_budget.errors import DataError
from vlm_budget.eval.choices import accuracy_by
from vlm_budget.eval.metrics import vqa_accuracy
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import Source, read_list, require
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, first_folder, identifier, optional, picture, samples, text

_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
_PEOPLE = 10


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The validation questions, in the file's order."""

    def build(record: Record, image: str, shown: Picture) -> Sample:
        prompt = task.ask(question=text(record, "question"))
        facts = {"type": optional(record, "answer_type") or "unknown"}
        name = identifier(record, "question_id")
        return Sample(name, prompt, _answers(record), (shown,), None, image, facts)

    def row(record: Record, number: int) -> Sample:
        image = identifier(record, "image_id")
        return build(record, image, picture(record, image))

    def entry(record: Record, number: int) -> Sample:
        image, name = identifier(record, "image_id"), identifier(record, "question_id")
        if not image.isdecimal():
            raise DataError(f"'image_id' must be a number, got {image[:80]!r}")
        if name not in annotations:
            raise DataError(f"{_ANNOTATIONS} has no question {name}")
        shown = Picture.inside(folder, f"COCO_val2014_{image.zfill(12)}.jpg")
        return build({**annotations[name], **record}, image, shown)

    if source.root is None:
        yield from samples(source.rows(task.data["hub"], task.data["split"]), row, "row")
        return
    questions = read_list(source.find(_QUESTIONS, f"*/{_QUESTIONS}"), "questions")
    found = read_list(source.find(_ANNOTATIONS, f"*/{_ANNOTATIONS}"), "annotations")
    annotations = {str(one["question_id"]): one for one in found if isinstance(one, dict) and "question_id" in one}
    folder = first_folder(source.folder, "val2014", "images/val2014")
    yield from samples(questions, entry)


def score(answer: str, sample: Sample) -> Scores:
    """VQA accuracy over the ten answers."""
    return {"accuracy": vqa_accuracy(answer, sample.answers)}


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """Accuracy by type of answer: yes/no, number, other."""
    return accuracy_by(rows, "type")


def _answers(record: Record) -> tuple[str, ...]:
    (given,) = require(record, ["answers"])
    if not isinstance(given, list | tuple) or len(given) != _PEOPLE:
        raise DataError(f"'answers' must be a list of {_PEOPLE}, got {str(given)[:80]!r}")
    if not all(isinstance(one, Mapping) for one in given):
        raise DataError("'answers' must be objects with a field 'answer'")
    return tuple(text(one, "answer") for one in given)
