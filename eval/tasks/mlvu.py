"""MLVU: questions about videos of three minutes to two hours; the seven multiple-choice kinds of its dev set."""

from __future__ import annotations

import re
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

KINDS = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The questions, kind by kind."""
    if source.root is None:
        root = media_root(source, "the videos")
        yield from samples(source.rows(task.data["hub"], "test"), partial(_hub_sample, root=root, task=task))
        return
    # Every file is read before anything is yielded: a kind that is missing would change the mean of the kinds.
    kinds = {kind: read_rows(source.find(f"json/{kind}.json", f"MLVU/json/{kind}.json")) for kind in KINDS}
    for kind, rows in kinds.items():
        yield from samples(rows, partial(_sample, kind=kind, root=source.folder, task=task), f"{kind}.json record")


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """Accuracy of every kind, and M-Avg: their plain mean, whatever their numbers of questions."""
    kinds = accuracy_by(rows, "question_type")
    return {"m_avg": sum(kinds.values()) / len(kinds), **kinds} if kinds else {}


def _sample(row: Mapping[str, Any], number: int, kind: str, root: Path, task: Task) -> Sample:
    options = texts(row, "candidates", least=2)
    answer = text(row, "answer")
    if options.count(answer) != 1:
        raise DataError(f"answer {answer!r} must be one of the candidates, once; they are {options!r}")
    video = text(row, "video")
    facts = {"options": options, "question_type": text(row, "question_type", kind)}
    return Sample(
        id=f"{kind}-{number}",
        prompt=task.ask(question=text(row, "question"), options=lettered(options, "({letter}) {option}")),
        answers=(LETTERS[options.index(answer)],),
        clip=find_video(root, (f"video/{kind}", f"MLVU/video/{kind}"), video),
        group=f"{kind}/{video}",
        facts=facts,
    )


def _hub_sample(row: Mapping[str, Any], number: int, root: Path, task: Task) -> Sample:
    """A row of the hub's copy, whose options may stand in the question and whose answer may be a letter."""
    question = text(row, "question")
    if row.get("candidates") is not None:
        options = plain(texts(row, "candidates", least=2))
    else:
        question, options = _apart(question)
    answer = text(row, "answer")
    if options.count(answer) == 1:
        letter = LETTERS[options.index(answer)]
    elif answer.strip("().") in list(LETTERS[: len(options)]):
        letter = answer.strip("().")
    else:
        raise DataError(f"answer {answer!r} is neither a letter nor one of the options {options!r}")
    video = text(row, "video_name" if row.get("video_name") is not None else "video")
    folders = ("", "video", *(f"video/{kind}" for kind in KINDS))
    return Sample(
        id=text(row, "question_id", str(number)),
        prompt=task.ask(question=question, options=lettered(options, "({letter}) {option}")),
        answers=(letter,),
        clip=find_video(root, folders, video),
        group=video,
        facts={"options": options, "question_type": text(row, "task_type", "all")},
    )


def _apart(question: str) -> tuple[str, list[str]]:
    """A question and the options on the lines behind it."""
    lines = [line.strip() for line in question.splitlines() if line.strip()]
    first = next((n for n, line in enumerate(lines) if re.match(r"\(?A[).:]\s", line)), len(lines))
    options = plain(lines[first:])
    if len(options) < 2 or options == lines[first:]:
        raise DataError("the record has no 'candidates', and its question lists no options (A), (B), ...")
    return "\n".join(lines[:first]), options
