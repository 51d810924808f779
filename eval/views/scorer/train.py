"""Train the frame scorer from nothing.

``python -m vlm_budget.eval.views.scorer.train --seed 0 --out DIR``

Pictures and texts are compared as SigLIP does: every picture with every text, each a yes-or-no of its own, so that
``sigmoid(scale * cos + bias)`` is the probability that the picture shows what the text says. Throw-away heads are
taught what each patch shows, without which the outlines are found much later.

Step ``t`` is a pure function of the seed, ``t`` and the weights. A checkpoint is written every minute; with
``--resume`` a killed run takes up there and ends in the same weights. ``OUT/scorer`` is the finished folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_budget.eval.views.labels import NO_COLOR, NO_KIND
from vlm_budget.eval.views.scorer.captions import draw, membership
from vlm_budget.eval.views.scorer.modeling import MODEL, build_model, build_tokenizer, pixels, save, tokens
from vlm_budget.eval.views.shards import TASKS, Shelf

_SHARD_STREAM, _STEP_STREAM = range(2)
_BARE_WEIGHT = 0.2
_LOG_EVERY = 50


@dataclass(frozen=True)
class Config:
    """Length and batch.

    Attributes:
        steps: optimizer steps.
        batch: pictures a step.
        lr: peak learning rate; warm-up, then cosine to zero.
        warmup: steps.
        first, every: there are ``first`` shards of each task to begin with, and one more every so many steps.
        shards: most shards of each task.
        scenes: scenes a shard.
        bare: pictures without a thing that are kept, as a share of those with one.
        patch_weight: weight of the patch heads' loss.
        checkpoint_seconds: the longest stretch a kill can cost.
    """

    steps: int = 2000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 75
    first: int = 2
    every: int = 75
    shards: int = 20
    scenes: int = 256
    bare: float = 0.4
    patch_weight: float = 4.0
    checkpoint_seconds: float = 60.0

    def ready(self, step: int) -> int:
        """Shards of each task that step ``step`` draws from."""
        return min(self.first + step // self.every, self.shards)


@dataclass(frozen=True)
class Pool:
    """Pictures with their labels: uint8 ``[N, S, S, 3]``, patch labels int64 ``[N, 36]``, seen float32 ``[N, C]``."""

    pictures: Tensor
    kinds: Tensor
    colors: Tensor
    seen: Tensor

    def __len__(self) -> int:
        return len(self.pictures)


def pool(shelf: Shelf, index: int, seed: int, bare: float) -> Pool:
    """All pictures of shard ``index`` of both tasks that show a thing, and some that show none."""
    parts = [shelf.get(task, index) for task in TASKS]
    pictures, kinds, colors, summaries = (
        np.concatenate([getattr(part, name).reshape(-1, *getattr(part, name).shape[2:]) for part in parts])
        for name in ("pixels", "kinds", "colors", "summaries")
    )
    there = summaries.max(1)
    blank = np.flatnonzero(~there)
    rng = np.random.default_rng([seed, _SHARD_STREAM, index])
    keep = np.concatenate([np.flatnonzero(there), rng.permutation(blank)[: int(bare * there.sum())]])
    seen = np.column_stack([summaries, there])[keep].astype(np.float32)
    return Pool(
        torch.from_numpy(pictures[keep]),
        torch.from_numpy(kinds[keep].astype(np.int64)),
        torch.from_numpy(colors[keep].astype(np.int64)),
        torch.from_numpy(seen),
    )


def coarse_colors(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the pictures ``[B, 3, S, S]`` with colours at half resolution, as video codecs keep them."""
    coarse = torch.rand(len(pictures), generator=generator) < 0.25
    grey = pictures.mean(1, keepdim=True)
    chroma = F.interpolate(F.avg_pool2d(pictures - grey, 2), scale_factor=2.0)
    return torch.where(coarse[:, None, None, None], grey + chroma, pictures)


def _learning_rate(config: Config, step: int) -> float:
    return config.lr * min(1.0, (step + 1) / config.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))


