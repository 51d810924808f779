import itertools
import json
from pathlib import Path

import pytest
import torch

from vlm_budget.eval import nano
from vlm_budget.eval.nano.card import render
from vlm_budget.eval.nano.modeling import NanoConfig
from vlm_budget.eval.nano.publish import publish
from vlm_budget.eval.nano.stages import StageConfig
from vlm_budget.eval.nano.train import Preset, Run

TINY = Preset(
    vision=StageConfig(steps=4, batch=2, shard=4),
    language=StageConfig(steps=5, batch=2, shard=4, questions=2),
    robust=StageConfig(steps=5, batch=2, shard=4, questions=2),
    model=NanoConfig(vision_width=16, vision_layers=2, vision_heads=2, text_width=16, text_layers=1, text_heads=2),
    validation_images=2,
    checkpoint_seconds=0.0,
)


def test_a_killed_run_resumes_to_the_same_steps_and_weights(tmp_path: Path) -> None:
    straight = list(Run(TINY, 3, tmp_path / "straight").losses())
    total = len(straight)
    assert total == 4 + 5 + 5
    for stop in (2, 6, 12):
        out = tmp_path / f"stop{stop}"
        begun = list(itertools.islice(Run(TINY, 3, out).losses(), stop))
        resumed = list(Run(TINY, 3, out, resume=True).losses())
        assert begun + resumed == straight, f"killed after {stop} of {total} steps"
        assert (out / "nano-robust" / "model.safetensors").read_bytes() == (
            tmp_path / "straight" / "nano-robust" / "model.safetensors"
        ).read_bytes()


def test_another_seed_takes_other_steps(tmp_path: Path) -> None:
    first = next(Run(TINY, 0, tmp_path / "a").losses())
    second = next(Run(TINY, 1, tmp_path / "b").losses())
    assert first != second


def test_the_language_stages_leave_the_vision_tower_alone(tmp_path: Path) -> None:
    run = Run(TINY, 0, tmp_path)
    steps = run.losses()
    for stage, _, _ in steps:
        if stage == "language":
            break
    before = {k: v.clone() for k, v in run.model.model.vision_tower.state_dict().items()}
    for _ in steps:
        pass
    after = run.model.model.vision_tower.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_publish_ships_the_better_seed_and_records_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / "run0", tmp_path / "run1"]
    for seed, run in enumerate(runs):
        assert list(Run(TINY, seed, run).losses())
    monkeypatch.setattr(nano, "_WEIGHTS", tmp_path / "weights")
    publish(runs, tmp_path / "results.json", "cpu", images=8)
    record = json.loads((tmp_path / "results.json").read_text())
    total = [
        sum(record["checkpoints"][name]["seeds"][seed]["validation"]["all"]["accuracy"] for name in nano.names())
        for seed in ("0", "1")
    ]
    for name in nano.names():
        shipped = record["checkpoints"][name]["shipped_seed"]
        assert total[shipped] == max(total)
        weights = tmp_path / "weights" / name / "model.safetensors"
        assert weights.read_bytes() == (runs[shipped] / name / "model.safetensors").read_bytes()
        assert (weights.parent / "README.md").read_text() == render(name, record)
