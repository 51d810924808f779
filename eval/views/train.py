"""Train `nano-views` from nothing.

``python -m vlm_budget.eval.views.train --preset cpu --seed 0 --out DIR``

Stages vision and language (see `stages`). Scenes are rendered when they are asked for; a renderer running
beside (``python -m vlm_budget.eval.views.shards``) saves that time. A checkpoint is written every minute;
with ``--resume`` a killed run takes up at its last checkpoint and ends in the same weights.
``OUT/nano-views`` is a complete model folder.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm_budget.eval.nano.train import learning_rate
from vlm_budget.eval.views.export import save
from vlm_budget.eval.views.modeling import ViewsConfig, build_model
from vlm_budget.eval.views.shards import QUESTIONS, SCENES, Shelf
from vlm_budget.eval.views.stages import STAGES, Stage, StageConfig

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration

NAME = "nano-views"
_LOG_EVERY = 100


@dataclass(frozen=True)
class Preset:
    """One training configuration.

    Attributes:
        vision: the first stage.
        language: the second stage.
        device: torch's name of it.
        model: sizes of the model.
        scenes: scenes a shard.
        questions: questions rendered with every scene.
        checkpoint_seconds: the longest stretch a kill can cost.
    """

    vision: StageConfig
    language: StageConfig
    device: str = "cpu"
    model: ViewsConfig = ViewsConfig()
    scenes: int = SCENES
    questions: int = QUESTIONS
    checkpoint_seconds: float = 60.0


PRESETS = {
    "cpu": Preset(
        vision=StageConfig(steps=3600, batch=96, shards=12, ready=8),
        language=StageConfig(steps=14_000, batch=8, ready=16, bf16=True),
    ),
    "gpu": Preset(
        vision=StageConfig(steps=12_000, batch=512, shards=160),
        language=StageConfig(steps=40_000, batch=64, lr=1e-3, shards=160, bf16=True),
        device="cuda",
    ),
}


class Run:
    """One seed's training: which stage and step it stands at, and its files under ``out``."""

    def __init__(self, preset: Preset, seed: int, out: Path, resume: bool = False) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.preset, self.seed, self.out = preset, seed, out
        self.device = torch.device(preset.device)
        self.shelf = Shelf(out / "shards", seed, preset.scenes, preset.questions)
        torch.manual_seed(seed)
        self.model: LlavaOnevisionForConditionalGeneration = build_model(preset.model)
        self.saved: dict[str, Any] = {}
        if resume and self.checkpoint.exists():
            self.saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.model.load_state_dict(self.saved["model"])
        self.minutes: dict[str, float] = self.saved.get("minutes", {})
        self.stage: Stage | None = None

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
        save(self.model, self.out / NAME)
        record = {"seed": self.seed, "minutes": self.minutes}
        (self.out / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n")

    def _stage(self, name: str) -> Iterator[tuple[str, int, float]]:
        config: StageConfig = getattr(self.preset, name)
        torch.manual_seed(self.seed + 1)
        stage = self.stage = STAGES[name](self.model, config, self.shelf, self.seed, self.device)
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


class _Log:
    """Means of what is told between two lines."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.started = time.monotonic()

    def add(self, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            total = self.sums.setdefault(key, [0.0, 0.0])
            total[0], total[1] = total[0] + value, total[1] + 1

    def line(self, stage: str, step: int) -> str:
        means = {key: round(total / count, 3) for key, (total, count) in sorted(self.sums.items())}
        self.sums = {}
        return json.dumps({"stage": stage, "step": step, "seconds": round(time.monotonic() - self.started)} | means)


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
    run, log = Run(PRESETS[args.preset], args.seed, args.out, args.resume), _Log()
    for stage, step, loss in run.losses():
        assert run.stage is not None, "a step without a stage"
        log.add({"loss": loss} | run.stage.told)
        if (step + 1) % _LOG_EVERY == 0:
            print(log.line(stage, step + 1), flush=True)


if __name__ == "__main__":
    main()
