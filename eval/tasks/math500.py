"""MATH-500: problems of school competitions with a short answer; text only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_budget.eval.choices import accuracy_by
from vlm_budget.eval.latex import boxed, same_answer
from vlm_budget.eval.sample import Broken, Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import samples
from vlm_budget.eval.tasks.video import read_rows, text


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The problems, in the order of the file."""
    rows = read_rows(source.find("test.jsonl")) if source.root is not None else source.rows(task.data["hub"], "test")

    def make(row: Mapping[str, Any], number: int) -> Sample:
        return Sample(
            id=text(row, "unique_id"),
            prompt=task.ask(problem=text(row, "problem")),
            answers=(text(row, "answer"),),
            facts={"subject": text(row, "subject", "none"), "level": text(row, "level", "none")},
        )

    yield from samples(rows, make)


def score(answer: str, sample: Sample) -> Scores:
    """Whether the last boxed answer equals the reference, and whether there is one."""
    found = boxed(answer)
    right = found is not None and any(same_answer(found, one) for one in sample.answers)
    return {"accuracy": float(right), "readable": float(found is not None)}


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """Accuracy by level and subject."""
    return accuracy_by(rows, "level", "subject")
