"""Accuracy on held-out pages, with standard errors clustered by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlm_budget.eval.nano.data import TASKS, Sample, priors
from vlm_budget.eval.nano.packing import (
    ALL_SLOTS,
    answer_logits,
    encode,
    partitions,
    project,
    vision_features,
)
from vlm_budget.eval.nano.scene import HARD_KINDS
from vlm_budget.eval.statistics import clustered

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration


@torch.no_grad()
def score(model: LlavaNextForConditionalGeneration, samples: Sequence[Sample], batch: int = 32) -> np.ndarray:
    """Which questions the model answers rightly with all visual tokens: bool ``[N, Q]``."""
    device = next(model.parameters()).device
    rows = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        pixels = partitions([sample.scene for sample in part]).to(device)
        tokens = encode([sample.questions for sample in part]).to(device)
        slots = ALL_SLOTS.to(device).expand(len(part), -1)
        logits = answer_logits(model, project(model, vision_features(model, pixels)), slots, tokens)
        rows.append((logits[:, :, 0].argmax(-1) == tokens[:, :, -1]).cpu())
    return torch.cat(rows).numpy()


def summarise(samples: Sequence[Sample], right: np.ndarray) -> dict[str, dict[str, float]]:
    """Accuracy overall, of each task on clean pages, and of each kind of hard page.

    Args:
        samples: the pages.
        right: `score`, bool ``[N, Q]``.

    Returns:
        For each group accuracy, standard error, number of questions, and the prior (see `priors`).
    """
    task = np.array([[question.task for question in sample.questions] for sample in samples])
    kind = np.array([[question.hard_kind or "" for question in sample.questions] for sample in samples])
    masks = {"all": np.ones_like(right)} | {name: (task == name) & (kind == "") for name in TASKS}
    masks |= {"hard": kind != ""} | {f"hard/{name}": kind == name for name in HARD_KINDS}
    rows = {}
    for name, mask in masks.items():
        chosen = (samples[i].questions[j] for i, j in np.argwhere(mask))
        found = clustered(right, mask)
        rows[name] = {"accuracy": round(found["mean"], 4), "se": round(found["se"], 4), "questions": found["n"]}
        rows[name]["prior"] = round(priors(chosen)["all"], 4)
    return rows
