import itertools
import json
from pathlib import Path

import pytest
import torch

from vlm_budget.eval import vit
from vlm_budget.eval.vit.modeling import VitConfig, load_from
from vlm_budget.eval.vit.publish import publish, render
from vlm_budget.eval.vit.train import Recipe, Run

TINY = Recipe(
    steps=7,
    batch=2,
    shard=4,
    model=VitConfig(embed_dim=16, depth=4, num_heads=2),
    validation_pages=8,
    checkpoint_seconds=0.0,
)


def test_a_killed_run_resumes_to_the_same_steps_and_weights(tmp_path: Path) -> None:
    straight = list(Run(TINY, 3, tmp_path / "straight").losses())
    assert len(straight) == 7
    for stop in (1, 4, 6):
        out = tmp_path / f"stop{stop}"
        run = Run(TINY, 3, out).losses()
        begun = list(itertools.islice(run, stop))
        resumed = list(Run(TINY, 3, out, resume=True).losses())
        assert begun + resumed == straight
        weights = [folder / "model" / "model.safetensors" for folder in (out, tmp_path / "straight")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_seed_takes_other_steps(tmp_path: Path) -> None:
    assert next(Run(TINY, 0, tmp_path / "a").losses()) != next(Run(TINY, 1, tmp_path / "b").losses())


def test_publish_ships_the_better_training_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / "run0", tmp_path / "run1"]
    for seed, run in enumerate(runs):
        assert list(Run(TINY, seed, run).losses())
    monkeypatch.setattr(vit, "_WEIGHTS", tmp_path / "weights")
    publish(runs, tmp_path / "results.json", count=12)
    record = json.loads((tmp_path / "results.json").read_text())
    accuracy = [record["runs"][seed]["validation"]["accuracy"] for seed in ("0", "1")]
    assert accuracy[record["shipped_seed"]] == max(accuracy)
    assert (tmp_path / "weights" / "README.md").read_text() == render(record)
    shipped, trained = vit.load(), load_from(runs[record["shipped_seed"]] / "model")
    for a, b in zip(shipped.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)
