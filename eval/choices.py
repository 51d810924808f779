"""Multiple choice: writing the options, and reading the chosen letter out of what a model says, without guessing."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

LETTERS = string.ascii_uppercase
_STATED = re.compile(
    r"\b(?:answer|option|choice|choose|chose|select|selected|pick|go with)\b"
    r"(?:\s+(?:is|are|was|would|be|should|must|option|choice|answer|letter|the|correct|final|best|to|most|likely))*"
    r"\s*[:=\-]?\s*(?P<mark>\\boxed\{\s*|[(\[{]\s*)?(?P<letter>[A-Za-z])(?P<close>\s*[)\]}])?(?![\w'’])(?P<rest>[^\n]{0,12})",
    re.IGNORECASE,
)
_OPENING = re.compile(r"^(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])\s*[).:\]]|([A-Za-z])\s*,)(?=\s|$)")
_BRACKETED = re.compile(r"[(\[]\s*([A-Z])\s*[)\]]|\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Z])\)?\s*\}")
_LISTED = re.compile(r"(?:^|[\s,;])\(?([A-Z])[).:](?=\s)")
_ALONE = re.compile(r"^[(\[{]?\s*([A-Za-z])\s*[)\]}]?\s*[.,:;!]?$")
_OR = re.compile(r"^\s*(?:or|and|/|,|&)\s*[(\[]?\s*(?:option\s+|choice\s+)?([A-Za-z])(?![\w'’])", re.IGNORECASE)
_NEXT = re.compile(r"^\s*(?:or\s|and\s|/|,|&)?\s*[(\[]?([A-Z])(?:[.,:;!)\]]|\s+(?:or|and)\b|\s*$)")
_NOT = re.compile(r"\b(?:not|no|never|neither|nor|cannot)\b|n['’]t\b", re.IGNORECASE)
_LEAD = re.compile(
    r"^(?:so|therefore|thus|hence)?[,\s]*(?:the\s+)?(?:(?:best|correct|right|final)\s+)?"
    r"(?:answer|option|choice)\s*(?:is|:)\s*|^(?:it|this|that|he|she|they)\s+(?:is|are|was|were)\s+",
    re.IGNORECASE,
)


def lettered(options: Sequence[str], form: str = "{letter}. {option}") -> str:
    """Options, one a line, as in ``A. red``."""
    return "\n".join(form.format(letter=LETTERS[number], option=one) for number, one in enumerate(options))


def plain(options: Sequence[str]) -> list[str]:
    """Options without the letters that some datasets write before them (``"B. red"``); unchanged where any has none."""
    bare = []
    for number, one in enumerate(options):
        found = re.match(rf"\(?{LETTERS[number]}[.):]\s*(.*)$", one.strip(), re.DOTALL)
        if found is None:
            return [one.strip() for one in options]
        bare.append(found[1].strip())
    return bare


def read_choice(answer: str, options: Sequence[str]) -> str | None:
    """The letter that a model chose.

    In this order: a bare letter (``B``, ``(b)``, ``B.``), also as the first line of more; the last statement such as
    ``the answer is (B)``; a letter that opens the answer (``B. red``) or closes it on a line of its own; one bracketed
    letter; the text of one option.

    Args:
        answer: What it said. Of a reasoning model, what comes behind ``</think>`` counts.
        options: The options' texts, without letters.

    Returns:
        The letter; None where nothing is chosen, or more than one.
    """
    text = answer.rpartition("</think>")[2].replace("*", "").replace("`", "").strip()
    letters = LETTERS[: len(options)]
    if not text or not letters:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if found := _ALONE.match(text):
        return _known(found[1], letters)
    if len(lines) > 1 and (found := _ALONE.match(lines[0])) and (letter := _known(found[1], letters)):
        return letter
    stated = _stated(text, letters)
    if stated is not None:
        return stated or None
    opening = _OPENING.match(text)
    if opening is not None:
        letter = _known(opening[1] or opening[2] or opening[3], letters)
        # A list of all options opens with a letter too, and chooses none.
        others = {one for one in _LISTED.findall(text) if one in letters} - {letter}
        others |= {one for one in _NEXT.findall(text[opening.end() :]) if one in letters} - {letter}
        return None if others else letter
    if found := _ALONE.match(lines[-1]):
        return _known(found[1], letters)
    bracketed = {one or two for one, two in _BRACKETED.findall(text)} & set(letters)
    if bracketed:
        return bracketed.pop() if len(bracketed) == 1 else None
    return _by_text(text, options)


def score_choice(answer: str, options: Sequence[str], letter: str) -> dict[str, float]:
    """Accuracy of one answer, and whether a choice could be read out of it at all.

    An answer without a readable choice is wrong; it is not replaced by a random one.
    """
    chosen = read_choice(answer, options)
    return {"accuracy": float(chosen == letter), "readable": float(chosen is not None)}


def accuracy_by(rows: Sequence[tuple[Mapping[str, float], Mapping[str, Any]]], *names: str) -> dict[str, float]:
    """Mean accuracy per value of some facts, as ``"accuracy, duration short"``."""
    found: dict[str, list[float]] = {}
    for name in names:
        mine: dict[str, list[float]] = {}
        for scores, facts in rows:
            if name in facts and "accuracy" in scores:
                mine.setdefault(str(facts[name]), []).append(scores["accuracy"])
        found |= {f"accuracy, {name} {value}": mine[value] for value in sorted(mine, key=_by_number)}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _by_number(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _known(letter: str, letters: str) -> str | None:
    return letter.upper() if letter.upper() in letters else None


def _stated(text: str, letters: str) -> str | None:
    """The last statement's letter; an empty string where it names two, None where there is no statement."""
    last: str | None = None
    for found in _STATED.finditer(text):
        letter, rest = found["letter"], found["rest"] or ""
        marked = bool(found["mark"] or found["close"])
        # "the answer is a dog": bare letters count in capitals only, and A and I only where no word follows.
        if not marked and letter.islower() and rest.strip(" .!"):
            continue
        if not marked and letter in "AI" and re.match(r"\s+(?!because|since|as\b|for\b|or\b|and\b)[a-z]", rest):
            continue
        if letter.upper() not in letters:
            continue
        if _NOT.search(text[max(0, found.start() - 12) : found.start("letter")]):
            continue
        second = _OR.match(rest)
        last = "" if second and _known(second[1], letters) and second[1].upper() != letter.upper() else letter.upper()
    return last


def _by_text(text: str, options: Sequence[str]) -> str | None:
    """The one option whose words an answer consists of, or the only one that it names."""
    said = _words(_LEAD.sub("", text))
    words = [_words(one) for one in options]
    same = [number for number, one in enumerate(words) if one and one == said]
    if same:
        return LETTERS[same[0]] if len(same) == 1 else None
    whole = f" {_words(text)} "
    named = []
    for number in sorted(range(len(words)), key=lambda one: -len(words[one])):
        if words[number] and f" {words[number]} " in whole:
            named.append(number)
            # "red" inside "red car" names no second option.
            whole = whole.replace(f" {words[number]} ", " \0 ")
    if len(named) != 1 or words.count(words[named[0]]) != 1:
        return None
    # "No, it does not" chooses the option "no"; "it is not blue" chooses nothing.
    opens = _words(re.split(r"[,.;:!\n]", text, maxsplit=1)[0]) == words[named[0]]
    return LETTERS[named[0]] if opens or not _NOT.search(text) else None


def _words(text: str) -> str:
    found = re.findall(r"\w+", text.lower())
    while found and found[0] in ("a", "an", "the") and len(found) > 1:
        found = found[1:]
    return " ".join(found)
