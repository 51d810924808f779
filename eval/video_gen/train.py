"""Train the small video model: ``python -m vlm_budget.eval.video_gen.train runs/nano-video --minutes 60``.

Flow matching: the model sees ``(1 - sigma) * clip + sigma * noise`` and learns ``noise - clip``. Clips grow in three
stages, since small ones teach the same words and places at a tenth of the price. Weights are averaged (EMA), and saved
every few minutes with all that a second start needs to go on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .clips import Size, draw_clips, draw_words, embed
from .modeling import build
from .sharpness import keys_needed

STEP = 3e-3
"""Learning rate of both optimisers."""
FORGET = 0.1
"""Share of clips that are shown without their words, for guidance."""


@dataclass(frozen=True)
class Stage:
    """A part of training.

    Attributes:
        until: Share of the time at which it ends.
        size: Of its clips.
        batch: Clips per step.
    """

    until: float
    size: Size
    batch: int


STAGES = (Stage(0.15, Size(6, 24), 12), Stage(0.3, Size(8, 32), 8), Stage(1.0, Size(12, 40), 4))


@dataclass
class Progress:
    """How far training is.

    Attributes:
        steps: Steps done.
        clips: Clips seen.
        seconds: Wall-clock time of them.
    """

    steps: int = 0
    clips: int = 0
    seconds: float = 0.0


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "blocks" in name]
    theirs = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in theirs]
    muon = torch.optim.Muon(matrices, lr=STEP, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=STEP, weight_decay=0.0, betas=(0.9, 0.98))]


def rate(progress: Progress, share: float) -> float:
    """Factor of the learning rate: a short rise, a plateau, half a cosine."""
    rise = min(1.0, (progress.steps + 1) / 60)
    return rise * (1.0 if share < 0.4 else 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (share - 0.4) / 0.6)))


def loss_of(model: nn.Module, stage: Stage, generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the velocity on freshly drawn clips, noise levels stratified over the batch."""
    words = draw_words(stage.batch, generator)
    clips = draw_clips(words, stage.size, generator)
    text = embed(words) * (torch.rand(stage.batch, 1, 1, generator=generator) >= FORGET)
    noise = torch.randn(clips.shape, generator=generator)
    even = (torch.arange(stage.batch) + torch.rand(stage.batch, generator=generator)) / stage.batch
    sigma = torch.sigmoid(1.2 * torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)) + 0.3)
    level = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model((1 - level) * clips + level * noise, 1000 * sigma, text, return_dict=False)[0]
    return (velocity.float() - (noise - clips)).square().mean()


def train(folder: Path, minutes: float, seed: int = 0) -> None:
    """Train for so many minutes in all, going on where an earlier run of the same folder stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(seed).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    descent, progress = optimisers(model), Progress()
    generator = torch.Generator().manual_seed(seed + 1)
    state = folder / "state.pt"
    if state.exists():
        progress = _restore(torch.load(state, weights_only=False), model, average, descent, generator)
    losses: list[float] = []
    saved = began = time.monotonic() - progress.seconds
    while (share := progress.seconds / (60 * minutes)) < 1:
        stage = next(stage for stage in STAGES if share < stage.until)
        for optimiser in descent:
            optimiser.param_groups[0]["lr"] = STEP * rate(progress, share)
            optimiser.zero_grad(set_to_none=True)
        loss = loss_of(model, stage, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in descent:
            optimiser.step()
        _average(average, model, min(0.998, (1 + progress.steps) / (10 + progress.steps)))
        losses.append(loss.item())
        progress.steps, progress.clips = progress.steps + 1, progress.clips + stage.batch
        progress.seconds = time.monotonic() - began
        if progress.steps % 50 == 0:
            _log(folder, progress, stage, losses, None)
            losses = []
        if time.monotonic() - saved > 240:
            _save(state, model, average, descent, generator, progress)
            _log(folder, progress, stage, losses, keys_needed(average))
            saved = time.monotonic()
    _save(state, model, average, descent, generator, progress)
    average.save_pretrained(folder / "transformer")
    _log(folder, progress, STAGES[-1], losses, keys_needed(average))


def _average(average: nn.Module, model: nn.Module, keep: float) -> None:
    with torch.no_grad():
        for mean, now in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(now, 1 - keep)


def _save(
    state: Path,
    model: nn.Module,
    average: nn.Module,
    descent: list[torch.optim.Optimizer],
    generator: torch.Generator,
    progress: Progress,
) -> None:
    parts: dict[str, Any] = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "descent": [optimiser.state_dict() for optimiser in descent],
        "generator": generator.get_state(),
        "progress": asdict(progress),
    }
    torch.save(parts, state.with_suffix(".part"))
    state.with_suffix(".part").replace(state)


def _restore(
    parts: dict[str, Any],
    model: nn.Module,
    average: nn.Module,
    descent: list[torch.optim.Optimizer],
    generator: torch.Generator,
) -> Progress:
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    for optimiser, saved in zip(descent, parts["descent"], strict=True):
        optimiser.load_state_dict(saved)
    generator.set_state(parts["generator"])
    return Progress(**parts["progress"])


def _log(folder: Path, progress: Progress, stage: Stage, losses: list[float], needed: float | None) -> None:
    line = {
        **asdict(progress),
        "frames": stage.size.frames,
        "side": stage.size.side,
        "loss": sum(losses) / len(losses) if losses else None,
        "keys_for_0.9": needed,
    }
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where weights, state and log go")
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock time of the whole training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.minutes, arguments.seed)


if __name__ == "__main__":
    main()
