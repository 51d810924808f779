"""Words, and what rooms and clips have in common: every prompt has seven words, every answer one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_budget.eval.views.world import COLOR_NAMES, KINDS

PROMPT_WORDS = 7
COUNTS = ("0", "1", "2", "3")
# fmt: off
_WORDS = (
    "what", "is", "the", "color", "of", "which", "thing", "in", "here", "colored", "how", "many", "things", "are",
    "nearest", "to", "comes", "first", "or",
)
# fmt: on


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        task: its form, such as ``color``.
        prompt: `PROMPT_WORDS` words.
        answer: one word.
        targets: indices of the things (rooms) or events (clips) that decide the answer; empty for a count of 0.
    """

    task: str
    prompt: str
    answer: str
    targets: tuple[int, ...] = ()


def vocabulary() -> tuple[str, ...]:
    """Every word of every prompt and answer, in the order of their token ids after the special tokens."""
    return (*COUNTS, *COLOR_NAMES, *KINDS, *_WORDS)


def color_question(index: int, kind: int, color: int) -> Question:
    """What colour the thing of a kind has."""
    return Question("color", f"what is the color of the {KINDS[kind]}", COLOR_NAMES[color], (index,))


def kind_question(index: int, kind: int, color: int) -> Question:
    """Which thing has a colour; to be asked only of a colour that one thing has."""
    return Question("kind", f"which thing in here is colored {COLOR_NAMES[color]}", KINDS[kind], (index,))


def unique_colors(colors: Sequence[int]) -> list[int]:
    """Indices of those whose colour no other has."""
    many = Counter(colors)
    return [index for index, color in enumerate(colors) if many[color] == 1]


def draw(asks: Mapping[str, Callable[[], Question | None]], rng: np.random.Generator, n: int) -> tuple[Question, ...]:
    """``n`` questions, the forms in turn from a random first one.

    A form that the scene cannot serve, or that would repeat a question, is replaced by another.
    """
    forms = list(asks)
    start, questions, seen = int(rng.integers(len(forms))), [], set()
    for turn in range(n):
        form, fallback = forms[(start + turn) % len(forms)], None
        for _ in range(12):
            question = asks[form]()
            fallback = question or fallback
            if question is not None and question.prompt not in seen:
                break
            form = forms[rng.integers(len(forms))]
        question = question or fallback
        assert question is not None, "a scene that no form can ask about"
        seen.add(question.prompt)
        questions.append(question)
    return tuple(questions)


def priors(questions: Iterable[Question]) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer, per task and over all (the task known)."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.task, Counter())[question.answer] += 1
    best = {task: max(counter.values()) for task, counter in answers.items()}
    total = {task: counter.total() for task, counter in answers.items()}
    overall = sum(best.values()) / sum(total.values()) if total else float("nan")
    return {"all": overall} | {task: best[task] / total[task] for task in sorted(best)}
