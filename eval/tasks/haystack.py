"""Questions about short events in long clips, of held-out clips; drawn on the spot, no download.

``haystack`` takes 32 of a clip's 96 frames, ``haystack_dense`` asks the same of 64: at half the tokens per frame it is
the control of more frames with fewer tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

from PIL import Image

from vlm_budget.eval.frames import spread
from vlm_budget.eval.sample import Clip, Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Task
from vlm_budget.eval.tasks.rooms import score, summary
from vlm_budget.eval.views.clips import TEST_SEED, ClipSample, test_set
from vlm_budget.eval.views.scorer.captions import clues
from vlm_budget.video.frames.queries import Query

__all__ = ["load", "score", "summary"]


def load(source: Source, task: Task) -> Iterator[Sample]:
    """The questions, clip by clip, without end where no limit is given (500 then)."""
    seed = TEST_SEED if source.seed is None else source.seed
    left = 500 if source.limit is None else source.limit
    for index in count():
        sample, name = _clip(seed, index), f"clip-{index:05}"
        clip = Clip(name, Path(name), draw=partial(draw, seed, index))
        for number, question in enumerate(sample.questions):
            if not left:
                return
            left -= 1
            spans = [list(sample.scene.events[target].seconds) for target in question.targets]
            yield Sample(
                id=f"{name}-{number}",
                prompt=question.prompt,
                answers=(question.answer,),
                clip=clip,
                group=name,
                facts={"question": question.task, "seconds": spans},
                query=Query(question.prompt, targets=clues(question.prompt)),
            )


def draw(seed: int, index: int, frames: int) -> list[Image.Image]:
    """Some frames of a clip of a test set, spread evenly."""
    return list(_drawn(seed, index, frames))


@lru_cache(maxsize=32)  # a clip's questions stand one after another, and each asks for its frames
def _drawn(seed: int, index: int, frames: int) -> tuple[Image.Image, ...]:
    scene = _clip(seed, index).scene
    return tuple(Image.fromarray(scene.frame(index).pixels) for index in spread(len(scene.cameras), frames))


@lru_cache(maxsize=1024)
def _clip(seed: int, index: int) -> ClipSample:
    return test_set(1, seed, first=index)[0]
