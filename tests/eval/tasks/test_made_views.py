"""Rooms and clips as tasks, and what their samples bring besides pictures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm_budget import patch
from vlm_budget.cli.loading import Loaded
from vlm_budget.errors import FrameScoreError, OptionError
from vlm_budget.eval import runner
from vlm_budget.eval.batching import batches
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.config import EvalConfig
from vlm_budget.eval.driver import Driver
from vlm_budget.eval.sample import Sample
from vlm_budget.eval.source import Source
from vlm_budget.eval.summary import summarise
from vlm_budget.eval.task import read_task
from vlm_budget.eval.validate import look_through
from vlm_budget.eval.views import clips, rooms
from vlm_budget.eval.views.modeling import FRAME_TOKENS, VIEW_TOKENS, ViewsConfig, build_model, build_processor

SEGPRUNER, QUOTA, RANDOM = Cell("segpruner", "15%"), Cell("quota", "30%"), Cell("random", "30%")


class Counting:
    """Scores frames by their brightness and the length of the clue, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def score(self, frames: Sequence[Any], clues: Sequence[str], progress: Any = None) -> torch.Tensor:
        self.asked.append((len(frames), tuple(clues)))
        bright = torch.tensor([float(np.asarray(frame)[::5].mean()) / 255 for frame in frames])
        return torch.stack([(bright * len(clue)) % 1 for clue in clues], 1)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.manual_seed(3)
    sizes = ViewsConfig(vision_width=32, vision_layers=3, text_width=32, text_layers=2)
    return Loaded("tiny", False, "llava_onevision", build_model(sizes).eval(), build_processor())


def samples(name: str, limit: int, seed: int | None = None) -> list[Sample]:
    found = list(read_task(name).samples(Source(limit=limit, seed=seed)))
    assert all(isinstance(one, Sample) for one in found)
    return found  # type: ignore[return-value]


def test_rooms_are_asked_with_their_pictures_and_geometry() -> None:
    found, wanted = samples("rooms", 8), rooms.test_set(2)
    assert [one.id for one in found] == [*(f"room-00000-{n}" for n in range(6)), "room-00001-0", "room-00001-1"]
    for one, (room, number) in zip(found, [(r, n) for r in wanted for n in range(6)], strict=False):
        question = room.questions[number]
        assert (one.prompt, one.answers, one.facts) == (
            question.prompt,
            (question.answer,),
            {"question": question.task},
        )
        assert one.views is not None
        for view, (picture, camera) in enumerate(zip(room.scene.pictures, room.scene.cameras, strict=True)):
            assert np.array_equal(np.asarray(one.images[view].load()), picture.pixels)
            assert np.array_equal(one.views.depth[view], picture.depth)
            assert np.array_equal(one.views.pose[view], camera.pose)
            assert np.array_equal(one.views.intrinsics[view], camera.intrinsics)
    assert samples("rooms", 1, seed=5)[0].prompt == rooms.test_set(1, 5)[0].questions[0].prompt


def test_clips_are_asked_with_32_or_64_frames_and_what_to_look_for() -> None:
    few, many, wanted = samples("haystack", 7), samples("haystack_dense", 7), clips.test_set(2)
    assert [(one.id, one.prompt) for one in few] == [(one.id, one.prompt) for one in many]
    for one, (clip, number) in zip(few, [(c, n) for c in wanted for n in range(6)], strict=False):
        question = clip.questions[number]
        assert (one.prompt, one.answers) == (question.prompt, (question.answer,))
        spans = [clip.scene.events[target].seconds for target in question.targets]
        assert one.facts == {"question": question.task, "seconds": [list(span) for span in spans]}
        assert one.query is not None
        assert one.query.text == one.prompt
        assert question.answer not in " ".join(one.query.targets) or question.task == "order"
        assert len(one.query.targets) == len(question.targets)
    scene = wanted[0].scene
    assert few[0].clip is not None
    assert few[0].clip.draw is not None
    for count in (32, 64, 96):
        shown = [np.asarray(frame) for frame in few[0].clip.draw(count)]
        chosen = clips.evenly(count)
        assert all(np.array_equal(got, scene.frame(at).pixels) for got, at in zip(shown, chosen, strict=True))


