"""From a finished training run to the shipped folder and a recorded result.

``python -m vlm_budget.eval.video_gen.publish runs/nano-video`` ships the averaged weights in float16, looks at them on
held-out clips, and writes the model card from what it found.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from vlm_budget.eval.record import environment, write_json

from . import folder
from .card import render
from .clips import Size, draw_clips, draw_words, embed
from .pipeline import load_from
from .sharpness import LEVELS, keys_needed
from .train import STAGES

RECORD = Path("benchmarks/results/video_gen_training.json")
HELD_OUT_SEED = 9_000_003


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, clips: int = 16) -> dict[str, float]:
    """Mean squared error of the velocity on held-out clips, by noise level."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    words = draw_words(clips, generator)
    clean = draw_clips(words, Size(), generator)
    noise = torch.randn(clean.shape, generator=generator)
    found = {}
    for level in LEVELS:
        mixed = (1 - level) * clean + level * noise
        velocity = model(mixed, torch.full((clips,), 1000 * level), embed(words), return_dict=False)[0]
        found[f"{level:g}"] = float((velocity - (noise - clean)).square().mean())
    return found


def publish(run: Path, record: Path = RECORD, note: str = "") -> None:
    """Ship a run's averaged weights, and write the record and the model card.

    Args:
        run: Folder of a training, finished or not: the weights are those of its last save.
        record: Where the result goes.
        note: What was different from the recipe in this run, for the card.
    """
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=False)
    from .modeling import build

    model: WanTransformer3DModel = build(0)
    model.load_state_dict(state["average"])
    shutil.rmtree(folder() / "transformer", ignore_errors=True)
    model.half().save_pretrained(folder() / "transformer")
    for file in (folder() / "transformer").iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    shipped = load_from(folder()).transformer  # what users get: float32 of the rounded weights
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    write_json(
        record,
        {
            "environment": environment(),
            "progress": state["progress"],
            "parameters": sum(weight.numel() for weight in shipped.parameters()),
            "bytes": sum(file.stat().st_size for file in (folder() / "transformer").iterdir()),
            "stages": [
                {"until": one.until, "frames": one.size.frames, "side": one.size.side, "batch": one.batch}
                for one in STAGES
            ],
            "keys_needed": {str(mass): keys_needed(shipped, mass) for mass in (0.9, 0.95)},
            "held_out_loss": held_out_loss(shipped),
            "held_out_seed": HELD_OUT_SEED,
            "sharpness_in_training": [
                [round(line["seconds"]), line["keys_for_0.9"]] for line in log if line.get("keys_for_0.9") is not None
            ],
            "note": note,
        },
    )
    found: dict[str, Any] = json.loads(record.read_text())
    (folder() / "README.md").write_text(render(found), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ship a run's weights and record what they are.")
    parser.add_argument("run", type=Path, help="folder written by vlm_budget.eval.video_gen.train")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--note", default="", help="what was different from the recipe in this run")
    arguments = parser.parse_args(argv)
    publish(arguments.run, arguments.record, arguments.note)


if __name__ == "__main__":
    main()
