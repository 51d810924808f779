"""From a video and a question to an answer: budgets met exactly, prompts that are true, every stage timed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

import tiny_models
import vlm_budget
from clips import write_clip
from tiny_processors import internvl_processor, onevision_processor, qwen_processor
from vlm_budget.errors import BudgetError, FrameScoreError, OptionError, UnsupportedModelError, VideoError
from vlm_budget.eval.nano import folder
from vlm_budget.frames import allocate_frames
from vlm_budget.pruners.quota import QuoTA
from vlm_budget.video.frames.queries import Query
from vlm_budget.video.frames.reader import Frame
from vlm_budget.video.frames.scorers import GivenScores
from vlm_budget.video.frames.timeline import clock_time, draw_timeline
from vlm_budget.video.frames.tstar import TStar
from vlm_budget.video.frames.watch import watch

SCORES = (0.1, 0.2, 0.9, 0.05, 0.0, 0.3, 0.8, 0.1)
FRAMES = [Frame(Image.new("RGB", (64, 48), (20 * n, 100, 250 - 20 * n)), 2.5 * n) for n in range(8)]
QUICK: dict[str, Any] = {"max_new_tokens": 2, "decoupled": None}
ALL: dict[str, Any] = {**QUICK, "search_settings": TStar(budget=1.0)}


class Brightness:
    """Scores a frame by its red, whatever the clue."""

    def __init__(self) -> None:
        self.clues: list[tuple[str, ...]] = []

    def score(self, frames: Sequence[Image.Image], clues: Sequence[str], progress: Any = None) -> torch.Tensor:
        self.clues.append(tuple(clues))
        return torch.tensor([[frame.getpixel((0, 0))[0] / 255] * len(clues) for frame in frames])


@pytest.fixture(scope="module")
def onevision() -> tuple[Any, Any]:
    return tiny_models.onevision_model(), onevision_processor()


@pytest.fixture(scope="module")
def qwen() -> tuple[Any, Any]:
    return tiny_models.qwen("Qwen2VL").model, qwen_processor()


# --- quota -----------------------------------------------------------------------------------------------------------


def test_quota_spends_the_budget_by_the_scores_and_the_report_agrees(onevision: Any) -> None:
    watched = watch(FRAMES, "what is it?", *onevision, scorer=SCORES, budget="30%", **QUICK)
    assert (watched.budget, watched.dense, watched.separators) == (22, 73, 1)
    assert watched.spent == watched.report.kept_tokens == 22
    assert watched.scores == pytest.approx(SCORES)
    assert list(watched.tokens) == [0, 1, 11, 0, 0, 1, 8, 0]
    assert [frame.time for frame in watched.frames] == [2.5, 5.0, 12.5, 15.0]
    assert {"score", "prepare", "answer"} <= set(watched.seconds)


def test_the_prompt_names_the_frames_that_are_left_and_no_others(onevision: Any) -> None:
    watched = watch(FRAMES, "what is it?", *onevision, scorer=SCORES, budget="30%", **QUICK)
    assert "The video lasts 20.00 seconds. 4 frames of it are given in order" in watched.prompt
    assert "shown at 2.50s, 5.00s, 12.50s, 15.00s." in watched.prompt
    silent = watch(FRAMES, "what is it?", *onevision, scorer=SCORES, budget="30%", tell_times=False, **QUICK)
    assert silent.prompt == "<video>what is it?"


def test_of_pictures_without_a_clock_no_times_are_told(onevision: Any) -> None:
    pictures = [frame.image for frame in FRAMES]
    assert (
        watch(pictures, "what is it?", *onevision, scorer=SCORES, budget="30%", **QUICK).prompt == "<video>what is it?"
    )


def test_dropped_frames_are_not_encoded(onevision: Any) -> None:
    model, processor = onevision
    seen: list[int] = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    watched = watch(FRAMES, "what is it?", model, processor, scorer=SCORES, budget="30%", **QUICK)
    hook.remove()
    assert seen == [len(watched.frames)] == [4]


def test_frames_stay_in_the_prompt_where_the_others_cannot_hold_the_budget(onevision: Any) -> None:
    one = [0.0] * 7 + [1.0]
    watched = watch(FRAMES, "what is it?", *onevision, scorer=one, budget=20, **QUICK)
    assert watched.tokens == (0,) * 7 + (19,) and watched.spent == watched.report.kept_tokens == 20
    assert "1 frame of it is given, shown at 17.50s." in watched.prompt


def test_the_answer_is_that_of_the_library_by_hand(onevision: Any) -> None:
    model, processor = onevision
    watched = watch(FRAMES, "what is it?", model, processor, scorer=SCORES, budget="30%", **QUICK)
    pictures = [frame.image for frame in watched.frames]
    inputs = processor(text=[watched.prompt], videos=[pictures], return_tensors="pt")
    with vlm_budget.patch(model, "quota", 22) as handle, torch.no_grad():
        handle.frames([score for score, count in zip(SCORES, watched.tokens, strict=True) if count])
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    told = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert watched.answer == told.strip()


def test_the_method_may_be_set_up_otherwise(onevision: Any) -> None:
    flat = watch(FRAMES, "what?", *onevision, scorer=SCORES, budget=25, quota=QuoTA(power=0.0), **QUICK)
    assert flat.tokens == (3,) * 8 and flat.spent == 25
    floor = watch(FRAMES, "what?", *onevision, scorer=SCORES, budget=25, quota=QuoTA(floor=2), **QUICK)
    assert min(floor.tokens) == 2 and floor.spent == floor.report.kept_tokens == 25


def test_all_tokens_are_the_unpatched_models_answer(onevision: Any) -> None:
    model, processor = onevision
    watched = watch(FRAMES, "what?", model, processor, scorer=SCORES, budget="100%", **QUICK)
    assert watched.tokens == (9,) * 8
    inputs = processor(text=[watched.prompt], videos=[[f.image for f in FRAMES]], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert watched.answer == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_the_model_comes_back_unpatched(onevision: Any) -> None:
    watch(FRAMES, "what?", *onevision, scorer=SCORES, budget=10, **QUICK)
    with pytest.raises(vlm_budget.errors.PatchError, match="not patched"):
        vlm_budget.unpatch(onevision[0])


# --- models with grids of their own, and pictures --------------------------------------------------------------------


def test_qwen_frames_are_resized_before_the_tower(qwen: Any) -> None:
    watched = watch(FRAMES, "what is it?", *qwen, scorer=SCORES, budget="30%", **QUICK)
    counts = allocate_frames(SCORES, 115, caps=48)
    assert (watched.dense, watched.budget) == (384, 115)
    assert watched.spent == watched.report.kept_tokens == 115
    assert [count > 0 for count in watched.tokens] == [count > 0 for count in counts]
    assert max(abs(mine - wanted) for mine, wanted in zip(watched.tokens, counts, strict=True)) <= 4
    assert watched.prompt.count("seconds>") == len(watched.frames) == 7 and "<10.0 seconds>" not in watched.prompt


def test_internvl_gets_each_frame_as_one_tile() -> None:
    model, processor = tiny_models.internvl().model, internvl_processor()
    watched = watch(FRAMES, "what is it?", model, processor, scorer=SCORES, budget="30%", **QUICK)
    assert (watched.dense, watched.budget) == (288, 86)
    assert list(watched.tokens) == allocate_frames(SCORES, 86, caps=36)
    assert watched.spent == watched.report.kept_tokens == 86 and "6 frames of it" in watched.prompt


def test_frames_are_pictures_where_the_model_knows_no_videos() -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder("nano"), dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder("nano"))
    watched = watch(FRAMES[:3], "what color", model, processor, scorer=SCORES[:3], budget="30%", **QUICK)
    assert watched.spent == watched.report.kept_tokens == watched.budget == 149
    assert watched.tokens[2] == max(watched.tokens)


# --- search and control ----------------------------------------------------------------------------------------------


def test_uniform_gives_every_frame_the_same(onevision: Any) -> None:
    watched = watch(FRAMES, "what?", *onevision, method="uniform", budget="50%", frames=4, **QUICK)
    assert watched.scores is None and len(watched.times) == 4
    assert watched.budget == watched.spent == 19 and max(watched.tokens) - min(watched.tokens) <= 1


def test_tstar_keeps_the_best_frames_and_they_share_evenly(onevision: Any) -> None:
    scorer = Brightness()
    query = Query("what?", targets=("mug",), cues=("sink",))
    watched = watch(FRAMES, query, *onevision, method="tstar", scorer=scorer, budget="50%", frames=2, **ALL)
    assert set(scorer.clues) == {("mug", "sink")}
    kept = [time for time, count in zip(watched.times, watched.tokens, strict=True) if count]
    assert kept == [frame.time for frame in watched.frames] and kept == [12.5, 17.5]
    assert watched.spent == watched.budget == 10
    assert watched.scores is not None and len(watched.scores) == len(watched.times)


def test_a_file_is_read_by_its_clock(onevision: Any, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", [20, 20, 20, 250, 20, 20], rate=2)
    watched = watch(clip, "what?", *onevision, scorer=Brightness(), budget=12, **QUICK)
    assert watched.duration == pytest.approx(3.0, abs=0.01)
    assert watched.times == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], abs=0.01)
    assert watched.tokens.index(max(watched.tokens)) == 3
    found = watch(clip, "what?", *onevision, method="tstar", scorer=Brightness(), budget=5, frames=1, **QUICK)
    assert len(found.frames) == 1 and found.spent == 5


# --- taking the question apart ---------------------------------------------------------------------------------------


def test_the_answering_model_takes_the_question_apart_unpatched(
    onevision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlm_budget.video.frames.watch as watching

    written = "Step 1: yes\nStep 2: ['mug']\nStep 3: ['mug']"
    monkeypatch.setattr(watching, "text_answer", lambda model, processor: lambda text: written)
    scorer = Brightness()
    watched = watch(FRAMES, "where is the mug?", *onevision, scorer=scorer, budget=20, max_new_tokens=2)
    assert watched.query.targets == ("mug",) and scorer.clues == [("mug",)]
    assert "decouple" in watched.seconds and "where is the mug?" in watched.prompt
    watch(FRAMES, Query("where?", events=("a fall",)), *onevision, scorer=scorer, budget=20, max_new_tokens=2)
    assert scorer.clues[-1] == ("a fall",)


def test_text_goes_through_the_model_without_a_picture(onevision: Any) -> None:
    from vlm_budget.video.frames.watch import text_answer

    model, processor = onevision
    inputs = processor(text=["hello"], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    told = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text_answer(model, processor, 3)("hello") == told


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "quotas"}, OptionError, "one of quota, tstar, uniform"),
        ({"scorer": None}, OptionError, "needs a scorer"),
        ({"method": "tstar"}, OptionError, "takes a scorer, not scores"),
        ({"method": "tstar", "scorer": GivenScores(SCORES)}, OptionError, "takes a scorer, not scores"),
        ({"method": "uniform"}, OptionError, "takes no scorer"),
        ({"frames": 0}, OptionError, "frames must be a whole number from 1"),
        ({"budget": "40% flops"}, BudgetError, "no number of tokens"),
        ({"budget": 1000}, BudgetError, "1000"),
        ({"budget": 0}, BudgetError, "above 0"),
        ({"question": "x" * 10_000}, OptionError, "10,000 characters"),
        ({"question": "what <video> is"}, OptionError, "stands for a picture"),
        ({"question": "<image>", "scorer": Brightness(), "decoupled": "entities"}, OptionError, "stands for a picture"),
        ({"scorer": [*SCORES[:7], float("nan")]}, FrameScoreError, "NaN"),
        ({"scorer": SCORES[:5]}, FrameScoreError, "5 scores were given for 8 frames"),
        ({"source": []}, VideoError, "not empty"),
        ({"source": [FRAMES[1], FRAMES[0]]}, VideoError, "shown later"),
        ({"source": "nowhere.mp4"}, VideoError, "nowhere.mp4"),
        ({"source": [Frame(FRAMES[0].image, float("nan"))]}, VideoError, "number of seconds from 0 on, got nan"),
        ({"source": [torch.zeros(3, 4, 4)]}, VideoError, "got Tensor"),
    ],
)
def test_bad_input_is_told_by_type(
    onevision: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"source": FRAMES, "question": "what?", "scorer": SCORES, "budget": 20, **QUICK, **changes}
    with pytest.raises(error, match=re.escape(message)):
        watch(given.pop("source"), given.pop("question"), *onevision, **given)


def test_a_model_of_no_family_is_refused(onevision: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        watch(FRAMES, "what?", torch.nn.Linear(1, 1), onevision[1], scorer=Brightness(), budget=20, **QUICK)


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_timeline_shows_a_bar_per_frame(onevision: Any) -> None:
    watched = watch(FRAMES, "what is it? " * 40, *onevision, scorer=SCORES, budget="30%", **QUICK)
    page = draw_timeline(watched)
    accent, quiet = (255, 190, 60), (86, 94, 112)
    colors = {color for _, color in page.getcolors(1 << 24)}
    assert page.width == 1280 and {accent, quiet} <= colors
    alone = draw_timeline(watch(FRAMES, "what?", *onevision, method="uniform", budget="50%", **QUICK))
    assert alone.height < page.height


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (2.5, "0:02.5"), (59.99, "1:00"), (3723.4, "1:02:03"), (61, "1:01")]
)
def test_times_are_written_as_clocks(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
