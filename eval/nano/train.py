"""Train `nano` and `nano-robust` from nothing.

``python -m vlm_budget.eval.nano.train --preset cpu --seed 0 --out DIR``

Stages vision, language, robust (see `stages`). A checkpoint is written every minute; with ``--resume`` a
killed run takes up at its last checkpoint and ends in the same weights. ``OUT/nano`` and ``OUT/nano-robust``
are complete model folders.
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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm_budget.eval.nano.data import VALIDATION_SEED, test_set
from vlm_budget.eval.nano.export import save
from vlm_budget.eval.nano.held_out import score, summarise
from vlm_budget.eval.nano.modeling import NanoConfig, build_model
from vlm_budget.eval.nano.stages import STAGES, Stage, StageConfig

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

_WARMUP = 150
_FLOOR_LR = 1e-5
_LOG_EVERY = 100
_PUBLISHED = {"language": "nano", "robust": "nano-robust"}


@dataclass(frozen=True)
class Preset:
    """One training configuration; `checkpoint_seconds` is the longest stretch a kill can cost."""

    vision: StageConfig
    language: StageConfig
    robust: StageConfig
    device: str = "cpu"
    model: NanoConfig = NanoConfig()
    validation_images: int = 300
    checkpoint_seconds: float = 60.0


PRESETS = {
    "cpu": Preset(
        vision=StageConfig(steps=6000, batch=12),
        language=StageConfig(steps=4000, batch=8, epochs=3, bf16=True, compiled=True),
        robust=StageConfig(steps=2000, batch=8, epochs=3, lr=1e-3, bf16=True),
    ),
    "gpu": Preset(
        vision=StageConfig(steps=20_000, batch=96, shard=12_288, epochs=4),
        language=StageConfig(
            steps=20_000, batch=64, shard=12_288, epochs=4, questions=16, lr=1e-3, bf16=True, compiled=True
        ),
        robust=StageConfig(steps=10_000, batch=64, shard=12_288, epochs=4, questions=16, lr=7e-4, bf16=True),
        device="cuda",
    ),
}


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up, then cosine down to a floor."""
    return peak * min(1.0, (step + 1) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + _FLOOR_LR


class Run:
    """One seed's training: which stage and step it stands at, and its files under ``out``."""

    def __init__(self, preset: Preset, seed: int, out: Path, resume: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.preset, self.seed, self.out = preset, seed, out
        self.device = torch.device(preset.device)
        torch.manual_seed(seed)
        self.model: LlavaNextForConditionalGeneration = build_model(preset.model)
        self.saved: dict[str, Any] = {}
        if resume and self.checkpoint.exists():
            self.saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.model.load_state_dict(self.saved["model"])
        self.minutes: dict[str, float] = self.saved.get("minutes", {})

    @property
    def checkpoint(self) -> Path:
        """The resumable state."""
        return self.out / "checkpoint.pt"

    def losses(self) -> Iterator[tuple[str, int, float]]:
        """Train, yielding ``(stage, step, loss)`` after every step."""
        names = list(STAGES)
        first = names.index(self.saved.get("stage", names[0]))
        for name in names[first:]:
            yield from self._stage(name)
            self.saved = {}
            if name in _PUBLISHED:
                save(self.model, self.out / _PUBLISHED[name])
                self._record(name)

    def _stage(self, name: str) -> Iterator[tuple[str, int, float]]:
        config: StageConfig = getattr(self.preset, name)
        torch.manual_seed(self.seed + 1)
        stage = STAGES[name](self.model, config, self.seed, self.device)
        weights = [p for p in stage.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
        first = 0
        if self.saved:
            first = self.saved["step"]
            stage.module.load_state_dict(self.saved["module"])
            optimizer.load_state_dict(self.saved["optimizer"])
        stage.module.train()
        started = written = time.monotonic()
        spent = self.minutes.get(name, 0.0)
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.lr, step, config.steps)
            loss = stage.step_loss(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            self.minutes[name] = spent + (time.monotonic() - started) / 60
            if time.monotonic() - written > self.preset.checkpoint_seconds:
                self._write(stage, optimizer, step + 1)
                written = time.monotonic()
            yield name, step, loss.item()
        stage.module.eval()

    def _write(self, stage: Stage, optimizer: torch.optim.Optimizer, step: int) -> None:
        state = {"stage": stage.name, "step": step, "minutes": self.minutes, "model": self.model.state_dict()}
        state |= {"module": stage.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        os.replace(self.checkpoint.with_suffix(".tmp"), self.checkpoint)

    def _record(self, name: str) -> None:
        samples = test_set(self.preset.validation_images, VALIDATION_SEED)
        result = {
            "validation": summarise(samples, score(self.model, samples)),
            "minutes": self.minutes,
            "seed": self.seed,
        }
        (self.out / f"{_PUBLISHED[name]}.json").write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt if there is one")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's own choice)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    run = Run(PRESETS[args.preset], args.seed, args.out, args.resume)
    mean, started = None, time.monotonic()
    for stage, step, loss in run.losses():
        mean = loss if mean is None or step == 0 else 0.98 * mean + 0.02 * loss
        if (step + 1) % _LOG_EVERY == 0:
            line = {
                "stage": stage,
                "step": step + 1,
                "loss": round(mean, 4),
                "seconds": round(time.monotonic() - started),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
