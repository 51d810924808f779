"""ChartQA: questions about charts, one half by people, the other from summaries of the charts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_budget.errors import DataError
from vlm_budget.eval.choices import accuracy_by
from vlm_budget.eval.metrics import relaxed_accuracy
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import Source, read_list
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, fingerprint, first_folder, picture, samples, text

_PARTS = ("human", "augmented")


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The test questions, people's first; no record has an id, so the part and the record's number are it."""

    def row(record: Record, number: int) -> Sample:
        part = text(record, "type").removesuffix("_test")
        if part not in _PARTS:
            raise DataError(f"'type' must be human_test or augmented_test, got {part[:80]!r}")
        name = f"{part}-{number:04}"
        prompt, shown = task.ask(question=text(record, "question")), picture(record, name)
        return Sample(name, prompt, (text(record, "answer"),), (shown,), None, fingerprint(shown), {"part": part})

    def entries(part: str, charts: Path) -> Callable[[Record, int], Sample]:
        def entry(record: Record, number: int) -> Sample:
            prompt, chart = task.ask(question=text(record, "query")), text(record, "imgname")
            shown = Picture.inside(charts, chart)
            return Sample(
                f"{part}-{number:04}", prompt, (text(record, "label"),), (shown,), None, chart, {"part": part}
            )

        return entry

    if source.root is None:
        yield from samples(source.rows(task.data["hub"], task.data["split"]), row, "row")
        return
    files = [source.find(f"test/test_{part}.json", f"*/test/test_{part}.json") for part in _PARTS]
    halves = [
        (part, read_list(file), first_folder(file.parent, "png")) for part, file in zip(_PARTS, files, strict=True)
    ]
    for part, records, charts in halves:
        yield from samples(records, entries(part, charts), f"{part}, record")


def score(answer: str, sample: Sample) -> Scores:
    """Relaxed accuracy."""
    return {"relaxed_accuracy": relaxed_accuracy(answer, sample.answers[0])}


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """Relaxed accuracy by part."""
    means = accuracy_by([({"accuracy": scores["relaxed_accuracy"]}, facts) for scores, facts in rows], "part")
    return {f"relaxed_{name}": value for name, value in means.items()}
