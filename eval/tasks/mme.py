"""MME: two yes-or-no questions about every picture, in fourteen categories of perception and cognition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_budget.errors import DataError
from vlm_budget.eval.metrics import yes_or_no
from vlm_budget.eval.sample import Broken, Picture, Sample, inside
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import Record, picture, samples, text, yes_no

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ENDINGS = (".jpg", ".png", ".jpeg", ".JPG", ".PNG", ".JPEG")


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The questions: by category and picture from a folder, in the dataset's order from the hub."""
    asked: dict[str, int] = {}

    def build(record: Record, number: int) -> Sample:
        name, category = text(record, "question_id"), text(record, "category")
        if category not in PERCEPTION + COGNITION:
            raise DataError(f"{category[:80]!r} is none of MME's categories")
        shown = record["image"] if isinstance(record.get("image"), Picture) else picture(record, name)
        answer, prompt = yes_no(record, "answer"), task.ask(question=text(record, "question").strip())
        asked[name] = asked.get(name, 0) + 1
        facts = {"category": category, "image": name}
        return Sample(f"{name}-{asked[name]}", prompt, (answer,), (shown,), None, name, facts)

    if source.root is None:
        yield from samples(source.rows(task.data["hub"], task.data["split"]), build, "row")
        return
    release = source.folder / "MME_Benchmark_release_version"
    roots = [one for one in (source.folder, release / "MME_Benchmark", release) if _categories(one)]
    if not roots:
        raise DataError(
            f"{str(source.folder)!r} has no folder {', '.join(PERCEPTION + COGNITION)}: is it MME's layout?"
        )
    records = [record for category in _categories(roots[0]) for record in _records(roots[0] / category)]
    yield from samples(records, build)


def score(answer: str, sample: Sample) -> Scores:
    """Whether yes or no is right; an answer that says neither is wrong."""
    return {"accuracy": float(yes_or_no(answer) == sample.answers[0])}


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """MME's scores: per category accuracy and accuracy+ in percent, added up over perception and over cognition.

    accuracy+ is the share of pictures with both questions right; pictures of which only one question was answered are
    left out of it. A category without questions adds nothing to its sum.
    """
    figures: dict[str, float] = {}
    sums = {"perception": 0.0, "cognition": 0.0}
    for category in PERCEPTION + COGNITION:
        pictures: dict[str, list[float]] = {}
        for scores, facts in rows:
            if facts["category"] == category:
                pictures.setdefault(facts["image"], []).append(scores["accuracy"])
        if not pictures:
            continue
        right = [value for values in pictures.values() for value in values]
        pairs = [values for values in pictures.values() if len(values) > 1]
        accuracy = sum(right) / len(right)
        plus = sum(all(values) for values in pairs) / len(pairs) if pairs else 0.0
        figures |= {f"accuracy, category {category}": accuracy, f"accuracy+, category {category}": plus}
        sums["perception" if category in PERCEPTION else "cognition"] += 100 * (accuracy + plus)
    return {**sums, "total": sum(sums.values()), **figures}


def _categories(root: Path) -> list[str]:
    return [one for one in PERCEPTION + COGNITION if (root / one).is_dir()]


def _records(folder: Path) -> Iterator[Record | Broken]:
    """Records of a category, shaped as the hub's; its pictures may lie beside the questions or in ``images/``."""
    category = folder.name
    split = (folder / "questions_answers_YN").is_dir()
    texts, pictures = (folder / "questions_answers_YN", folder / "images") if split else (folder, folder)
    for file in sorted(texts.glob("*.txt")):
        where = f"{category}/{file.name}"
        try:
            lines = inside(texts, file.name).read_text(encoding="utf-8-sig").splitlines()
            found = next((file.stem + end for end in _ENDINGS if (pictures / (file.stem + end)).exists()), None)
            if found is None:
                raise DataError(f"there is no picture {file.stem} in {pictures.name}/")
            shown = Picture.inside(pictures, found)
        except (DataError, OSError, UnicodeDecodeError) as error:
            yield Broken(where, str(error))
            continue
        for number, line in enumerate(lines, 1):
            question, tab, answer = line.rpartition("\t")
            if tab:
                name = f"{category}/{found}"
                yield {
                    "question_id": name,
                    "category": category,
                    "question": question,
                    "answer": answer,
                    "image": shown,
                }
            elif line.strip():
                yield Broken(f"{where} line {number}", "no question and answer with a tab between them")
