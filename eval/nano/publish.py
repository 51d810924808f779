"""From finished training runs to shipped folders and recorded results.

``python -m vlm_budget.eval.nano.publish RUN0 RUN1 RUN2 --results FILE`` ships, for each checkpoint, the seed
that is best on the validation pages, and only then scores every seed on the test pages. Model cards are
written from the recorded results.
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

import numpy
import PIL
import torch
import transformers
from transformers import LlavaNextForConditionalGeneration

from vlm_budget.eval.nano import folder, names
from vlm_budget.eval.nano.card import render
from vlm_budget.eval.nano.data import QUESTIONS_PER_IMAGE, TEST_SEED, VALIDATION_SEED, Sample, test_set
from vlm_budget.eval.nano.export import WEIGHTS
from vlm_budget.eval.nano.held_out import score, summarise
from vlm_budget.eval.nano.modeling import VOCAB
from vlm_budget.eval.nano.scene import HARD_SHARE
from vlm_budget.eval.nano.train import PRESETS


def _score(path: Path, samples: Sequence[Sample]) -> tuple[int, dict[str, dict[str, float]]]:
    model = LlavaNextForConditionalGeneration.from_pretrained(path).eval()
    return sum(p.numel() for p in model.parameters()), summarise(samples, score(model, samples))


def _checkpoint(
    name: str, runs: Sequence[Path], validation: Sequence[Sample], test: Sequence[Sample]
) -> dict[str, Any]:
    """Choose and ship one checkpoint; returns its record."""
    seeds = {}
    for run in runs:
        record = json.loads((run / f"{name}.json").read_text())
        parameters, accuracy = _score(run / name, validation)
        seeds[str(record["seed"])] = {"minutes": record["minutes"], "validation": accuracy, "run": run}
    shipped = max(seeds, key=lambda seed: seeds[seed]["validation"]["all"]["accuracy"])
    shutil.rmtree(folder(name), ignore_errors=True)
    shutil.copytree(seeds[shipped]["run"] / name, folder(name))
    for seed in seeds.values():
        seed["test"] = _score(seed.pop("run") / name, test)[1]
    size = (folder(name) / WEIGHTS).stat().st_size
    return {"shipped_seed": int(shipped), "parameters": parameters, "bytes": size, "seeds": seeds}


def publish(runs: Sequence[Path], results: Path, preset: str, images: int) -> None:
    """Ship both checkpoints, write ``results`` and the model cards."""
    validation, test = test_set(images, VALIDATION_SEED), test_set(images, TEST_SEED)
    record = {
        "preset": {"name": preset} | asdict(PRESETS[preset]),
        "data": {
            "validation_seed": VALIDATION_SEED,
            "test_seed": TEST_SEED,
            "images": images,
            "questions_per_image": QUESTIONS_PER_IMAGE,
            "hard_share": HARD_SHARE,
            "words": len(VOCAB),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
        },
        "checkpoints": {name: _checkpoint(name, runs, validation, test) for name in names()},
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(record, indent=1) + "\n")
    for name in names():
        (folder(name) / "README.md").write_text(render(name, record))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ship the best seed of each checkpoint and record its accuracy.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders written by vlm_budget.eval.nano.train")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/nano_training.json"))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--images", type=int, default=600)
    args = parser.parse_args(argv)
    publish(args.runs, args.results, args.preset, args.images)


if __name__ == "__main__":
    main()