def test_datasets_made_on_the_spot_are_valid() -> None:
    found = look_through(EvalConfig.of({"model": "none", "tasks": ["rooms", "haystack"], "limit": 3}))
    assert all(one == {"samples": 3, "broken": 0, "faults": []} for one in found.values())


@pytest.mark.parametrize("share", [True, False])
def test_geometry_is_laid_beside_methods_that_read_it(loaded: Loaded, share: bool) -> None:
    task, asked = read_task("rooms"), samples("rooms", 13)[4:13:4]  # three rooms
    driver = Driver(loaded, [Cell(), SEGPRUNER, RANDOM], share)
    batch = driver.prepare(task, asked)
    assert batch.sizes == [(VIEW_TOKENS,) * rooms.VIEWS] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a method that misses its geometry
        found = driver.answer(batch, SEGPRUNER, draw=True)
    for cell, part in ((SEGPRUNER, 0.15), (RANDOM, 0.3)):
        assert driver.answer(batch, cell).costs[0]["kept"] == round(part * VIEW_TOKENS * rooms.VIEWS)
    scenes = [room.scene for room in rooms.test_set(3)]
    batch.inputs.pop("mm_encoder_outputs", None)
    with patch(loaded.model, "segpruner", "15%") as handle, torch.inference_mode():
        handle.views(
            depth=np.concatenate([[one.depth for one in scene.pictures] for scene in scenes]),
            pose=np.concatenate([[one.pose for one in scene.cameras] for scene in scenes]),
            intrinsics=scenes[0].cameras[0].intrinsics,
        )
        loaded.model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
        assert kept(handle.kept()) == kept(found.kept)
    with patch(loaded.model, "segpruner", "15%") as handle, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
        assert kept(handle.kept()) != kept(found.kept), "the geometry made no difference"


def kept(items: Any) -> list[tuple[int, ...]]:
    return [item.positions for item in items]


@pytest.mark.parametrize("share", [True, False])
def test_frames_are_scored_for_what_is_asked_once_a_batch(loaded: Loaded, share: bool) -> None:
    task, asked, scorer = read_task("haystack"), samples("haystack", 13)[4:13:4], Counting()
    coarse = Cell("quota(unpooled=False)", "30%")
    driver = Driver(loaded, [Cell(), QUOTA, coarse, RANDOM], share, scorer)
    batch = driver.prepare(task, asked)
    for cell in (Cell(), RANDOM):
        assert "score" not in driver.answer(batch, cell).ms
    assert not scorer.asked, "frames were scored though no method read the scores"
    found = {cell: driver.answer(batch, cell, draw=True) for cell in (QUOTA, coarse)}
    wanted = [(task.frames, one.query.targets) for one in asked if one.query is not None]
    assert scorer.asked == 2 * wanted, "asked for a warm-up and once more"
    assert all(one.ms["score"] > 0 for one in found.values())
    driver.answer(driver.prepare(task, asked), QUOTA)
    assert scorer.asked == 3 * wanted
    batch.inputs.pop("mm_encoder_outputs", None)
    for cell, options in ((QUOTA, {}), (coarse, {"unpooled": False})):
        with patch(loaded.model, "quota", "30%", **options) as handle, torch.inference_mode():
            handle.frames(batch.scores)
            loaded.model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
            assert kept(handle.kept()) == kept(found[cell].kept)
    full = FRAME_TOKENS * task.frames + 1
    assert [cost["kept"] for cost in found[QUOTA].costs] == [round(0.3 * full)] * 3


