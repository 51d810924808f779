"""DocVQA: questions about scanned pages, answered by a span of their text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from vlm_budget.eval.metrics import anls
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import Source, read_list
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, first_folder, identifier, optional, picture, samples, text, texts

_FILE = "val_v1.0*.json"


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The validation questions of single-page DocVQA, in the file's order."""

    def build(record: Record, shown: Picture, page: str) -> Sample:
        prompt = task.ask(question=text(record, "question"))
        return Sample(identifier(record, "questionId"), prompt, texts(record, "answers"), (shown,), group=page)

    def row(record: Record, number: int) -> Sample:
        page = f"{optional(record, 'ucsf_document_id')}_{optional(record, 'ucsf_document_page_no')}".strip("_")
        page = page or f"document {identifier(record, 'docId')}"
        return build(record, picture(record, page), page)

    def entry(record: Record, number: int) -> Sample:
        name = text(record, "image")
        # Every record says documents/; today's download has the same files in spdocvqa_images/.
        return build(record, Picture.inside(pages, name.removeprefix("documents/")), PurePosixPath(name).stem)

    if source.root is None:
        yield from samples(source.rows(task.data["hub"], task.data["split"]), row, "row")
        return
    file = source.find(_FILE, f"val/{_FILE}", f"spdocvqa_qas/{_FILE}")
    records = read_list(file, "data")
    beside = (file.parent / "documents").is_dir()
    pages = first_folder(file.parent, "documents") if beside else first_folder(source.folder, "spdocvqa_images")
    yield from samples(records, entry)


def score(answer: str, sample: Sample) -> Scores:
    """Similarity to the nearest reference; its mean is the ANLS."""
    return {"anls": anls(answer, sample.answers)}
