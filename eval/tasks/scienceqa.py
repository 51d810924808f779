"""ScienceQA-IMG: multiple-choice questions of school science that come with a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_budget.errors import DataError
from vlm_budget.eval.choices import LETTERS, accuracy_by, lettered, score_choice
from vlm_budget.eval.sample import Broken, Picture, Sample
from vlm_budget.eval.source import Source, read_json, read_list, require
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, fingerprint, first_folder, optional, picture, samples, text, texts


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The test questions with a picture; the hub's have no id, so their number is it."""

    def build(record: Record, name: str, shown: Picture, group: str) -> Sample:
        choices, hint = texts(record, "choices"), optional(record, "hint")
        (right,) = require(record, ["answer"])
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices) <= len(LETTERS):
            raise DataError(f"'answer' must be the number of one of {len(choices)} choices from 0, got {right!r}")
        prompt = task.ask(
            context=f"Context: {hint}\n" if hint else "",
            question=text(record, "question"),
            options=lettered(choices),
        )
        facts = {"subject": optional(record, "subject") or "unknown", "options": choices}
        return Sample(name, prompt, (LETTERS[right],), (shown,), None, group, facts)

    def row(record: Record, number: int) -> Sample:
        shown = picture(record, f"row {number}")
        return build(record, f"row-{number:04}", shown, fingerprint(shown))

    def entry(record: Record, number: int) -> Sample:
        name = text(record, "pid")
        return build(record, name, Picture.inside(folder, f"{name}/{text(record, 'image')}"), "")

    if source.root is None:
        yield from samples(source.rows(task.data["hub"], task.data["split"]), row, "row")
        return
    places = ("", "scienceqa/", "data/scienceqa/", "data/")
    problems = read_json(source.find(*(f"{place}problems.json" for place in places)))
    if not isinstance(problems, dict):
        raise DataError(f"problems.json holds a {type(problems).__name__} where an object of problems is expected")
    names = read_list(source.find(*(f"{place}pid_splits.json" for place in places)), "test")
    folder = first_folder(source.folder, *(f"{place}{part}test" for part in ("images/", "") for place in places))
    yield from samples(_with_picture(problems, names), entry)


def score(answer: str, sample: Sample) -> Scores:
    """Whether the right letter was chosen, and whether any could be read."""
    return score_choice(answer, sample.facts["options"], sample.answers[0])


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """Accuracy by subject."""
    return accuracy_by(rows, "subject")


def _with_picture(problems: Mapping[str, Any], names: Sequence[Any]) -> Iterator[Any]:
    for name in map(str, names):
        record = problems.get(name)
        if record is None:
            yield Broken(f"problem {name}", "pid_splits.json names it, problems.json does not have it")
        elif not isinstance(record, Mapping):
            yield Broken(f"problem {name}", f"a {type(record).__name__} where an object with fields is expected")
        elif record.get("image"):
            yield {**record, "pid": name}
