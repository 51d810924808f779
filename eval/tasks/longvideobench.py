"""LongVideoBench: questions that refer to a moment of a video of up to an hour; its validation set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm_budget.errors import DataError
from vlm_budget.eval.choices import LETTERS, accuracy_by, lettered
from vlm_budget.eval.sample import Broken, Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import samples
from vlm_budget.eval.tasks.video import find_video, media_root, read_rows, text, texts

_FILES = ("lvb_val.json", "validation-00000-of-00001.parquet", "data/validation-*.parquet")


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The questions, in the order of the file."""
    rows = read_rows(source.find(*_FILES)) if source.root is not None else source.rows(task.data["hub"], "validation")
    root = media_root(source, "the videos")

    yield from samples(rows, partial(_sample, root=root, task=task))


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """Accuracy by the length of the video (up to 15, 60, 600, 3600 seconds) and by what is asked."""
    return accuracy_by(rows, "duration_group", "question_category")


def _sample(row: Mapping[str, Any], number: int, root: Path, task: Task) -> Sample:
    if row.get("candidates") is not None:
        options = texts(row, "candidates", least=2)
    else:  # the hub's columns: five, filled up with "N/A"
        columns = [f"option{number}" for number in range(5)]
        options = [text(row, name) for name in columns if row.get(name) not in (None, "N/A")]
        if len(options) < 2:
            raise DataError(f"the record has no 'candidates' and no 'option0' ...; it has {', '.join(map(str, row))}")
    right = row.get("correct_choice")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(options):
        raise DataError(f"correct_choice must be a number from 0 to {len(options) - 1}, got {right!r}")
    names = ("duration_group", "question_category", "topic_category", "level")
    facts = {name: text(row, name) for name in names if row.get(name) is not None}
    return Sample(
        id=text(row, "id"),
        prompt=task.ask(question=text(row, "question"), options=lettered(options)),
        answers=(LETTERS[right],),
        clip=find_video(root, ("videos",), text(row, "video_path")),
        group=text(row, "video_id"),
        facts={"options": options, **facts},
    )
