"""What to look for in the frames of a video: a question taken apart into things, events, or nothing of the kind.

A frame scorer asked the whole question scores worse than one asked for what must be seen to answer it (QuoTA,
arXiv 2503.08689, Table 3). The answering model itself takes the question apart, in three steps; the wording is ours.
What it writes is foreign text: it is never run, and read within bounds.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm_budget.errors import OptionError

LONGEST_QUESTION = 4_000
"""Characters of a question; longer ones are refused, since no scorer could read them."""
MOST_CLUES, LONGEST_CLUE = 16, 64
"""Entries that are taken from a model's list, and characters of each."""
_LONGEST_ANSWER, _LONGEST_LIST = 16_384, 4_096  # characters of the model's text that are read

Kind = Literal["entities", "events"]


@dataclass(frozen=True)
class Query:
    """A question about a video, and what to look for.

    Attributes:
        text: The question.
        targets: Things that must be seen to answer it.
        cues: Things that are likely to be near them.
        events: What happens in the moments that answer it.
        note: Why nothing was found, or what was left out; empty otherwise.
    """

    text: str
    targets: tuple[str, ...] = ()
    cues: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    note: str = ""

    @property
    def clues(self) -> tuple[str, ...]:
        """Texts for a scorer that compares pictures with texts: what to look for, else the question itself."""
        return (*self.targets, *self.cues, *self.events) or (self.text,)


def check_question(question: Any) -> str:
    """A question with its ends trimmed.

    Raises:
        OptionError: It is no text, is empty, is longer than 4,000 characters, or holds half a character.
    """
    if not isinstance(question, str) or not question.strip():
        raise OptionError(f"a question is a text that is not empty, got {question!r:.80}")
    question = question.strip()
    if any("\ud800" <= letter <= "\udfff" for letter in question):  # what a shell's stray bytes become
        raise OptionError(f"the question is no text that can be written as UTF-8: {question!r:.80}")
    if len(question) > LONGEST_QUESTION:
        raise OptionError(
            f"the question has {len(question):,} characters, and frames are scored against at most "
            f"{LONGEST_QUESTION:,}. Ask about what must be seen, and leave the rest out."
        )
    return question


def as_query(question: str | Query) -> Query:
    """A question as a query that looks for the question itself; a query as it is.

    Raises:
        OptionError: No usable question, or what to look for is no list of texts.
    """
    if isinstance(question, Query):
        check_question(question.text)
        for name in ("targets", "cues", "events"):
            entries = getattr(question, name)
            if isinstance(entries, str) or not all(isinstance(entry, str) and entry.strip() for entry in entries):
                raise OptionError(f"{name} of a query are a list of texts that are not empty, got {entries!r:.80}")
        return question
    return Query(check_question(question))


def decouple(answer: Callable[[str], str], question: str, kind: Kind = "entities") -> Query:
    """Take a question apart, by a language model.

    Args:
        answer: Text to text: the answering model without a picture, greedy.
        question: The question.
        kind: ``"entities"`` for things to see (``targets``), ``"events"`` for what happens (``events``).

    Returns:
        The query. Where the model sees nothing to look for, or writes nothing that can be read, it has no clues of its
        own, and ``note`` says why.

    Raises:
        OptionError: No usable question, or no such kind.
    """
    if kind not in _WORDS:
        raise OptionError(f"a question is taken apart into {' or '.join(map(repr, _WORDS))}, got {kind!r}")
    question = check_question(question)
    clues, note = read_clues(answer(instruction(question, kind)))
    return Query(question, targets=clues, note=note) if kind == "entities" else Query(question, events=clues, note=note)


def instruction(question: str, kind: Kind = "entities") -> str:
    """What the answering model is asked, to take a question apart."""
    what, test, examples = _WORDS[kind]
    shown = "\n\n".join(
        f"Question: {asked}\nStep 1: {needed}\nStep 2: {listed}\nStep 3: {left}"
        for asked, needed, listed, left in examples
    )
    return (
        "You prepare a search through the frames of a video. Do not answer the question; say what to search for.\n"
        f"Step 1: Does one have to see particular {what} to answer? Write yes or no.\n"
        f"Step 2: If yes, list these {what} in a few words each, as a list in double quotes.\n"
        f"Step 3: Write the list again without whatever is not {test}. Write null if nothing is left.\n\n"
        f"{shown}\n\nQuestion: {question}\n"
    )


_WORDS: dict[str, tuple[str, str, Sequence[tuple[str, str, str, str]]]] = {
    "entities": (
        "physical things, people or animals",
        "something one could point at",
        (
            ("What color is the kettle on the stove?", "yes", '["kettle", "stove"]', '["kettle", "stove"]'),
            ("How long does the dancer keep her balance?", "yes", '["dancer", "balance"]', '["dancer"]'),
            ("What is the video about as a whole?", "no", "[]", "null"),
        ),
    ),
    "events": (
        "events or actions",
        "something one could watch happen",
        (
            ("What does the cook do after the soup boils over?", "yes", '["soup boils over"]', '["soup boils over"]'),
            ("Why is the boy sad when he drops the cup?", "yes", '["boy drops cup", "sadness"]', '["boy drops cup"]'),
            ("What is written on the red door?", "no", "[]", "null"),
        ),
    ),
}