class Run:
    """One seed's training and its files under ``out``.

    Args:
        config: length and batch.
        seed: of weights, pictures and texts.
        out: folder for the checkpoint and the result.
        resume: go on from the checkpoint if there is one.
        shards: where rendered shards lie or will; ``out / "shards"`` by default.
    """

    def __init__(self, config: Config, seed: int, out: Path, resume: bool = False, shards: Path | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.config, self.seed, self.out = config, seed, out
        self.shelf = Shelf(shards or out / "shards", seed, scenes=config.scenes)
        self.pools: list[Pool] = []
        torch.manual_seed(seed)
        self.model: Any = build_model()
        self.model.visual.output_tokens = True  # patch features for the throw-away heads; not part of what is saved
        width = MODEL["vision_cfg"]["width"]
        heads = {"kind": nn.Linear(width, NO_KIND + 1), "color": nn.Linear(width, NO_COLOR + 1)}
        self.module = nn.ModuleDict({"model": self.model, **heads})
        self.tokenizer = build_tokenizer()
        matrices = [p for p in self.module.parameters() if p.ndim > 1]
        others = [p for p in self.module.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
        self.first, self.seconds = 0, 0.0
        if resume and self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.first, self.seconds = saved["step"], saved["seconds"]
        self._kind_weight, self._color_weight = torch.ones(NO_KIND + 1), torch.ones(NO_COLOR + 1)
        self._kind_weight[NO_KIND] = self._color_weight[NO_COLOR] = _BARE_WEIGHT

    @property
    def checkpoint(self) -> Path:
        """The resumable state."""
        return self.out / "checkpoint.pt"

    def loss(self, step: int) -> tuple[Tensor, Tensor]:
        """Loss of step ``step``: that of the texts a picture (all of them together), and that of the patches."""
        ready = self.config.ready(step)
        while len(self.pools) < ready:
            self.pools.append(pool(self.shelf, len(self.pools), self.seed, self.config.bare))
        rng = np.random.default_rng([self.seed, _STEP_STREAM, step])
        chosen = rng.integers(ready, size=self.config.batch)
        rows = [self.pools[i] for i in chosen]
        places = [int(rng.integers(len(row))) for row in rows]
        pictures, kinds, colors, seen = (
            torch.stack([getattr(row, name)[place] for row, place in zip(rows, places, strict=True)])
            for name in ("pictures", "kinds", "colors", "seen")
        )
        mirrored = torch.from_numpy(rng.random(len(rows)) < 0.5)
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(2), pictures)
        side = math.isqrt(kinds.shape[1])
        kinds, colors = (
            torch.where(mirrored[:, None, None], grid.flip(2), grid).flatten(1)
            for grid in (kinds.view(-1, side, side), colors.view(-1, side, side))
        )
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        pooled, patches = self.model.visual(coarse_colors(pixels(pictures), generator))
        texts = draw(rng)
        words = self.model.encode_text(tokens(self.tokenizer, [text.words for text in texts]), normalize=True)
        logits = self.model.logit_scale.exp() * F.normalize(pooled, dim=-1) @ words.T + self.model.logit_bias
        target = (seen @ torch.from_numpy(membership(texts)).T > 0).float()
        pairs = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(rows)
        patches = patches.flatten(0, 1)
        patch = F.cross_entropy(self.module["kind"](patches), kinds.flatten(), self._kind_weight)
        patch = patch + F.cross_entropy(self.module["color"](patches), colors.flatten(), self._color_weight)
        return pairs, patch

    def losses(self) -> Iterator[tuple[int, float, float]]:
        """Train, yielding ``(step, loss of texts, loss of patches)`` after every step; then write ``OUT/scorer``."""
        self.module.train()
        started = written = time.monotonic()
        spent = self.seconds
        weights = list(self.module.parameters())
        for step in range(self.first, self.config.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = _learning_rate(self.config, step)
            pairs, patch = self.loss(step)
            self.optimizer.zero_grad()
            (pairs + self.config.patch_weight * patch).backward()
            nn.utils.clip_grad_norm_(weights, 5.0)
            self.optimizer.step()
            self.seconds = spent + time.monotonic() - started
            if time.monotonic() - written > self.config.checkpoint_seconds:
                self._write(step + 1)
                written = time.monotonic()
            yield step, pairs.item(), patch.item()
        self.module.eval()
        self._write(self.config.steps)
        save(self.model, self.out / "scorer")
        record = {"seed": self.seed, "minutes": self.seconds / 60}
        (self.out / "scorer.json").write_text(json.dumps(record, indent=1) + "\n")

    def _write(self, step: int) -> None:
        state = {"step": step, "seconds": self.seconds, "module": self.module.state_dict()}
        state["optimizer"] = self.optimizer.state_dict()
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        os.replace(self.checkpoint.with_suffix(".tmp"), self.checkpoint)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=Path, help="folder of rendered shards (OUT/shards by default)")
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt if there is one")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    run = Run(Config(steps=args.steps), args.seed, args.out, args.resume, args.shards)
    means: list[float] | None = None
    for step, *losses in run.losses():
        means = losses if means is None else [0.97 * m + 0.03 * new for m, new in zip(means, losses, strict=True)]
        if (step + 1) % _LOG_EVERY == 0:
            line = {"step": step + 1, "texts": round(means[0], 4), "patches": round(means[1], 4)}
            print(json.dumps(line | {"seconds": round(run.seconds)}), flush=True)


if __name__ == "__main__":
    main()
