"""From finished training runs to shipped folders and recorded results.

``python -m vlm_budget.eval.nano.publish RUN0 RUN1 RUN2 --results FILE`` ships the seed that is best on the
validation pages, and only then scores every seed on the test pages. Model cards are written from the results.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

from vlm_budget.eval.nano import folder, names
from vlm_budget.eval.nano.card import render
from vlm_budget.eval.nano.data import QUESTIONS_PER_IMAGE, TEST_SEED, VALIDATION_SEED, Sample, test_set
from vlm_budget.eval.nano.export import WEIGHTS
from vlm_budget.eval.nano.held_out import score, summarise
from vlm_budget.eval.nano.modeling import VOCAB
from vlm_budget.eval.nano.scene import HARD_SHARE
from vlm_budget.eval.nano.train import PRESETS


def _score(path: Path, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    model = LlavaNextForConditionalGeneration.from_pretrained(path).eval()
    return summarise(samples, score(model, samples))


def _choose(runs: Mapping[str, Path], samples: Sequence[Sample]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The best seed on the validation pages, one for both checkpoints: `nano-robust` is `nano` continued.

    Returns:
        The seed, and for each checkpoint and seed the validation accuracy.
    """
    validation = {name: {seed: _score(run / name, samples) for seed, run in runs.items()} for name in names()}
    total = {seed: sum(validation[name][seed]["all"]["accuracy"] for name in names()) for seed in runs}
    return max(total, key=lambda seed: total[seed]), validation


def _ship(run: Path, name: str) -> dict[str, Any]:
    """Copy one checkpoint of the chosen run into the package; returns what can be said of its weights."""
    shutil.rmtree(folder(name), ignore_errors=True)
    shutil.copytree(run / name, folder(name), copy_function=shutil.copyfile)
    weights = folder(name) / WEIGHTS
    return {"parameters": sum(t.numel() for t in load_file(weights).values()), "bytes": weights.stat().st_size}


def publish(folders: Sequence[Path], results: Path, preset: str, images: int) -> None:
    """Ship both checkpoints of the best seed, write ``results`` and the model cards."""
    runs = {str(json.loads((run / "nano.json").read_text())["seed"]): run for run in folders}
    shipped, validation = _choose(runs, test_set(images, VALIDATION_SEED))
    test = test_set(images, TEST_SEED)
    record: dict[str, Any] = {
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
        "checkpoints": {},
    }
    for name in names():
        seeds = {}
        for seed, run in runs.items():
            minutes = json.loads((run / f"{name}.json").read_text())["minutes"]
            accuracy = {"validation": validation[name][seed], "test": _score(run / name, test)}
            seeds[seed] = {"minutes": minutes} | accuracy
        record["checkpoints"][name] = {"shipped_seed": int(shipped), "seeds": seeds} | _ship(runs[shipped], name)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(record, indent=1) + "\n")
    for name in names():
        (folder(name) / "README.md").write_text(render(name, record))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ship the best seed and record the accuracy of all.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders written by vlm_budget.eval.nano.train")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/nano_training.json"))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--images", type=int, default=600)
    args = parser.parse_args(argv)
    publish(args.runs, args.results, args.preset, args.images)


if __name__ == "__main__":
    main()
