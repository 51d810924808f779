"""OCRBench: a thousand questions from 29 datasets about reading text in pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_budget.errors import DataError
from vlm_budget.eval.choices import accuracy_by
from vlm_budget.eval.metrics import contains_reference
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import Source, read_list
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, fingerprint, picture, samples, text, texts

_PICTURES = "OCRBench_Images"
_FORMULAS = "HME100k"  # handwritten expressions in LaTeX: case counts, spaces do not


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The questions, in the file's order; no record has an id, so its dataset and its number are it."""

    def build(record: Record, number: int, fields: tuple[str, str, str], shown: Picture, group: str) -> Sample:
        dataset, kind, answer = fields
        found = (text(record, answer),) if isinstance(record.get(answer), str) else texts(record, answer)
        if not all(one.strip() for one in found):
            raise DataError(f"{answer!r} has an empty reference, which would stand in every answer")
        facts = {"dataset": text(record, dataset), "kind": text(record, kind)}
        prompt = task.ask(question=text(record, "question"))
        return Sample(f"{facts['dataset']}-{number:04}", prompt, found, (shown,), None, group, facts)

    def row(record: Record, number: int) -> Sample:
        shown = picture(record, f"row {number}")
        return build(record, number, ("dataset", "question_type", "answer"), shown, fingerprint(shown))

    def entry(record: Record, number: int) -> Sample:
        name = text(record, "image_path")
        return build(record, number, ("dataset_name", "type", "answers"), Picture.inside(folder, name), name)

    if source.root is None:
        yield from samples(source.rows(task.data["hub"], task.data["split"]), row, "row")
        return
    file = source.find("OCRBench.json", "OCRBench/OCRBench.json")
    records = read_list(file)
    folder = next((one for one in (file.parent / _PICTURES, source.folder / _PICTURES) if one.is_dir()), file.parent)
    yield from samples(records, entry)


def score(answer: str, sample: Sample) -> Scores:
    """Whether a reference stands in the answer."""
    formula = sample.facts.get("dataset") == _FORMULAS
    return {"accuracy": contains_reference(answer, sample.answers, formula)}


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """The OCRBench score, right answers per thousand questions, and accuracy by kind of question."""
    right = sum(scores["accuracy"] for scores, _ in rows)
    return {"score": 1000 * right / len(rows), **accuracy_by(rows, "kind")}
