"""Chosen frames and their weights, to an answer within a budget of visual tokens.

Two ways, by the model. Where frames have a grid of fixed size, the method ``quota`` resamples behind the tower; frames
that get nothing are not given to the tower at all, unless the others could not hold the budget. Where the model takes
pictures of any size, every frame is resized before the tower (:mod:`~vlm_budget.video.frames.pixels`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from vlm_budget import patch
from vlm_budget.budget import Budget
from vlm_budget.errors import UnsupportedModelError
from vlm_budget.frames import allocate_frames
from vlm_budget.models import find_family, layout_of
from vlm_budget.prompts import encode_prompts
from vlm_budget.registry import FAMILIES
from vlm_budget.report import Report

from .pixels import fit_grids, native_grid, own_grids, pixel_inputs
from .prompting import frames_text, video_text
from .reader import Frame

Stage = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Asked:
    """What is asked of the frames.

    Attributes:
        question: The question.
        duration: Seconds of the video, told with the frames' times; None to tell neither.
        max_new_tokens: Longest answer.
        quota: The method that gives frames their tokens.
    """

    question: str
    duration: float | None
    max_new_tokens: int
    quota: Any

    def times(self, frames: Sequence[Frame]) -> list[float]:
        """What the prompt says of the frames' times."""
        return [] if self.duration is None else [frame.time for frame in frames]


@dataclass(frozen=True)
class Answered:
    """An answer, and what every frame got.

    Attributes:
        text: The answer.
        tokens: Of every frame that was given.
        separators: Visual tokens that belong to no frame.
        budget: Tokens that were allowed.
        dense: Tokens of all frames at the model's own resolution.
        prompt: The whole prompt.
        report: What the patched model did with it.
    """

    text: str
    tokens: list[int]
    separators: int
    budget: int
    dense: int
    prompt: str
    report: Report


