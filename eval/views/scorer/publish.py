"""From a finished training run to the shipped folder, its figures and its card.

``python -m vlm_budget.eval.views.scorer.publish RUN`` copies the model, measures it on the test clips and rooms, and
writes ``results.json`` and ``README.md`` beside the weights. With ``--validation`` it only measures, on the validation
clips and rooms, and ships nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_budget.eval.views import clips, rooms
from vlm_budget.eval.views.scorer import folder
from vlm_budget.eval.views.scorer.captions import WORDS
from vlm_budget.eval.views.scorer.card import render
from vlm_budget.eval.views.scorer.held_out import Score, measure_clips, measure_rooms
from vlm_budget.eval.views.scorer.modeling import WEIGHTS
from vlm_budget.eval.views.scorer.train import Config


def as_score(path: Path) -> Score:
    """The model of a folder as `vlm_budget.video.frames` loads it."""
    from vlm_budget.video.frames.clip import ClipScorer

    scorer = ClipScorer.load(str(path))

    def score(frames: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        return scorer.score(frames, texts).numpy()

    return score


def measure(path: Path, clip_seed: int, room_seed: int, many_clips: int, many_rooms: int) -> dict[str, Any]:
    """All figures of a folder."""
    score = as_score(path)
    return {
        "clips": {"seed": clip_seed} | measure_clips(score, clips.test_set(many_clips, clip_seed)),
        "rooms": {"seed": room_seed} | measure_rooms(score, rooms.test_set(many_rooms, room_seed)),
    }


def publish(run: Path, many_clips: int, many_rooms: int, config: Config) -> dict[str, Any]:
    """Ship a run's model; returns the record written beside it."""
    import open_clip
    import transformers
    from safetensors.torch import load_file

    shutil.rmtree(folder(), ignore_errors=True)
    shutil.copytree(run / "scorer", folder(), copy_function=shutil.copyfile)
    weights = folder() / WEIGHTS
    versions = {"python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__}
    versions |= {"transformers": transformers.__version__, "numpy": np.__version__}
    record = {
        "config": asdict(config),
        "training": json.loads((run / "scorer.json").read_text()),
        "parameters": sum(tensor.numel() for tensor in load_file(weights).values()),
        "bytes": weights.stat().st_size,
        "words": len(WORDS),
        "versions": versions,
        "test": measure(folder(), clips.TEST_SEED, rooms.TEST_SEED, many_clips, many_rooms),
    }
    (folder() / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder() / "README.md").write_text(render(record))
    return record


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ship a trained scorer and record its figures.")
    parser.add_argument("run", type=Path, help="a folder written by vlm_budget.eval.views.scorer.train")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--rooms", type=int, default=60)
    parser.add_argument("--validation", action="store_true", help="measure on the validation sets, ship nothing")
    args = parser.parse_args(argv)
    if args.validation:
        seeds = clips.VALIDATION_SEED, rooms.VALIDATION_SEED
        result = measure(args.run / "scorer", *seeds, args.clips, args.rooms)
    else:
        result = publish(args.run, args.clips, args.rooms, Config())["test"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
