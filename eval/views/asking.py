"""nano-views asked about rooms and clips through the real engine: ``patch``, what lies beside, one stock forward.

The questions of a scene are one batch. The answer is the most likely word behind the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

import vlm_budget
from vlm_budget.eval.tasks.rooms import views_of
from vlm_budget.eval.views.clips import ClipSample, evenly
from vlm_budget.eval.views.labels import NO_KIND, picture_labels
from vlm_budget.eval.views.rooms import RoomSample
from vlm_budget.pruner import Context, Pruner, Selection
from vlm_budget.video.frames.scorers import FrameScorer, relevance

if TYPE_CHECKING:
    from vlm_budget import PatchHandle
    from vlm_budget.video.frames.queries import Query

Budget = str | float


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint and its processor."""

    model: Any
    processor: Any

    def inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image], video: bool) -> dict[str, torch.Tensor]:
        """A batch that asks everything of the same pictures; all prompts have as many words."""
        token = self.processor.video_token if video else self.processor.image_token * len(pictures)
        shown = {"videos" if video else "images": [list(pictures)]}
        first = dict(self.processor(text=[f"{token} {prompts[0]}"], return_tensors="pt", **shown))
        tail = len(self.processor.tokenizer(prompts[0], add_special_tokens=False).input_ids)
        rows = [self.processor.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        ids = first["input_ids"].repeat(len(prompts), 1)
        ids[:, -tail:] = torch.tensor(rows)
        repeated = {
            name: value.repeat(len(prompts), *[1] * (value.ndim - 1))
            for name, value in first.items()
            if name not in ("input_ids", "attention_mask")
        }
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **repeated}

    @torch.no_grad()
    def right(self, inputs: dict[str, torch.Tensor], answers: Sequence[str]) -> np.ndarray:
        """[Q] bool, the most likely next word is the answer."""
        said = self.model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        expected = self.processor.tokenizer.convert_tokens_to_ids(list(answers))
        return (said.cpu() == torch.tensor(expected)).numpy()


@dataclass(frozen=True, eq=False)
class Room:
    """A room ready to be asked about."""

    sample: RoomSample
    inputs: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Model, sample: RoomSample) -> Room:
        """Render and process."""
        pictures = [Image.fromarray(one.pixels) for one in sample.scene.pictures]
        return cls(sample, model.inputs([q.prompt for q in sample.questions], pictures, video=False))

    @property
    def answers(self) -> list[str]:
        """Of its questions."""
        return [question.answer for question in self.sample.questions]

    def lay_beside(self, handle: PatchHandle) -> None:
        """Its geometry, once per question."""
        views, count = views_of(self.sample.scene), len(self.sample.questions)
        handle.views(
            depth=list(views.depth) * count,
            pose=np.tile(np.asarray(views.pose), (count, 1, 1)),
            intrinsics=np.tile(np.asarray(views.intrinsics), (count, 1, 1)),
        )


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip of which some frames are to be shown."""

    sample: ClipSample
    queries: Sequence[Query]
    frames: int

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The frames, spread evenly."""
        return [Image.fromarray(self.sample.scene.frame(index).pixels) for index in evenly(self.frames)]

    @property
    def answers(self) -> list[str]:
        """Of its questions."""
        return [question.answer for question in self.sample.questions]

    def inputs(self, model: Model) -> dict[str, torch.Tensor]:
        """Its questions as a batch."""
        return model.inputs([q.prompt for q in self.sample.questions], self.pictures, video=True)

    def scores(self, scorer: FrameScorer, raw: bool) -> list[torch.Tensor]:
        """Per question [frames], by its entities or by its very words."""
        asked = [query.text if raw else query for query in self.queries]
        return [relevance(scorer, self.pictures, one) for one in asked]


@dataclass(frozen=True, kw_only=True)
class Things(Pruner):
    """What no method may do: reads the labels, and keeps patches of things, view after view from the fullest on.

    Attributes:
        shows: Per view, whether each patch shows a thing.
    """

    shows: tuple[tuple[bool, ...], ...] = ()

    @property
    def joint(self) -> bool:
        """One choice among all views."""
        return True

    def pick_prompt(self, contexts: Sequence[Context], k: int) -> Selection:
        """Patches of things first, then any others in order."""
        order, start = [], 0
        for ctx, shown in zip(contexts, self.shows, strict=True):
            order += [(not thing, -sum(shown), start + place) for place, thing in enumerate(shown)]
            start += ctx.item.size
        return Selection(torch.tensor([place for *_, place in sorted(order)[:k]]))


@dataclass
class Seconds:
    """Where the time of asking went, in seconds."""

    scorer: float = 0.0
    model: float = 0.0


def ask_rooms(model: Model, rooms: Sequence[Room], method: Pruner | None, budget: Budget) -> np.ndarray:
    """[rooms, Q] bool, right or wrong."""
    if method is None:
        return np.stack([model.right(room.inputs, room.answers) for room in rooms])
    if isinstance(method, Things):
        return np.concatenate([_with_labels(model, room, method, budget) for room in rooms])
    found = []
    with vlm_budget.patch(model.model, method, budget) as handle:
        for room in rooms:
            if method.reads_views:
                room.lay_beside(handle)
            found.append(model.right(room.inputs, room.answers))
    return np.stack(found)


def _with_labels(model: Model, room: Room, method: Things, budget: Budget) -> np.ndarray:
    scene = room.sample.scene
    kinds = [picture_labels(picture, scene.room.things)[0] for picture in scene.pictures]
    shows = tuple(tuple(bool(kind != NO_KIND) for kind in own) for own in kinds)
    with vlm_budget.patch(model.model, replace(method, shows=shows), budget):
        return model.right(room.inputs, room.answers)[None]


def ask_clips(
    model: Model,
    clips: Sequence[Clip],
    method: Pruner | None,
    tokens: int | None,
    scorer: FrameScorer | None = None,
    raw: bool = False,
) -> tuple[np.ndarray, Seconds]:
    """[clips, Q] bool, right or wrong, and where the time went.

    Args:
        model: The model.
        clips: What to ask about.
        method: None shows all tokens of the frames.
        tokens: Of every prompt.
        scorer: What scores the frames; None where all count the same.
        raw: Score by the question itself, not by what it was decoupled into.
    """
    seconds, found = Seconds(), []

    def one(clip: Clip, handle: PatchHandle | None) -> np.ndarray:
        inputs = clip.inputs(model)
        if scorer is not None and handle is not None:
            started = time.perf_counter()
            handle.frames(clip.scores(scorer, raw))
            seconds.scorer += time.perf_counter() - started
        elif handle is not None and method is not None and method.reads_frames:
            handle.frames([torch.ones(clip.frames)] * len(clip.answers))
        started = time.perf_counter()
        right = model.right(inputs, clip.answers)
        seconds.model += time.perf_counter() - started
        return right

    if method is None:
        return np.stack([one(clip, None) for clip in clips]), seconds
    assert tokens is not None, "a method has a budget"
    with vlm_budget.patch(model.model, method, f"{tokens} tokens") as handle:
        for clip in clips:
            found.append(one(clip, handle))
    return np.stack(found), seconds
