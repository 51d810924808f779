"""From a finished training run to the shipped folder and recorded results.

``python -m vlm_budget.eval.views.publish RUN --results FILE`` ships the run's checkpoint, scores it on the
validation and the test scenes, whole and with random tokens dropped, and writes the model card from the results.
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
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlavaOnevisionForConditionalGeneration

from vlm_budget.eval.nano.export import WEIGHTS
from vlm_budget.eval.views import folder
from vlm_budget.eval.views.card import render
from vlm_budget.eval.views.held_out import SETS, prepare, score, summarise
from vlm_budget.eval.views.modeling import VOCAB
from vlm_budget.eval.views.train import NAME, PRESETS

SHARES = (0.5, 0.2, 0.09)
"""Shares of the patch tokens of which random draws are recorded."""


def measure(model: LlavaOnevisionForConditionalGeneration, scenes: int, split: str) -> dict[str, Any]:
    """Accuracy per task on the first scenes of a split (``VALIDATION`` or ``TEST``), whole and with random tokens."""
    found: dict[str, Any] = {}
    for task, module in SETS.items():
        samples: Sequence[Any] = module.test_set(scenes, getattr(module, f"{split}_SEED"))
        ready = prepare(model, samples)
        found[task] = {"whole": summarise(samples, score(model, ready))}
        for share in SHARES:
            found[task][f"random {share:g}"] = summarise(samples, score(model, ready, share))
    return found


def publish(run: Path, results: Path, preset: str, scenes: int, note: str = "") -> None:
    """Ship the run's checkpoint, write ``results`` and the model card.

    Args:
        run: folder of a finished training.
        results: where the record goes.
        preset: the run's preset.
        scenes: held-out scenes of each task and split.
        note: what was different from the preset in this run, for the card.
    """
    trained = json.loads((run / f"{NAME}.json").read_text())
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(run / NAME).eval()
    shutil.rmtree(folder(), ignore_errors=True)
    shutil.copytree(run / NAME, folder(), copy_function=shutil.copyfile)
    weights = folder() / WEIGHTS
    record: dict[str, Any] = {
        "name": NAME,
        "preset": {"name": preset} | asdict(PRESETS[preset]),
        "seed": trained["seed"],
        "minutes": trained["minutes"],
        "note": note,
        "data": {"scenes": scenes, "words": len(VOCAB)}
        | {f"{task}_test_seed": module.TEST_SEED for task, module in SETS.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
        "parameters": sum(tensor.numel() for tensor in load_file(weights).values()),
        "bytes": weights.stat().st_size,
        "validation": measure(model, scenes, "VALIDATION"),
        "test": measure(model, scenes, "TEST"),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(record, indent=1) + "\n")
    (folder() / "README.md").write_text(render(record))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ship a run's checkpoint and record its accuracy.")
    parser.add_argument("run", type=Path, help="folder written by vlm_budget.eval.views.train")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/views_training.json"))
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--note", default="", help="what was different from the preset in this run")
    args = parser.parse_args(argv)
    publish(args.run, args.results, args.preset, args.scenes, args.note)


if __name__ == "__main__":
    main()