def scorer_question(query: Query) -> str:
    """The yes/no question that a small VLM is asked about every frame."""
    things, events = ", ".join((*query.targets, *query.cues)), ", ".join(query.events)
    if things and events:
        asked = f"Does this picture show any of these things: {things}; or any part of one of these events: {events}?"
    elif things:
        asked = f"Does this picture show any of these things: {things}?"
    elif events:
        asked = f"Does this picture show any part of one of these events: {events}?"
    else:
        asked = f"Does this picture hold what is needed to answer the following question?\n{query.text}"
    return yes_no(asked)


def yes_no(asked: str) -> str:
    """A question with its two answers."""
    return f"{asked}\nA. yes\nB. no\nAnswer with the letter alone."


def given_clues(entries: Sequence[str]) -> tuple[str, ...]:
    """Things to look for that a user named.

    Raises:
        OptionError: One is empty, too long, no plain text, there are too many, or they are one text instead of a list.
    """
    if isinstance(entries, str):
        raise OptionError(f"things to look for are a list of texts, got {entries!r:.80}")
    for entry in entries:
        clues, _ = _clean([entry])
        if not clues:
            raise OptionError(
                f"{entry!r:.80} is nothing to look for: name it in 1 to {LONGEST_CLUE} characters, without brackets"
            )
    clues, left = _clean(entries)
    if left:
        raise OptionError(f"at most {MOST_CLUES} things can be looked for, got {len(entries)}")
    return clues


# --- reading what the model wrote ------------------------------------------------------------------------------------

_STEP_ONE = re.compile(r"step\s{0,3}1[^a-z0-9]{0,8}(yes|no)\b", re.IGNORECASE)
_STEP = re.compile(r"step\s{0,3}([23])[^a-z0-9\[]{0,8}", re.IGNORECASE)
_NEXT = re.compile(r"\n\s{0,8}question\s{0,3}:", re.IGNORECASE)  # models go on with questions of their own
_NEAR = 40  # characters behind "step 3" in which its list begins
_NULL = re.compile(r"(null|none|n/a)\b", re.IGNORECASE)
_CLUE = re.compile(r"[\w '’.,&/:+#%°!?-]+")  # no brackets, markup or special tokens: none is a thing to look for


def read_clues(text: Any) -> tuple[tuple[str, ...], str]:
    """The entries of the last list a model wrote in the three steps.

    Nothing is evaluated: the list is read as JSON, else as a Python literal, else as words between commas. At most 16
    entries of at most 64 printable characters are taken, each once; entries with brackets or markup are left out.

    Returns:
        The entries; and why there are none, or what was left out (empty where nothing was).
    """
    if not isinstance(text, str):
        return (), f"the model gave {type(text).__name__}, not text"
    text = _NEXT.split(text[:_LONGEST_ANSWER], maxsplit=1)[0]
    needed = _STEP_ONE.findall(text)
    if needed and needed[-1].lower() == "no":
        return (), "the model sees nothing in particular to look for"
    steps = {match[1]: match.end() for match in _STEP.finditer(text)}
    start = steps.get("3", steps.get("2"))
    if start is None:
        return (), "the model did not write the steps"
    if _NULL.match(text, start):
        return (), "the model sees nothing in particular to look for"
    opened = text.find("[", start, start + _NEAR)
    if opened < 0:
        return (), "the model wrote no list"
    inner = text[opened + 1 : opened + 1 + _LONGEST_LIST]
    end = inner.find("]")
    inner, cut = (inner[:end], False) if end >= 0 else (inner.rpartition(",")[0], True)
    clues, left = _clean(_entries(inner))
    notes = [f"left out {left} of the model's entries"] if left else []
    notes += ["the model's list has no end"] * cut + ["the model's list is empty"] * (not clues and not left)
    return clues, "; ".join(notes)


def _entries(inner: str) -> list[Any]:
    for read in (json.JSONDecoder(strict=False).decode, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that Python does not know
                return list(read(f"[{inner}]"))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: a set of sets
            continue
    return [part.strip().strip("\"'") for part in inner.split(",")]


def _clean(entries: Sequence[Any]) -> tuple[tuple[str, ...], int]:
    """Entries that can be looked for, and how many others there were (repeated ones not counted)."""
    kept: dict[str, str] = {}
    left = 0
    for entry in entries:
        clue = " ".join(entry.split()).strip(" .,") if isinstance(entry, str) else ""
        fits = 0 < len(clue) <= LONGEST_CLUE and _CLUE.fullmatch(clue) and any(map(str.isalnum, clue))
        if not fits or (len(kept) == MOST_CLUES and clue.casefold() not in kept):
            left += 1
        else:
            kept.setdefault(clue.casefold(), clue)
    return tuple(kept.values()), left
