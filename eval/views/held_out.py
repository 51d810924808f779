"""Accuracy on held-out rooms and clips, with standard errors clustered by scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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


@torch.no_grad()
def score(
    model: LlavaOnevisionForConditionalGeneration,
    samples: Sequence[Sample],
    share: float | None = None,
    renumber: bool = True,
    batch: int = 16,
) -> np.ndarray:
    """Which questions the model answers rightly: bool ``[N, Q]``.

    Args:
        model: the model.
        samples: scenes of one task.
        share: keep a random share of the patch tokens and no newline; None keeps everything.
        renumber: number the kept tokens anew.
        batch: scenes at a time.
    """
    device, rows = next(model.parameters()).device, []
    task = "rooms" if isinstance(samples[0], rooms.RoomSample) else "haystack"
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        pixels = torch.from_numpy(np.stack([pictures(sample) for sample in part])).to(device)
        tokens = torch.tensor([[encode(question) for question in sample.questions] for sample in part]).to(device)
        features = tower_features(model, pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        prefix: Prefix = PREFIX[task](model, features)
        if share is not None:
            slots = draw_slots(task, pixels.shape[1], len(part), share, generator)
            prefix = prefix.keep(slots.to(device), renumber)
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
