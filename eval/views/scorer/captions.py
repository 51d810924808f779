"""Texts the scorer is taught, and what has to be seen in a picture for each to be true of it.

A concept is a kind, a colour, a pair of both (in the order of `labels.SUMMARY`), or any thing at all. A text names one
or two concepts, and a picture shows what it says when it shows one of them. Questions are texts as well: true where the
thing they name is seen. Which thing answers them is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm_budget.eval.views.labels import SUMMARY
from vlm_budget.eval.views.questions import color_question, kind_question, vocabulary
from vlm_budget.eval.views.world import COLOR_NAMES, KINDS

ANYTHING = SUMMARY
CONCEPTS = SUMMARY + 1
_KINDS, _COLORS = range(len(KINDS)), range(len(COLOR_NAMES))
PLURALS = tuple(f"{kind}es" if kind.endswith("s") else f"{kind}s" for kind in KINDS)
UNKNOWN = "unheard"
"""Stands for any word that is not in `WORDS`."""

_KIND_FORMS = (
    "{kind}", "{kind}", "a {kind}", "the {kind}", "{kinds}", "a photo of a {kind}", "there is a {kind}",
    "a colored {kind}", "a {kind} in here", "a picture with a {kind}", "the color of the {kind}",
)  # fmt: skip
_COLOR_FORMS = (
    "{color}", "{color} thing", "{color} thing", "a {color} thing", "the {color} thing", "{color} things",
    "a {color} object", "{color} object", "thing colored {color}", "something {color}", "a photo of a {color} thing",
    "there is a {color} thing", "the color {color}",
)  # fmt: skip
_PAIR_FORMS = (
    "{color} {kind}", "a {color} {kind}", "a {color} {kind}", "the {color} {kind}", "{color} {kinds}",
    "a photo of a {color} {kind}", "there is a {color} {kind}", "a {kind} colored {color}", "a {color} {kind} in here",
)  # fmt: skip
_ANY_FORMS = ("thing", "a thing", "things", "something", "a colored thing", "object", "a colored object")
_NONE_FORMS = (f"{UNKNOWN}", f"a {UNKNOWN}", f"the {UNKNOWN}", f"a {UNKNOWN} {UNKNOWN}", f"{UNKNOWN} {UNKNOWN}")
_EITHER_FORMS = ("{one} or {other}", "{one} and {other}", "a {one} and a {other}", "{one} {other}")

ASKED_OF_KINDS = (
    color_question(0, 0, 0).prompt.removesuffix(KINDS[0]) + "{kind}",
    "which thing is nearest to the {kind}",
    "what color is the {kind}",
    "when is there a {kind}",
)
ASKED_OF_COLORS = (
    kind_question(0, 0, 0).prompt.removesuffix(COLOR_NAMES[0]) + "{color}",
    "how many things in here are {color}",
    "which thing is {color}",
    "is there a {color} thing",
)
ASKED_OF_TWO = "which thing comes first {one} or {other}"

_MORE = ("a", "photo", "picture", "with", "there", "object", "something", "and", "when", *PLURALS)
WORDS = tuple(dict.fromkeys((*vocabulary(), *_MORE)))
"""Words the scorer's tokenizer knows."""
_FILLERS = (UNKNOWN, UNKNOWN, "the", "is", "a", "in", "here")


@dataclass(frozen=True)
class Text:
    """A text, and the concepts of which one at least must be seen; none are for what no picture shows."""

    words: str
    concepts: tuple[int, ...]


def kind_concept(kind: int) -> int:
    """Concept of a kind."""
    return kind


def color_concept(color: int) -> int:
    """Concept of a colour."""
    return len(KINDS) + color


def pair_concept(kind: int, color: int) -> int:
    """Concept of a kind in a colour."""
    return len(KINDS) + len(COLOR_NAMES) + kind * len(COLOR_NAMES) + color


def membership(texts: tuple[Text, ...]) -> np.ndarray:
    """Which concepts make a text true: float32 ``[T, CONCEPTS]``."""
    table = np.zeros((len(texts), CONCEPTS), np.float32)
    for row, text in zip(table, texts, strict=True):
        row[list(text.concepts)] = 1
    return table


def clues(prompt: str) -> tuple[str, ...]:
    """What a reader who takes a question apart without fault looks for: ``cone``, or ``red thing``.

    Only the words of the question are read.
    """
    found = []
    for word in prompt.split():
        if word in KINDS:
            found.append(word)
        elif word in COLOR_NAMES:
            found.append(f"{word} thing")
    return tuple(found)


def _padded(rng: np.random.Generator, text: Text) -> Text:
    """The text with words put in that say nothing, in a quarter of the cases."""
    if rng.random() < 0.75:
        return text
    words = text.words.split()
    for _ in range(int(rng.integers(1, 5))):
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(_FILLERS)))
    return Text(" ".join(words), text.concepts)


def _kind(form: str, kind: int) -> Text:
    return Text(form.format(kind=KINDS[kind], kinds=PLURALS[kind]), (kind_concept(kind),))


def _color(form: str, color: int) -> Text:
    return Text(form.format(color=COLOR_NAMES[color]), (color_concept(color),))


def _pair(form: str, kind: int, color: int) -> Text:
    words = form.format(kind=KINDS[kind], kinds=PLURALS[kind], color=COLOR_NAMES[color])
    return Text(words, (pair_concept(kind, color),))


def draw(rng: np.random.Generator) -> tuple[Text, ...]:
    """Texts of one training step: every concept once in a random form, a question of each, and some of two concepts."""

    def pick(forms: tuple[str, ...]) -> str:
        return forms[rng.integers(len(forms))]

    texts = [_kind(pick(forms), kind) for kind in _KINDS for forms in (_KIND_FORMS, ASKED_OF_KINDS)]
    texts += [_color(pick(forms), color) for color in _COLORS for forms in (_COLOR_FORMS, ASKED_OF_COLORS)]
    texts += [_pair(pick(_PAIR_FORMS), kind, color) for kind in _KINDS for color in _COLORS]
    texts += [Text(pick(_ANY_FORMS), (ANYTHING,)), Text(pick(_NONE_FORMS), ())]
    for number in range(8):
        one, other = (int(kind) for kind in rng.permutation(len(KINDS))[:2])
        form = ASKED_OF_TWO if number % 2 else pick(_EITHER_FORMS)
        words = form.format(one=KINDS[one], other=KINDS[other])
        texts.append(Text(words, (kind_concept(one), kind_concept(other))))
    for _ in range(4):
        kinds, colors = rng.permutation(len(KINDS))[:2], rng.permutation(len(COLOR_NAMES))[:2]
        first, second = (f"{COLOR_NAMES[colors[i]]} {KINDS[kinds[i]]}" for i in range(2))
        concepts = tuple(pair_concept(int(kinds[i]), int(colors[i])) for i in range(2))
        texts.append(Text(pick(_EITHER_FORMS).format(one=first, other=second), concepts))
    return tuple(_padded(rng, text) for text in texts)