def test_frames_that_go_in_as_pictures_are_scored_together(loaded: Loaded) -> None:
    task, asked, scorer = read_task("rooms"), samples("rooms", 7)[5:7], Counting()
    driver = Driver(loaded, [QUOTA], scorer=scorer)
    batch = driver.prepare(task, asked)
    found = driver.answer(batch, QUOTA, draw=True)
    assert {frames for frames, _ in scorer.asked} == {rooms.VIEWS}
    scores = batch.scores
    assert scores is not None
    with patch(loaded.model, "quota", "30%") as handle, torch.inference_mode():
        handle.frames(torch.cat(scores), of="image")
        loaded.model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
        assert kept(handle.kept()) == kept(found.kept)


def test_without_a_scorer_the_method_says_that_it_misses_scores(loaded: Loaded) -> None:
    driver = Driver(loaded, [QUOTA])
    batch = driver.prepare(read_task("haystack"), samples("haystack", 1))
    with pytest.warns(UserWarning, match="scores"):
        assert "score" in driver.answer(batch, QUOTA).ms


def test_a_scorer_that_fails_leaves_other_methods_their_answers(loaded: Loaded) -> None:
    class Broken:
        def score(self, frames: Sequence[Any], clues: Sequence[str], progress: Any = None) -> torch.Tensor:
            return torch.full((len(frames), len(clues)), float("nan"))

    driver = Driver(loaded, [RANDOM, QUOTA], scorer=Broken())
    batch = driver.prepare(read_task("haystack"), samples("haystack", 1))
    assert len(driver.answer(batch, RANDOM).texts) == 1
    with pytest.raises(FrameScoreError, match="NaN"):
        driver.answer(batch, QUOTA)


def test_samples_with_and_without_geometry_are_never_asked_together() -> None:
    posed = samples("rooms", 4)
    bare = [Sample(f"bare {one.id}", one.prompt, one.answers, one.images) for one in posed]
    groups = list(batches([*posed, *bare, *samples("haystack", 2)], 8))
    assert sorted(len(group) for group in groups) == [2, 4, 4]
    for group in groups:
        assert len({(one.views is None, one.clip is None) for one in group if isinstance(one, Sample)}) == 1


def test_a_run_scores_frames_with_the_scorer_it_names(loaded: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="the scorer is an open_clip model: pip install 'vlm-budget[vision]'")
    from tiny_clip import save_clip, tiny_clip

    config = EvalConfig.of(
        {
            "model": "tiny",
            "tasks": ["rooms", "haystack"],
            "methods": ["segpruner", "quota"],
            "budgets": ["0.3"],
            "without": ["uniform"],
            "limit": 3,
            "batch": 3,
            "device": "cpu",
            "pictures": 0,
            "scorer": f"clip:{save_clip(tiny_clip(0.0), tmp_path / 'clip')}",
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no views lie beside", category=UserWarning)  # of the clips
        run = runner.run(config, tmp_path / "run", loaded=loaded)
    assert not [one.error for one in run.answers if one.error]
    assert len(run.answers) == 2 * 3 * 4
    for one in summarise(run).results:
        scored = one.cost.get("score_ms", 0.0)
        assert (scored > 0) == (one.cell.methods == "quota")
        assert one.cost["prefill_ms"] > scored
    assert run.manifest["config"]["scorer"] == config.scorer


def test_a_scorer_in_a_folder_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for named, wanted in (("clip:mine", f"clip:{tmp_path / 'mine'}"), ("clip:ViT-B-16-SigLIP/webli", None), ("", None)):
        config = EvalConfig.of({"model": "nano", "tasks": "nano", "scorer": named})
        assert config.anchored().scorer == (wanted or named)


def test_a_scorer_is_named_in_words() -> None:
    with pytest.raises(OptionError, match="scorer must be text, got 3"):
        EvalConfig.of({"model": "nano", "tasks": "nano", "scorer": 3})
