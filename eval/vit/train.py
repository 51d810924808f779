"""Train the classifier from nothing: ``python -m vlm_budget.eval.vit.train --seed 0 --out DIR``.

A checkpoint is written every minute; with ``--resume`` a killed run takes up at its last checkpoint and ends in the
same weights. ``OUT/model`` holds weights and configuration, ``OUT/run.json`` the recipe and the validation accuracy.

The class token alone teaches a small transformer slowly. Two throw-away heads speed it up: low patch tokens say what
their patch shows; patch tokens three quarters up, whether theirs is the digit that is asked for. That leaves the class
token two blocks to read it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_budget.eval.vit.modeling import VitConfig, build_model, load_from, predict, save
from vlm_budget.eval.vit.pages import (
    BACKGROUND,
    KINDS,
    NO_COLOR,
    VALIDATION_SEED,
    draw_page,
    images,
    labels,
    pages,
)

_WARMUP = 150
_LOG_EVERY = 100
_SHARD_STREAM, _ORDER_STREAM = range(2)
_BACKGROUND_WEIGHT = 0.3


@dataclass(frozen=True)
class Recipe:
    """How a run trains.

    Attributes:
        steps: Optimizer steps.
        batch: Pages per step.
        lr: Peak learning rate; warm-up, then cosine to zero.
        epochs: Times each page is seen.
        shard: Pages drawn at a time; a multiple of ``batch``.
        bf16: bfloat16 autocast.
        model: Size of the model.
        validation_pages: Pages of the validation accuracy.
        checkpoint_seconds: The longest stretch a kill can cost.
    """

    steps: int = 4400
    batch: int = 8
    lr: float = 1.5e-3
    epochs: int = 2
    shard: int = 2048
    bf16: bool = True
    model: VitConfig = VitConfig()
    validation_pages: int = 1000
    checkpoint_seconds: float = 60.0


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of a step."""
    warm = min(1.0, (step + 1) / _WARMUP)
    return recipe.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)) + 1e-5


class Learner(nn.Module):
    """The model with its throw-away heads."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.model = build_model(config)
        self.shown = nn.Linear(config.embed_dim, KINDS + NO_COLOR + 1)
        self.asked = nn.Linear(config.embed_dim, 1)
        self.shown_at, self.asked_at = config.depth * 3 // 8 - 1, config.depth * 3 // 4 - 1
        self.kind_weight = torch.ones(KINDS)
        self.kind_weight[BACKGROUND] = _BACKGROUND_WEIGHT
        self.color_weight = torch.ones(NO_COLOR + 1)
        self.color_weight[NO_COLOR] = _BACKGROUND_WEIGHT

    def loss(self, pixels: Tensor, label: Tensor, kinds: Tensor, colors: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
        """Losses of the class, of what patches show, and of which patches are asked for."""
        heights = [self.shown_at, self.asked_at]
        final, (low, high) = self.model.forward_intermediates(pixels, indices=heights, output_fmt="NLC")
        shown = self.shown(low).flatten(0, 1).float()
        kind = F.cross_entropy(shown[:, :KINDS], kinds.flatten(), self.kind_weight)
        color = F.cross_entropy(shown[:, KINDS:], colors.flatten(), self.color_weight)
        found = self.asked(high)[..., 0].float()
        place = F.binary_cross_entropy_with_logits(found, asked.float(), pos_weight=torch.tensor(8.0))
        return F.cross_entropy(self.model.forward_head(final).float(), label), kind + color, place


class Run:
    """One seed's training, and its files under ``out``."""

    def __init__(self, recipe: Recipe, seed: int, out: Path, resume: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.recipe, self.seed, self.out = recipe, seed, out
        torch.manual_seed(seed)
        self.learner = Learner(recipe.model)
        self.weights = list(self.learner.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=recipe.lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
        self.first, self.minutes = 0, 0.0
        self._shard_index = -1
        if resume and self.checkpoint.exists():
            saved: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.first, self.minutes = saved["step"], saved["minutes"]
            self.learner.load_state_dict(saved["learner"])
            self.optimizer.load_state_dict(saved["optimizer"])

    @property
    def checkpoint(self) -> Path:
        """The resumable state."""
        return self.out / "checkpoint.pt"

    def losses(self) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Train, yielding the step and its losses after every step; the finished model is saved."""
        spent, started = self.minutes, time.process_time()
        written = time.monotonic()
        for step in range(self.first, self.recipe.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.recipe, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
                losses = self.learner.loss(*self._batch(step))
            self.optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.minutes = spent + (time.process_time() - started) / 60
            if time.monotonic() - written > self.recipe.checkpoint_seconds:
                self._write(step + 1)
                written = time.monotonic()
            yield step, tuple(loss.item() for loss in losses)
        save(self.learner.model, self.recipe.model, self.out / "model")
        self._record()

    def _batch(self, step: int) -> tuple[Tensor, ...]:
        recipe = self.recipe
        index, offset = divmod(step, recipe.shard // recipe.batch * recipe.epochs)
        if index != self._shard_index:
            rng = self._rng(_SHARD_STREAM, index)
            drawn = [draw_page(rng) for _ in range(recipe.shard)]
            arrays = ([getattr(page, name) for page in drawn] for name in ("kinds", "colors", "asked"))
            self._shard = (images(drawn), labels(drawn), *(torch.from_numpy(np.stack(array)) for array in arrays))
            self._shard_index = index
        shuffle = self._rng(_ORDER_STREAM, index)
        order = np.concatenate([shuffle.permutation(recipe.shard) for _ in range(recipe.epochs)])
        chosen = torch.from_numpy(order[offset * recipe.batch : (offset + 1) * recipe.batch])
        return tuple(tensor[chosen] for tensor in self._shard)

    def _rng(self, stream: int, index: int) -> np.random.Generator:
        """Generator of one shard, the same after a restart."""
        return np.random.default_rng([self.seed, stream, index])

    def _write(self, step: int) -> None:
        state = {"step": step, "minutes": self.minutes, "learner": self.learner.state_dict()}
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, self.checkpoint.with_suffix(".tmp"))
        os.replace(self.checkpoint.with_suffix(".tmp"), self.checkpoint)

    def _record(self) -> None:
        drawn = pages(self.recipe.validation_pages, VALIDATION_SEED)
        right = (predict(load_from(self.out / "model"), images(drawn)) == labels(drawn)).float()
        result = {
            "seed": self.seed,
            "recipe": asdict(self.recipe),
            "cpu_minutes": round(self.minutes, 2),
            "validation": {"pages": len(drawn), "accuracy": float(right.mean())},
        }
        (self.out / "run.json").write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt if there is one")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (0: torch's own choice)")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run = Run(Recipe(steps=arguments.steps), arguments.seed, arguments.out, arguments.resume)
    mean: np.ndarray | None = None
    for step, losses in run.losses():
        mean = np.array(losses) if mean is None else 0.98 * mean + 0.02 * np.array(losses)
        if (step + 1) % _LOG_EVERY == 0:
            rounded = dict(zip(("class", "shown", "asked"), mean.round(4).tolist(), strict=True))
            print(json.dumps({"step": step + 1, **rounded, "cpu_minutes": round(run.minutes, 2)}), flush=True)


if __name__ == "__main__":
    main()