def answer_frames(
    model: Any,
    processor: Any,
    frames: Sequence[Frame],
    weights: Sequence[float],
    spend: Budget,
    asked: Asked,
    stage: Stage,
) -> Answered:
    """Answer a question about frames that share a budget by their weights.

    Args:
        model: A supported VLM.
        processor: Its processor.
        frames: In order of time.
        weights: Relevance of each.
        spend: Share of the frames' tokens at the model's own resolution, or tokens.
        asked: The question.
        stage: Times what happens inside.

    Raises:
        BudgetError: The frames cannot meet the budget.
        UnsupportedModelError: No family knows the model, or its frames cannot be told apart.
    """
    quota = asked.quota
    resize = own_grids(processor)
    with stage("prepare"):
        prepare = _resized if resize else _resampled
        ready = prepare(model, processor, frames, weights, spend, asked)
    with stage("answer"):
        # At 100 % a patch changes nothing; it only reports.
        within = Budget(1.0) if resize else Budget(ready.budget, "tokens", relative=False)
        with patch(model, quota, within) as handle, torch.inference_mode():
            handle.frames(ready.weights, of=ready.modality)
            ids = model.generate(**ready.inputs, max_new_tokens=asked.max_new_tokens, do_sample=False)
            report = handle.report()
    new = ids[0, ready.inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    separators = report.kept_tokens - sum(ready.tokens)
    return Answered(text, ready.tokens, separators, ready.budget, ready.dense, ready.prompt, report)


@dataclass(frozen=True)
class _Ready:
    """A prompt's inputs; ``tokens`` of every frame, ``weights`` of those that are given to the model, per video."""

    inputs: Any
    tokens: list[int]
    weights: list[Any]
    modality: Any
    budget: int
    dense: int
    prompt: str


# --- resized before the tower ----------------------------------------------------------------------------------------


def _resized(
    model: Any,
    processor: Any,
    frames: Sequence[Frame],
    weights: Sequence[float],
    spend: Budget,
    asked: Asked,
) -> _Ready:
    sizes: dict[tuple[int, int], int] = {}
    for frame in frames:
        if frame.image.size not in sizes:
            rows, cols = native_grid(processor, frame.image)
            sizes[frame.image.size] = rows * cols
    caps = [sizes[frame.image.size] for frame in frames]
    budget = spend.tokens(sum(caps))
    counts = allocate_frames(weights, budget, caps=caps, power=asked.quota.power, floor=asked.quota.floor)
    shown = [index for index, count in enumerate(counts) if count]
    given = [frames[index] for index in shown]
    fitted = fit_grids([counts[index] for index in shown], [frame.image.size for frame in given], cap=max(caps))
    pictures, times = [frame.image for frame in given], asked.times(given)
    inputs = pixel_inputs(processor, asked.question, pictures, fitted.grids, model, times)
    tokens = [0] * len(frames)
    for index, count in zip(shown, fitted.tokens, strict=True):
        tokens[index] = count
    prompt = processor.tokenizer.decode(inputs["input_ids"][0])
    modality = "video" if "video_grid_thw" in inputs else "image"
    given_weights = [[weights[index]] if modality == "video" else weights[index] for index in shown]
    return _Ready(inputs, tokens, given_weights, modality, budget, sum(caps), prompt)


# --- resampled behind the tower --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """What a frame is to the model.

    Attributes:
        modality: ``"video"`` where all frames are one video, ``"image"`` where each is a picture.
        size: The model's own tokens of a frame.
        cap: The most tokens of a frame: those before pooling.
        ends: Separators of the whole video, or of each picture.
    """

    modality: str
    size: int
    cap: int
    ends: int

    def dense(self, frames: int) -> int:
        """Visual tokens of so many frames."""
        return frames * self.size + (self.ends if self.modality == "video" else frames * self.ends)

    def share(self, weights: Sequence[float], budget: int, quota: Any) -> list[int]:
        """Tokens of every frame, as the method ``quota`` shares them out."""
        if budget >= self.dense(len(weights)):
            return [self.size] * len(weights)
        ends = self.ends if self.modality == "video" else 0
        least = max(1, min(quota.floor, self.cap) * len(weights))
        room = min(budget - (ends if budget - ends >= least else 0), self.size * len(weights))
        return allocate_frames(weights, room, caps=self.cap, power=quota.power, floor=quota.floor)


def _resampled(
    model: Any,
    processor: Any,
    frames: Sequence[Frame],
    weights: Sequence[float],
    spend: Budget,
    asked: Asked,
) -> _Ready:
    grid = _grid(model, processor, frames[0], asked)
    dense = grid.dense(len(frames))
    budget = spend.tokens(dense)
    given = list(range(len(frames)))
    while True:
        shares = grid.share([weights[index] for index in given], budget, asked.quota)
        told = [index for index, count in zip(given, shares, strict=True) if count]
        if len(told) == len(given) or budget > grid.dense(len(told)):
            break  # the rest has to stand in the prompt, since those told of have no room for the budget
        given = told
    tokens = [0] * len(frames)
    for index, count in zip(given, shares, strict=True):
        tokens[index] = count
    inputs, prompt = _encoded(
        processor, [frames[index] for index in given], [frames[index] for index in told], asked, model
    )
    return _Ready(inputs, tokens, [weights[index] for index in given], grid.modality, budget, dense, prompt)


def _encoded(
    processor: Any, given: Sequence[Frame], told: Sequence[Frame], asked: Asked, model: Any
) -> tuple[Any, str]:
    """Inputs and the prompt's text: frames that are given to the model, and those that it is told of."""
    videos = takes_videos(model, processor)
    if videos:
        text = video_text(processor, asked.question, asked.times(told), asked.duration)
    else:
        text = frames_text(processor, asked.question, len(given), asked.times(given))
    return encode_prompts(processor, [text], [[frame.image for frame in given]], model, videos), text


def takes_videos(model: Any, processor: Any) -> bool:
    """Whether frames are one video to a model and its processor; else each is a picture.

    InternVL's model knows pictures alone, but its processor cuts none of a video's frames into tiles.
    """
    _, _, family = find_family(model)
    known = "video" in family.encoders or FAMILIES.name_of(type(family)) == "internvl"
    return known and getattr(processor, "video_processor", None) is not None


def _grid(model: Any, processor: Any, frame: Frame, asked: Asked) -> _Grid:
    """What a frame is to the model, found from a prompt with two of them.

    Raises:
        UnsupportedModelError: The model does not keep the two apart.
    """
    _, base, family = find_family(model)
    items = _items(model, processor, [frame, frame], asked.question)
    sizes = [size for item in items for size in item.shown] if len(items) == 1 else [len(i.candidates) for i in items]
    if len(sizes) != 2 or sizes[0] != sizes[1]:
        raise UnsupportedModelError(
            f"{type(model).__name__} makes {len(items)} item(s) of {sizes} tokens of two equal frames, so neither "
            "can be given tokens of its own"
        )
    modality = items[0].modality
    finer = family.unpooled(base, modality) if asked.quota.unpooled and modality == "video" else None
    config: Any = base.config
    vision = config.vision_config
    cap = sizes[0] if finer is None else (vision.image_size // vision.patch_size) ** 2
    return _Grid(modality, sizes[0], cap, len(items[0].separators))


def _items(model: Any, processor: Any, frames: Sequence[Frame], question: str) -> Any:
    _, base, family = find_family(model)
    inputs, _ = _encoded(processor, frames, frames, Asked(question, None, 1, None), model)
    return layout_of(base, family, dict(inputs)).rows[0]
