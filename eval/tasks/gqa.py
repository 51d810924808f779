"""GQA: compositional questions about photographs, one short answer each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from vlm_budget.errors import DataError
from vlm_budget.eval.metrics import exact_match
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import Source, read_json
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, first_folder, identifier, picture, samples, text

_FILE = "testdev_balanced_questions.json"


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The balanced test-dev questions, in the file's order."""
    pictures: dict[str, Picture] = {}

    def build(record: Record, shown: Picture) -> Sample:
        prompt = task.ask(question=text(record, "question"))
        image = identifier(record, "imageId")
        return Sample(identifier(record, "id"), prompt, (text(record, "answer"),), (shown,), group=image)

    def row(record: Record, number: int) -> Sample:
        image = identifier(record, "imageId")
        if image not in pictures:
            raise DataError(f"the dataset of pictures has none for {image[:80]!r}")
        return build(record, pictures[image])

    def entry(record: Record, number: int) -> Sample:
        return build(record, Picture.inside(folder, f"{identifier(record, 'imageId')}.jpg"))

    if source.root is None:
        # The mirror has questions and pictures in two configurations of one dataset.
        hub, split = task.data["hub"], task.data["split"]
        name, _, configuration = (source.hub or hub).partition(",")
        questions = f"{name},{configuration or hub.partition(',')[2]}"
        photographs = f"{questions.removesuffix('_instructions')}_images"
        for one in replace(source, hub=photographs).rows(None, split):
            with suppress(DataError):  # its questions say so
                pictures[identifier(one, "id")] = picture(one, identifier(one, "id"))
        yield from samples(replace(source, hub=questions).rows(None, split), row, "row")
        return
    found = read_json(source.find(_FILE, f"*/{_FILE}"))
    if not isinstance(found, dict):
        raise DataError(f"{_FILE} holds a {type(found).__name__} where an object of questions is expected")
    folder = first_folder(source.folder, "images", "allImages/images")
    records = ({**one, "id": name} if isinstance(one, dict) else one for name, one in found.items())
    yield from samples(records, entry)


def score(answer: str, sample: Sample) -> Scores:
    """Whether the answer is the reference."""
    return {"accuracy": exact_match(answer, sample.answers[0])}
