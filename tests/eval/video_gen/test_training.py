"""Training of the small video model: it goes on where it stopped."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from vlm_budget.eval.video_gen import train
from vlm_budget.eval.video_gen.clips import Size
from vlm_budget.eval.video_gen.modeling import build
from vlm_budget.eval.video_gen.sharpness import keys_needed


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "STAGES", (train.Stage(1.0, Size(2, 8), 2),))
    monkeypatch.setattr(train, "keys_needed", lambda model: 0.5)


@pytest.mark.usefixtures("short")
def test_a_second_start_goes_on(tmp_path: Path) -> None:
    train.train(tmp_path, 1 / 60)
    first = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    train.train(tmp_path, 2 / 60)
    second = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    assert 0 < first["steps"] < second["steps"]
    assert second["seconds"] < 6  # of both
    assert WanTransformer3DModel.from_pretrained(tmp_path / "transformer").config.num_layers == 4


def test_a_step_lowers_the_loss_on_what_it_saw() -> None:
    torch.manual_seed(0)
    model, stage = build(0).train(), train.Stage(1.0, Size(2, 8), 8)
    descent = train.optimisers(model)

    def loss() -> torch.Tensor:
        return train.loss_of(model, stage, torch.Generator().manual_seed(5))

    before = loss()
    for _ in range(5):
        for optimiser in descent:
            optimiser.zero_grad()
        loss().backward()
        for optimiser in descent:
            optimiser.step()
    assert loss() < 0.9 * before


def test_sharpness_counts_keys_of_self_attention() -> None:
    model = build(0).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.zero_()  # every key is as good as any other
    assert keys_needed(model, 0.9, Size(2, 8), 1) == pytest.approx(0.9, abs=0.13)  # of eight keys
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.fill_(1e4)
    assert keys_needed(model, 0.9, Size(2, 8), 1) == pytest.approx(1 / 8, abs=0.02)
