import itertools
from pathlib import Path

import torch

from vlm_budget.eval.nano.modeling import NanoConfig
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
