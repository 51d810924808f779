"""Scores of free text against references: BLEU, ROUGE-L and CIDEr, written from their papers' definitions.

Words are runs of letters and digits in lower case, with the hyphens and apostrophes inside them. The COCO caption
evaluation takes words apart with a Java program instead (``don't`` becomes two words), so that figures may differ in
the third digit. METEOR is left out: it needs WordNet's synonyms, and is defined by the Java program that ships them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_ORDERS = (1, 2, 3, 4)
Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    """The words of a text."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def grams(tokens: Sequence[str], order: int) -> Counter[Gram]:
    """How often every run of ``order`` words occurs."""
    return Counter(tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1))


def bleu_counts(answer: str, references: Sequence[str]) -> dict[str, int]:
    """What corpus BLEU adds up over answers: matches and runs of every order, and both lengths.

    Papineni et al. 2002, sections 2.1 and 2.2: a run counts at most as often as in the one reference that has it most,
    and of the references' lengths the nearest counts, of two that are equally near the shorter.
    """
    said = words(answer)
    others = [words(one) for one in references]
    counts = {}
    for order in _ORDERS:
        mine = grams(said, order)
        most: Counter[Gram] = Counter()
        for other in others:
            most |= grams(other, order)
        counts[f"match{order}"] = sum((mine & most).values())
        counts[f"runs{order}"] = sum(mine.values())
    counts["length"] = len(said)
    counts["reference"] = min((len(one) for one in others), key=lambda size: (abs(size - len(said)), size))
    return counts


def bleu(counts: Iterable[Mapping[str, float]], order: int = 4) -> float:
    """Corpus BLEU (Papineni et al. 2002, section 2.3): geometric mean of precisions times the brevity penalty."""
    rows = list(counts)
    total = {name: sum(row[name] for row in rows) for name in (rows[0] if rows else ())}
    if not total or not all(total[f"match{n}"] for n in range(1, order + 1)):
        return 0.0
    precisions = [total[f"match{n}"] / total[f"runs{n}"] for n in range(1, order + 1)]
    brevity = min(0.0, 1 - total["reference"] / total["length"])
    return math.exp(brevity + sum(map(math.log, precisions)) / order)


def rouge_l(answer: str, references: Sequence[str], beta: float = 1.2) -> float:
    """ROUGE-L (Lin 2004, section 3): F score of the longest common subsequence, against the best of the references.

    As in the COCO caption evaluation (Chen et al. 2015), best precision and best recall are taken apart, and recall
    weighs ``beta`` times as much.
    """
    said = words(answer)
    precision = recall = 0.0
    for one in map(words, references):
        if said and one:
            common = _common(said, one)
            precision, recall = max(precision, common / len(said)), max(recall, common / len(one))
    if not precision:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


@dataclass(frozen=True)
class Cider:
    """CIDEr-D (Vedantam et al. 2015, section 6), as the COCO caption evaluation reports it.

    Attributes:
        questions: How many questions the references answer.
        seen: In the references of how many questions every run of up to four words occurs.
    """

    questions: int
    seen: Mapping[Gram, int]

    @classmethod
    def of(cls, references: Iterable[Sequence[str]]) -> Cider:
        """Frequencies among the references of all questions."""
        seen: Counter[Gram] = Counter()
        questions = 0
        for mine in references:
            questions += 1
            found: set[Gram] = set()
            for one in map(words, mine):
                for order in _ORDERS:
                    found |= set(grams(one, order))
            seen.update(found)
        return cls(questions, seen)

    def score(self, answer: str, references: Sequence[str], sigma: float = 6.0) -> float:
        """Likeness of an answer to its references, from 0 to 10; the corpus's CIDEr is the mean."""
        said, others = words(answer), [words(one) for one in references]
        total = 0.0
        for order in _ORDERS:
            mine = self._weights(said, order)
            for other in others:
                theirs = self._weights(other, order)
                size = _size(mine) * _size(theirs)
                if size:
                    common = sum(min(mine[run], theirs[run]) * theirs[run] for run in mine.keys() & theirs.keys())
                    total += common / size * math.exp(-((len(said) - len(other)) ** 2) / (2 * sigma**2))
        return 10 * total / (len(_ORDERS) * len(others))

    def _weights(self, tokens: Sequence[str], order: int) -> dict[Gram, float]:
        everything = math.log(max(1, self.questions))
        return {
            run: count * (everything - math.log(max(1, self.seen.get(run, 0))))
            for run, count in grams(tokens, order).items()
        }


def _size(weights: Mapping[Gram, float]) -> float:
    return math.sqrt(sum(value * value for value in weights.values()))


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for one in first:
        corner = 0
        for at, other in enumerate(second, 1):
            corner, row[at] = row[at], corner + 1 if one == other else max(row[at], row[at - 1])
    return row[-1]
