"""Video-MME: 2700 questions about 900 videos of 11 seconds to an hour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm_budget.errors import DataError
from vlm_budget.eval.choices import LETTERS, accuracy_by, lettered, plain
from vlm_budget.eval.sample import Broken, Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import samples
from vlm_budget.eval.tasks.video import find_video, media_root, read_rows, text, texts

_FILES = (
    "test-00000-of-00001.parquet",
    "videomme/test-*.parquet",
    "data/test-*.parquet",
    "test.parquet",
    "videomme.json",
    "test.json",
    "videomme.jsonl",
    "test.jsonl",
)


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The questions, in the order of the file."""
    rows = read_rows(source.find(*_FILES)) if source.root is not None else source.rows(task.data["hub"], "test")
    root = media_root(source, "the videos")

    yield from samples(rows, partial(_sample, root=root, task=task))


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """Accuracy by the length of the video, its domain, and what is asked."""
    return accuracy_by(rows, "duration", "domain", "task_type")


def _sample(row: Mapping[str, Any], number: int, root: Path, task: Task) -> Sample:
    options = plain(texts(row, "options", least=2))
    answer = text(row, "answer").strip("().").upper()
    if answer not in list(LETTERS[: len(options)]):
        raise DataError(f"answer {answer!r} is none of {', '.join(LETTERS[: len(options)])}")
    video = text(row, "videoID")
    names = ("duration", "domain", "sub_category", "task_type")
    facts = {name: text(row, name) for name in names if row.get(name) is not None}
    return Sample(
        id=text(row, "question_id"),
        prompt=task.ask(question=text(row, "question"), options=lettered(options)),
        answers=(answer,),
        clip=find_video(root, ("data", "videos", "video"), video),
        group=video,
        facts={"options": options, **facts},
    )
