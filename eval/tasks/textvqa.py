"""TextVQA: questions about text in photographs, ten answers each."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_budget.eval.metrics import vqa_accuracy
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import Source, read_list
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, first_folder, identifier, picture, samples, text, texts


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The validation questions, in the file's order."""

    def build(record: Record, shown: Picture) -> Sample:
        prompt = task.ask(question=text(record, "question"))
        answers = texts(record, "answers", count=10)
        return Sample(
            identifier(record, "question_id"), prompt, answers, (shown,), group=identifier(record, "image_id")
        )

    def row(record: Record, number: int) -> Sample:
        return build(record, picture(record, identifier(record, "image_id")))

    def entry(record: Record, number: int) -> Sample:
        return build(record, Picture.inside(folder, f"{identifier(record, 'image_id')}.jpg"))

    if source.root is None:
        yield from samples(source.rows(task.data["hub"], task.data["split"]), row, "row")
        return
    records = read_list(source.find("TextVQA_0.5.1_val.json", "*/TextVQA_0.5.1_val.json"), "data")
    folder = first_folder(source.folder, "train_images", "train_val_images/train_images")
    yield from samples(records, entry)


def score(answer: str, sample: Sample) -> Scores:
    """VQA accuracy over the ten answers."""
    return {"accuracy": vqa_accuracy(answer, sample.answers)}
