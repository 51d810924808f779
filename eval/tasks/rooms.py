"""Questions about rooms seen in twelve posed views, of held-out rooms; drawn on the spot, no download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count

import numpy as np
from PIL import Image

from vlm_budget.eval.choices import accuracy_by
from vlm_budget.eval.sample import Picture, Sample, Views
from vlm_budget.eval.source import Source
from vlm_budget.eval.task import Scores, Task
from vlm_budget.eval.views.rooms import TEST_SEED, RoomSample, RoomScene, test_set
from vlm_budget.eval.views.scorer.captions import clues
from vlm_budget.video.frames.queries import Query


def load(source: Source, task: Task) -> Iterator[Sample]:
    """The questions, room by room, without end where no limit is given (500 then)."""
    seed = TEST_SEED if source.seed is None else source.seed
    left = 500 if source.limit is None else source.limit
    for index in count():
        room = _room(seed, index)
        name = f"room-{index:05}"
        images = tuple(
            Picture(f"{name} view {view}", Image.fromarray(one.pixels)) for view, one in enumerate(room.scene.pictures)
        )
        for number, question in enumerate(room.questions):
            if not left:
                return
            left -= 1
            yield Sample(
                id=f"{name}-{number}",
                prompt=question.prompt,
                answers=(question.answer,),
                images=images,
                group=name,
                facts={"question": question.task},
                views=views_of(room.scene),
                query=Query(question.prompt, targets=clues(question.prompt)),
            )


def views_of(scene: RoomScene) -> Views:
    """The geometry of a room's views."""
    return Views(
        [one.depth for one in scene.pictures],
        np.stack([one.pose for one in scene.cameras]),
        np.stack([one.intrinsics for one in scene.cameras]),
    )


def score(answer: str, sample: Sample) -> Scores:
    """The one word, or not."""
    return {"accuracy": float(answer.strip() == sample.answers[0])}


def summary(rows: Sequence[tuple[Mapping[str, float], Mapping[str, object]]]) -> Scores:
    """Accuracy by kind of question."""
    return accuracy_by(rows, "question")


@lru_cache(maxsize=128)  # a room holds a quarter of a megabyte and takes 30 ms to render
def _room(seed: int, index: int) -> RoomSample:
    return test_set(1, seed, first=index)[0]
