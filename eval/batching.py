"""Which samples are asked together: those of like length, the same ones however many processes there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from vlm_budget.eval.sample import Broken, Sample

_WINDOW = 4  # batches


def windows(samples: Iterable[Sample | Broken], batch: int) -> Iterator[list[Sample | Broken]]:
    """Consecutive samples, a few batches at a time, so that a dataset is never held whole."""
    waiting = iter(samples)
    while window := list(islice(waiting, batch * _WINDOW)):
        yield window


def batches(window: Iterable[Sample | Broken], batch: int) -> Iterator[list[Sample | Broken]]:
    """A window's samples in batches of like length: the same kind of input, then pictures, then text.

    Args:
        window: Samples; records that are none come in a batch of their own.
        batch: The most in one.
    """
    kinds: dict[str, list[Sample | Broken]] = {}
    for one in window:
        kinds.setdefault(_kind(one), []).append(one)
    for members in kinds.values():
        ordered = sorted(members, key=_length)
        for start in range(0, len(ordered), batch):
            yield ordered[start : start + batch]


def _kind(one: Sample | Broken) -> str:
    """Samples of one kind can be asked together: either all or none of them come with geometry."""
    if isinstance(one, Broken):
        return "broken"
    return "video" if one.clip is not None else "picture" if one.views is None else "view"


def _length(one: Sample | Broken) -> tuple[int, int, str]:
    return (0, 0, one.id) if isinstance(one, Broken) else (len(one.images), len(one.prompt), one.id)


def halves(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """A batch that was too large, or holds a bad sample, as two."""
    middle = (len(samples) + 1) // 2
    return samples[:middle], samples[middle:]
