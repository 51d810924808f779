"""ScanQA: questions about the rooms of ScanNet, asked here about pictures taken in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_budget.errors import DataError, ImageError
from vlm_budget.eval.captions import Cider, bleu, bleu_counts, rouge_l
from vlm_budget.eval.choices import accuracy_by
from vlm_budget.eval.frames import pictures_in, spread
from vlm_budget.eval.sample import Broken, Picture, Sample, inside
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.tasks.records import samples
from vlm_budget.eval.tasks.video import media_root, read_rows, text, texts

_FILES = ("ScanQA_v1.0_val.json", "qa/ScanQA_v1.0_val.json", "data/qa/ScanQA_v1.0_val.json")
# Pictures of a scene, as ScanNet's extracted frames are commonly laid out.
_VIEWS = (
    "scenes/{}",
    "frames_square/{}/color",
    "scannet_train_images/frames_square/{}/color",
    "posed_images/{}",
    "scans/{}/color",
)
# fmt: off
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)
# fmt: on
# How the authors' evaluation sorts questions: the first that occurs.
_KINDS = (
    ("Where", "place"),
    ("How many", "number"),
    ("What color", "colour"),
    ("What is the color", "colour"),
    ("What shape", "object nature"),
    ("What type", "object nature"),
    ("What kind", "object nature"),
    ("What is", "object"),
)


@dataclass(frozen=True, eq=False)
class SceneSample(Sample):
    """A question that knows how common every run of words is among all references, which CIDEr asks for.

    Attributes:
        cider: The frequencies; the same object for all samples, over the whole file whatever part of it is run.
    """

    cider: Cider = field(default_factory=lambda: Cider(0, {}))


def load(source: Source, task: Task) -> Iterator[Sample | Broken]:
    """The questions, in the order of the file."""
    if source.root is not None:
        rows = read_rows(source.find(*_FILES))
    else:
        rows = list(source.rows(task.data.get("hub"), "validation"))
    root = media_root(source, "the pictures of the scenes")
    tops = sorted({form.partition("/")[0] for form in _VIEWS})
    if not any((root / top).is_dir() for top in tops):
        places = ", ".join(form.format("<scene_id>") for form in _VIEWS)
        raise DataError(f"{str(root)!r} holds no pictures of scenes: expected one of {places}")
    cider = Cider.of(answers for row in rows if (answers := _answers(row)))
    views = lru_cache(maxsize=None)(_views)

    def make(row: Mapping[str, Any], number: int) -> Sample:
        scene, question = text(row, "scene_id"), text(row, "question")
        paths = views(root, scene)
        return SceneSample(
            id=text(row, "question_id"),
            prompt=task.ask(question=question),
            answers=tuple(texts(row, "answers")),
            images=tuple(Picture.inside(root, paths[at]) for at in spread(len(paths), task.frames)),
            group=scene,
            facts={"kind": next((kind for start, kind in _KINDS if start in question), "other")},
            cider=cider,
        )

    yield from samples(rows, make)


def score(answer: str, sample: Sample) -> Scores:
    """Exact match, its refined form, ROUGE-L, CIDEr, and what :func:`summary` makes BLEU of."""
    said, right = normalise(answer), [normalise(one) for one in sample.answers]
    exact = said in right and said != ""
    tight = "".join(said.split())
    # An empty answer is part of every reference, and is no answer.
    refined = bool(tight) and any(tight in one or (one and one in tight) for one in ("".join(r.split()) for r in right))
    counts = bleu_counts(answer, sample.answers)
    return {
        "exact_match": float(exact),
        "refined_match": float(exact or refined),
        "rouge_l": rouge_l(answer, sample.answers),
        **({"cider": sample.cider.score(answer, sample.answers)} if isinstance(sample, SceneSample) else {}),
        **{f"_bleu_{name}": float(value) for name, value in counts.items()},
    }


def summary(rows: Sequence[tuple[Scores, Mapping[str, Any]]]) -> Scores:
    """BLEU of the corpus, and exact match by kind of question."""
    start = "_bleu_"
    counts = [
        {name[len(start) :]: value for name, value in scores.items() if name.startswith(start)} for scores, _ in rows
    ]
    by_kind = accuracy_by([({"accuracy": scores["exact_match"]}, facts) for scores, facts in rows], "kind")
    return {
        "bleu_1": bleu(counts, 1),
        "bleu_4": bleu(counts, 4),
        **{name.replace("accuracy", "exact_match"): value for name, value in by_kind.items()},
    }


def normalise(answer: str) -> str:
    """An answer as exact match compares it.

    Lower case; only letters, digits and ``, ' - :`` stay; numbers up to twenty in words; no articles; a digit at the
    end of a word (``no1``) goes.
    """
    plain = re.sub(r"[^a-z0-9,'\s:-]+", "", answer.lower().replace("’", "'"))
    plain = re.sub(r"\b([a-z]+)[0-9]\b", r"\1", plain)
    plain = re.sub(r"(?<![\w.-])[0-9]{1,2}(?![\w-])", _in_words, plain)
    plain = re.sub(r"\b(?:a|an|the)\s+(?=[a-z])", "", plain)
    return " ".join(plain.split()).strip(",:' ")


def _in_words(found: re.Match[str]) -> str:
    value = int(found[0])
    return _NUMBERS[value] if value < len(_NUMBERS) and not found[0].startswith("0") or found[0] == "0" else found[0]


def _answers(row: object) -> list[str]:
    try:
        return texts(row, "answers") if isinstance(row, Mapping) else []
    except DataError:
        return []


def _views(root: Path, scene: str) -> list[str]:
    """A scene's pictures, as paths below the data folder, in the order they were taken."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", scene):
        raise DataError(f"scene_id must be a plain name such as 'scene0000_00', got {scene[:80]!r}")
    base = root.resolve()
    for form in _VIEWS:
        folder = inside(root, form.format(scene))
        if folder.is_dir():
            try:
                found = pictures_in(folder)
            except ImageError as error:
                raise DataError(str(error)) from error
            if found:
                return [str(path.relative_to(base)) for path in found]
    places = ", ".join(form.format(scene) for form in _VIEWS)
    raise DataError(f"there are no pictures of scene {scene!r} in any of {places}")
