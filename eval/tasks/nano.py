"""Questions about the posters that nano was trained on, of held-out pages; drawn on the spot, no download."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count

from vlm_budget.eval.nano.data import TEST_SEED, test_set
from vlm_budget.eval.nano.data import Sample as Poster
from vlm_budget.eval.sample import Picture, Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Scores, Task

_AT_ONCE = 100


def load(source: Source, task: Task) -> Iterator[Sample]:
    """The questions of one kind, page by page, without end where no limit is given (500 then)."""
    seed = TEST_SEED if source.seed is None else source.seed
    wanted = 500 if source.limit is None else source.limit
    kind, found = task.name.removeprefix("nano_"), 0
    for block in count():
        for page, poster in enumerate(_posters(seed, block), block * _AT_ONCE):
            for number, question in enumerate(poster.questions):
                if question.task != kind:
                    continue
                if found == wanted:
                    return
                found += 1
                name = f"page-{page:05}"
                facts = {"hard": question.hard_kind or "no"}
                picture = Picture(name, poster.image)
                yield Sample(f"{name}-{number}", question.prompt, (question.answer,), (picture,), None, name, facts)


def score(answer: str, sample: Sample) -> Scores:
    """The one word, or not."""
    return {"accuracy": float(answer.strip() == sample.answers[0])}


@lru_cache(maxsize=64)
def _posters(seed: int, block: int) -> tuple[Poster, ...]:
    """Pages of a test set, a block at a time."""
    return tuple(test_set(_AT_ONCE, seed, first=block * _AT_ONCE))
