"""Questions about posters, and the held-out sets.

Four tasks, every prompt five words, every answer one word:

* ``retrieval``: "what color is digit 7" and "which digit is colored red" (asked only of a colour that one
  digit has);
* ``place``: "which corner has digit 7" (asked only of a digit well off the two middle lines);
* ``count``: "how many digits are red", the count drawn first among those the page offers, so that no answer
  dominates;
* ``existence``: "is any digit colored red", yes and no alike often.

On a ``faint`` page every question is about a faint digit, its colour, or an absent colour. Marks are never
asked about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm_budget.eval.nano.scene import CANVAS, COLOR_NAMES, Scene, random_scene

TASKS = ("retrieval", "place", "count", "existence")
CORNERS = ("topleft", "topright", "bottomleft", "bottomright")
PROMPT_WORDS = 5
QUESTIONS_PER_IMAGE = 6
VALIDATION_SEED, TEST_SEED = 9_000_001, 9_000_002
_FORMS = ("color", "digit", "place", "count", "existence")
_MIDLINE_MARGIN = 8


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        task: one of `TASKS`.
        hard_kind: the page's kind of hardness, or None on a clean page.
        prompt: `PROMPT_WORDS` words.
        answer: one word.
        targets: indices of the scene's items that decide the answer; empty for an absent colour.
    """

    task: str
    hard_kind: str | None
    prompt: str
    answer: str
    targets: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One page with its questions; ``scene`` holds what is where, for oracles and for training labels."""

    image: Image.Image
    questions: tuple[Question, ...]
    scene: Scene


def vocabulary() -> tuple[str, ...]:
    """Every word of every prompt and answer, in the order of their token ids after the special tokens."""
    words = [
        "what",
        "color",
        "is",
        "digit",
        "which",
        "colored",
        "corner",
        "has",
        "how",
        "many",
        "digits",
        "are",
        "any",
    ]
    return (*(str(i) for i in range(10)), *COLOR_NAMES, *CORNERS, "yes", "no", *words)


def _ask_color(scene: Scene, rng: np.random.Generator, asked: list[int]) -> Question:
    i = int(rng.choice(asked))
    item = scene.items[i]
    return Question("retrieval", scene.hard_kind, f"what color is digit {item.digit}", COLOR_NAMES[item.color], (i,))


def _ask_digit(scene: Scene, rng: np.random.Generator, asked: list[int]) -> Question | None:
    per_color = Counter(item.color for item in scene.items)
    unique = [i for i in asked if per_color[scene.items[i].color] == 1]
    if not unique:
        return None
    i = int(rng.choice(unique))
    item = scene.items[i]
    return Question(
        "retrieval",
        scene.hard_kind,
        f"which digit is colored {COLOR_NAMES[item.color]}",
        str(item.digit),
        (i,),
    )


def _ask_place(scene: Scene, rng: np.random.Generator, asked: list[int]) -> Question | None:
    half = CANVAS // 2
    clear = [i for i in asked if min(abs(scene.items[i].x - half), abs(scene.items[i].y - half)) >= _MIDLINE_MARGIN]
    if not clear:
        return None
    i = int(rng.choice(clear))
    item = scene.items[i]
    corner = CORNERS[2 * (item.y > half) + (item.x > half)]
    return Question("place", scene.hard_kind, f"which corner has digit {item.digit}", corner, (i,))


def _with_color(scene: Scene, color: int) -> tuple[int, ...]:
    return tuple(i for i, item in enumerate(scene.items) if item.color == color)


def _ask_count(scene: Scene, rng: np.random.Generator, asked: list[int]) -> Question:
    shown, present = {scene.items[i].color for i in asked}, {item.color for item in scene.items}
    candidates = [c for c in range(len(COLOR_NAMES)) if c in shown or c not in present]
    counts = [len(_with_color(scene, c)) for c in candidates]
    wanted = int(rng.choice(sorted(set(counts))))
    color = int(rng.choice([c for c, n in zip(candidates, counts, strict=True) if n == wanted]))
    return Question(
        "count",
        scene.hard_kind,
        f"how many digits are {COLOR_NAMES[color]}",
        str(wanted),
        _with_color(scene, color),
    )


def _ask_existence(scene: Scene, rng: np.random.Generator, asked: list[int]) -> Question:
    present = {item.color for item in scene.items}
    yes = rng.random() < 0.5
    colors = {scene.items[i].color for i in asked} if yes else set(range(len(COLOR_NAMES))) - present
    color = int(rng.choice(sorted(colors)))
    prompt = f"is any digit colored {COLOR_NAMES[color]}"
    return Question("existence", scene.hard_kind, prompt, "yes" if yes else "no", _with_color(scene, color))


_ASK = dict(zip(_FORMS, (_ask_color, _ask_digit, _ask_place, _ask_count, _ask_existence), strict=True))


def ask(scene: Scene, rng: np.random.Generator, n: int) -> tuple[Question, ...]:
    """Draw ``n`` questions, the five forms in turn.

    A form that the page cannot serve, or that would repeat a question, is replaced by another.
    """
    asked = [i for i, item in enumerate(scene.items) if item.faint or scene.hard_kind != "faint"]
    questions: list[Question] = []
    seen: set[str] = set()
    for k in range(n):
        form = _FORMS[k % len(_FORMS)]
        for _ in range(8):
            question = _ASK[form](scene, rng, asked)
            if question is not None and question.prompt not in seen:
                break
            form = str(rng.choice(_FORMS))
        question = question or _ask_color(scene, rng, asked)
        seen.add(question.prompt)
        questions.append(question)
    return tuple(questions)


def test_set(
    n_images: int, seed: int = TEST_SEED, questions_per_image: int = QUESTIONS_PER_IMAGE, first: int = 0
) -> list[Sample]:
    """Held-out pages with their questions, a pure function of the arguments.

    Image ``i`` depends on ``seed`` and ``i`` alone, so a shorter set is the beginning of a longer one.

    Args:
        n_images: number of pages.
        seed: `TEST_SEED` for published tables, `VALIDATION_SEED` for choosing anything.
        questions_per_image: questions asked about each page.
        first: index of the first page.
    """
    samples = []
    for index in range(first, first + n_images):
        rng = np.random.default_rng([seed, index])
        scene = random_scene(rng)
        samples.append(Sample(Image.fromarray(scene.pixels), ask(scene, rng, questions_per_image), scene))
    return samples


def priors(questions: Iterable[Question]) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer, per task and over all (the task known)."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.task, Counter())[question.answer] += 1
    best = {task: max(counter.values()) for task, counter in answers.items()}
    total = {task: counter.total() for task, counter in answers.items()}
    overall = sum(best.values()) / sum(total.values()) if total else float("nan")
    return {"all": overall} | {task: best[task] / total[task] for task in sorted(best)}
