"""How answers are scored: text metrics that several tasks share, written from their published definitions.

Every function takes texts as they are, and gives a number in [0, 1] or what was read from the answer. Multiple choice
is read in :mod:`vlm_budget.eval.choices`.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # neither apostrophe nor colon (possessives, times), nor signs such as % and $
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Stems of the contractions that the VQA evaluation knows, by ending. Where leaving the apostrophe out gives a word of
# its own (its, well, wed, shell, ill), there is none.
_CONTRACTED = {
    "'t": "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn needn oughtn shan shouldn wasn weren "
    "won wouldn",
    "'ve": "could might must not should they we what where who would you couldn't hadn't mightn't shouldn't wouldn't "
    "he'd it'd she'd somebody'd someone'd something'd there'd they'd we'd who'd y'all'd you'd",
    "'d": "he how it somebody someone something there they where who you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "ma'am o'clock 'twas y'all 'ow's'at",
}
# Every form with one apostrophe left out.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for ending, stems in _CONTRACTED.items()
    for word in (stem + ending for stem in stems.split())
    for place, letter in enumerate(word)
    if letter == "'"
}


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy: an answer is right when three people gave it, averaged over all people but one.

    ``mean over i of min(1, (people other than i who gave the answer) / 3)``, after :func:`vqa_normal` on both sides.
    Of ten people one in agreement gives 0.3, two 0.6, three 0.9, four 1.

    Source: Antol et al. 2015, "VQA: Visual Question Answering", and https://visualqa.org/evaluation.html.

    Args:
        answer: The model's answer.
        references: One answer per person; two or more.
    """
    said = vqa_normal(answer)
    same = sum(vqa_normal(one) == said for one in references)
    people = len(references)
    left_out_same, left_out_other = min(1.0, (same - 1) / 3), min(1.0, same / 3)
    return (same * left_out_same + (people - same) * left_out_other) / people


def vqa_normal(text: str) -> str:
    """An answer as the VQA evaluation compares it.

    Lower case; no period except before a digit; number words to ten as digits; no articles; contractions with their
    apostrophe; punctuation, except apostrophe and colon, to a space; commas within numbers dropped. As in the published
    evaluation, a mark beside a space is dropped, and all marks are where a number has a comma.

    Source: https://visualqa.org/evaluation.html.
    """
    text = " ".join(text.split())
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _MARKS:
        dropped = has_number or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if dropped else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", plain).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def anls(answer: str, references: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Normalised Levenshtein similarity to the nearest reference; its mean over questions is the ANLS.

    ``1 - NL`` where NL, the edit distance by the longer text's length, is below the threshold, else 0. Case does not
    count, nor does the number of spaces. The script of the challenge gives 0.5 where NL is 0.5 exactly; the paper, and
    this function, 0.

    Source: Biten et al. 2019, "Scene Text Visual Question Answering", equation 1.
    """
    said = _one_spaced(answer)
    distances = (_distance(said, _one_spaced(one)) for one in references)
    nearest = min(distances, default=1.0)
    return 1.0 - nearest if nearest < threshold else 0.0


def relaxed_accuracy(answer: str, reference: str, tolerance: float = RELAXED_TOLERANCE) -> float:
    """Whether a chart question is answered: numbers to 5 % of the reference, other texts exactly but for case.

    A percent sign divides by a hundred, on both sides. A number with a thousands separator is a text, as in the
    evaluations that published results come from.

    Source: Methani et al. 2020, "PlotQA", and Masry et al. 2022, "ChartQA", section 5.1.
    """
    said, expected = _number(answer), _number(reference)
    if said is not None and expected is not None:
        return float(abs(said - expected) <= tolerance * abs(expected))
    return float(answer.strip().lower() == reference.strip().lower())


def contains_reference(answer: str, references: Sequence[str], formula: bool = False) -> float:
    """Whether some reference stands in the answer.

    Case does not count; in formulas it does, and spaces do not.

    Source: Liu et al. 2023, "OCRBench", and its published evaluation.
    """
    normal = _unspaced if formula else _lower
    said = normal(answer)
    return float(any(normal(one) in said for one in references))


def exact_match(answer: str, reference: str) -> float:
    """Whether two texts are equal but for case, punctuation (ASCII) and the number of spaces.

    Source: Hudson and Manning 2019, "GQA" (accuracy: one point for the same answer).
    """
    return float(_unpunctuated(answer) == _unpunctuated(reference))


def yes_or_no(answer: str) -> str | None:
    """Yes or no by an answer's first four characters; None where they say neither.

    Source: the evaluation published with Fu et al. 2023, "MME".
    """
    start = answer.strip().lower()
    if start in ("y", "n"):
        return "yes" if start == "y" else "no"
    return next((word for word in ("yes", "no") if word in start[:4]), None)


def denies(answer: str) -> bool:
    """Whether an answer's first sentence has the word "no" or "not"; anything else counts as a yes.

    Source: the evaluation published with Li et al. 2023, "POPE".
    """
    words = answer.strip().partition(".")[0].replace(",", "").lower().split()
    return "no" in words or "not" in words


def _distance(first: str, second: str) -> float:
    """Edit distance by the longer text's length; 0 for two empty texts."""
    if first == second:
        return 0.0
    previous = list(range(len(second) + 1))
    for row, here in enumerate(first, 1):
        current = [row]
        for column, there in enumerate(second, 1):
            replaced = previous[column - 1] + (here != there)
            current.append(min(replaced, previous[column] + 1, current[-1] + 1))
        previous = current
    return previous[-1] / max(len(first), len(second))


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _one_spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _lower(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _unspaced(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _unpunctuated(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
