"""POPE: whether an object is in a photograph; half of them are not, drawn in three ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from vlm_budget.errors import DataError
from vlm_budget.eval.metrics import denies
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import Source, read_lines
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, first_folder, identifier, picture, samples, text, yes_no

_CATEGORIES = ("random", "popular", "adversarial")


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The questions about COCO photographs: random objects, popular ones, then those that often come together."""

    def build(record: Record, category: str, fields: tuple[str, str], name: str, shown: Picture) -> Sample:
        question, label = fields
        found, prompt = yes_no(record, label), task.ask(question=text(record, question))
        facts = {"category": category, "label": found}
        group = PurePosixPath(name).stem
        return Sample(f"{category}-{identifier(record, 'question_id')}", prompt, (found,), (shown,), None, group, facts)

    def row(record: Record, number: int) -> Sample:
        category, name = text(record, "category"), text(record, "image_source")
        if category not in _CATEGORIES:
            raise DataError(f"'category' must be one of {', '.join(_CATEGORIES)}, got {category[:80]!r}")
        return build(record, category, ("question", "answer"), name, picture(record, name))

    def entries(category: str) -> Callable[[Record, int], Sample]:
        def entry(record: Record, number: int) -> Sample:
            name = text(record, "image")
            return build(record, category, ("text", "label"), name, Picture.inside(folder, name))

        return entry

    if source.root is None:
        yield from samples(source.rows(task.data["hub"], task.data["split"]), row, "row")
        return
    names = {one: f"coco_pope_{one}.json" for one in _CATEGORIES}
    files = {one: source.find(name, f"coco/{name}", f"output/coco/{name}") for one, name in names.items()}
    folder = first_folder(source.folder, "val2014", "coco/val2014")
    for category, file in files.items():
        yield from samples(read_lines(file), entries(category), f"{category}, record")


def score(answer: str, sample: Sample) -> Scores:
    """Whether yes or no is right; an answer without "no" or "not" counts as a yes."""
    return {"accuracy": float(("no" if denies(answer) else "yes") == sample.answers[0])}


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """Precision, recall and F1 of "yes", and the rate of "yes", over all questions and by category."""
    figures = _detection(rows)
    for category in _CATEGORIES:
        part = [row for row in rows if row[1]["category"] == category]
        if part:
            figures[f"accuracy, category {category}"] = sum(scores["accuracy"] for scores, _ in part) / len(part)
            figures |= {f"{name}, category {category}": value for name, value in _detection(part).items()}
    return figures


def _detection(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    hits = sum(scores["accuracy"] == 1 for scores, facts in rows if facts["label"] == "yes")
    present = sum(facts["label"] == "yes" for _, facts in rows)
    false_alarms = sum(scores["accuracy"] == 0 for scores, facts in rows if facts["label"] == "no")
    said = hits + false_alarms
    f1 = 2 * hits / (said + present) if said + present else 0.0
    precision, recall = hits / said if said else 0.0, hits / present if present else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "yes_rate": said / len(rows)}
