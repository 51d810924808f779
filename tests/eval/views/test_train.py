import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_budget.eval import views
from vlm_budget.eval.views import shards
from vlm_budget.eval.views.card import render
from vlm_budget.eval.views.labels import NO_COLOR, NO_KIND
from vlm_budget.eval.views.modeling import VOCAB, ViewsConfig
from vlm_budget.eval.views.publish import publish
from vlm_budget.eval.views.stages import StageConfig
from vlm_budget.eval.views.train import NAME, Preset, Run

TINY = Preset(
    vision=StageConfig(steps=3, batch=8, shards=2, ready=1),
    language=StageConfig(steps=6, batch=2, shards=2, ready=1, questions=3),
    model=ViewsConfig(vision_width=16, vision_layers=2, vision_heads=2, text_width=16, text_layers=1, text_heads=2),
    scenes=2,
    questions=4,
    checkpoint_seconds=0.0,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int, float]]]:
    out = tmp_path_factory.mktemp("straight")
    return out, list(Run(TINY, 3, out).losses())


@pytest.mark.parametrize("stop", [2, 6])
def test_a_killed_run_resumes_to_the_same_steps_and_weights(
    tmp_path: Path, straight: tuple[Path, list[tuple[str, int, float]]], stop: int
) -> None:
    begun = list(itertools.islice(Run(TINY, 3, tmp_path).losses(), stop))
    resumed = list(Run(TINY, 3, tmp_path, resume=True).losses())
    assert len(straight[1]) == 3 + 6
    assert begun + resumed == straight[1]
    weights = Path(NAME) / "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (straight[0] / weights).read_bytes()


def test_shards_rendered_in_advance_change_nothing(
    tmp_path: Path, straight: tuple[Path, list[tuple[str, int, float]]]
) -> None:
    shards.render_ahead(shards.Shelf(tmp_path / "shards", 3, TINY.scenes, TINY.questions), 1, lambda line: None)
    assert list(Run(TINY, 3, tmp_path).losses()) == straight[1]


def test_another_seed_takes_other_steps(tmp_path: Path, straight: tuple[Path, list[tuple[str, int, float]]]) -> None:
    assert next(Run(TINY, 4, tmp_path).losses()) != straight[1][0]


def test_the_language_stage_leaves_the_vision_tower_alone(tmp_path: Path) -> None:
    run = Run(TINY, 0, tmp_path)
    steps = run.losses()
    for stage, _, _ in steps:
        if stage == "language":
            break
    before = {k: v.clone() for k, v in run.model.model.vision_tower.state_dict().items()}
    projector = run.model.model.multi_modal_projector.linear_1.weight.clone()
    for _ in steps:
        pass
    after = run.model.model.vision_tower.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(run.model.model.multi_modal_projector.linear_1.weight, projector)


@pytest.mark.parametrize("task", shards.TASKS)
def test_a_shard_is_a_function_of_seed_and_index(task: str) -> None:
    one, again, other = (shards.make(task, seed, 1, scenes=2, questions=5) for seed in (0, 0, 1))
    assert np.array_equal(one.pixels, again.pixels) and np.array_equal(one.tokens, again.tokens)
    assert not np.array_equal(one.pixels, other.pixels)
    pictures = 12 if task == "rooms" else shards.FRAME_COUNTS[1]
    assert one.pixels.shape == (2, pictures, 48, 48, 3)
    assert ((one.kinds == NO_KIND) == (one.colors == NO_COLOR)).all() and (one.kinds < NO_KIND).any()
    assert one.tokens.shape == (2, 5, 8) and one.tokens.max() < len(VOCAB)


def test_no_question_of_a_short_clip_is_about_an_event_between_its_frames() -> None:
    shard = shards.make("haystack", 0, 1, scenes=6, questions=12)  # 16 frames of 96, events of 4 to 6
    for kinds, tokens in zip(shard.kinds, shard.tokens, strict=True):
        shown = set(kinds[kinds < NO_KIND].tolist())
        for prompt in tokens:
            words = [VOCAB[i] for i in prompt]
            if words[3] == "color":
                asked = list(shards.clips.KINDS).index(words[6])
                assert asked in shown


def test_publish_ships_the_run_and_records_it(
    tmp_path: Path, straight: tuple[Path, list[tuple[str, int, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "_WEIGHTS", tmp_path / "weights")
    publish(straight[0], tmp_path / "results.json", "cpu", scenes=2)
    record = json.loads((tmp_path / "results.json").read_text())
    shipped = tmp_path / "weights" / NAME
    weights = (shipped / "model.safetensors").read_bytes()
    assert weights == (straight[0] / NAME / "model.safetensors").read_bytes()
    assert record["bytes"] == len(weights) and record["seed"] == 3
    assert set(record["test"]) == set(shards.TASKS)
    assert set(record["test"]["rooms"]) == {"whole", "random 0.5", "random 0.2", "random 0.09"}
    assert (shipped / "README.md").read_text() == render(record)
