"""Accuracy on held-out rooms and clips, with standard errors clustered by scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlm_budget.eval.statistics import clustered
from vlm_budget.eval.views import clips, rooms
from vlm_budget.eval.views.dropout import slots_of
from vlm_budget.eval.views.packing import PREFIX, Prefix, answer_logits, tower_features
from vlm_budget.eval.views.questions import Question, priors
from vlm_budget.eval.views.shards import FULL_FRAMES, encode

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration

Sample = rooms.RoomSample | clips.ClipSample
SETS = {"rooms": rooms, "haystack": clips}
"""The module with the scenes, questions and seeds of each task."""


def pictures(sample: Sample, frames: int = FULL_FRAMES) -> np.ndarray:
    """The views of a room, or so many evenly spread frames of a clip: uint8 ``[P, S, S, 3]``."""
    if isinstance(sample, rooms.RoomSample):
        return np.stack([picture.pixels for picture in sample.scene.pictures])
    return np.stack([sample.scene.frame(index).pixels for index in clips.evenly(frames)])


def draw_slots(task: str, count: int, scenes: int, share: float, generator: torch.Generator) -> Tensor:
    """Slots of a uniformly random ``share`` of the patch tokens of ``count`` pictures, newlines dropped: ``[B, k]``."""
    patch, _ = slots_of(task, count)
    keep = torch.rand(scenes, len(patch), generator=generator).topk(max(1, round(share * len(patch))), 1).indices
    return patch[keep].sort(1).values


class Ready(NamedTuple):
    """Samples of one task as the language model takes them: ``features`` of the tower ``[N, P, 36, Dv]``, ``tokens``
    of prompts and answers ``[N, Q, 8]``."""

    task: str
    features: Tensor
    tokens: Tensor


@torch.no_grad()
def prepare(model: LlavaOnevisionForConditionalGeneration, samples: Sequence[Sample], batch: int = 16) -> Ready:
    """Render the samples and run the tower, ``batch`` scenes at a time."""
    device, features = next(model.parameters()).device, []
    for start in range(0, len(samples), batch):
        pixels = np.stack([pictures(sample) for sample in samples[start : start + batch]])
        found = tower_features(model, torch.from_numpy(pixels).to(device).flatten(0, 1))
        features.append(found.unflatten(0, pixels.shape[:2]))
    tokens = torch.tensor([[encode(question) for question in sample.questions] for sample in samples])
    task = "rooms" if isinstance(samples[0], rooms.RoomSample) else "haystack"
    return Ready(task, torch.cat(features), tokens.to(device))


@torch.no_grad()
def score(
    model: LlavaOnevisionForConditionalGeneration,
    ready: Ready,
    share: float | None = None,
    renumber: bool = True,
    batch: int = 16,
) -> np.ndarray:
    """Which questions the model answers rightly: bool ``[N, Q]``.

    Args:
        model: the model.
        ready: `prepare`.
        share: keep a random share of the patch tokens and no newline; None keeps everything.
        renumber: number the kept tokens anew.
        batch: scenes at a time.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    for features, tokens in zip(ready.features.split(batch), ready.tokens.split(batch), strict=True):
        prefix: Prefix = PREFIX[ready.task](model, features)
        if share is not None:
            slots = draw_slots(ready.task, features.shape[1], len(features), share, generator)
            prefix = prefix.keep(slots.to(features.device), renumber)
        logits = answer_logits(model, prefix, tokens)
        rows.append((logits[:, :, 0].argmax(-1) == tokens[:, :, -1]).cpu())
    return torch.cat(rows).numpy()


def summarise(samples: Sequence[Sample], right: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy overall and of each form of question.

    Args:
        samples: the scenes.
        right: `score`, bool ``[N, Q]``.

    Returns:
        For each group accuracy, standard error, number of questions, and the prior (see `questions.priors`).
    """
    forms = np.array([[question.task for question in sample.questions] for sample in samples])
    masks = {"all": np.ones_like(right)} | {form: forms == form for form in dict.fromkeys(forms.flatten().tolist())}
    rows = {}
    for name, mask in masks.items():
        asked: list[Question] = [samples[i].questions[j] for i, j in np.argwhere(mask)]
        found = clustered(right, mask)
        rows[name] = {"accuracy": round(found["mean"], 4), "se": round(found["se"], 4), "questions": found["n"]}
        rows[name]["prior"] = round(priors(asked)["all"], 4)
    return rows
