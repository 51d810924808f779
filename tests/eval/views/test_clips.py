from __future__ import annotations

import numpy as np
import pytest

from vlm_budget.eval.views import clips, rooms
from vlm_budget.eval.views.questions import Question
from vlm_budget.eval.views.world import COLOR_NAMES, KINDS

SEED = 4_244


@pytest.fixture(scope="module")
def samples() -> list[clips.ClipSample]:
    return clips.test_set(150, SEED)


@pytest.fixture(scope="module")
def asked(samples: list[clips.ClipSample]) -> list[tuple[clips.ClipSample, Question]]:
    return [(sample, question) for sample in samples for question in sample.questions]


def true_answer(events: tuple[clips.Event, ...], prompt: str) -> str:
    """The answer worked out from the events alone, form by form."""
    words = prompt.split()
    by_kind = {KINDS[event.kind]: event for event in events}
    if words[:2] == ["what", "is"]:
        return COLOR_NAMES[by_kind[words[-1]].color]
    if "colored" in words:
        (only,) = (KINDS[event.kind] for event in events if COLOR_NAMES[event.color] == words[-1])
        return only
    return min((words[4], words[6]), key=lambda kind: by_kind[kind].start)


def test_every_answer_follows_from_the_events(asked: list[tuple[clips.ClipSample, Question]]) -> None:
    for sample, question in asked:
        assert question.answer == true_answer(sample.scene.events, question.prompt), question
        kinds = {KINDS[sample.scene.events[index].kind] for index in question.targets}
        colors = {COLOR_NAMES[sample.scene.events[index].color] for index in question.targets}
        assert question.answer in kinds | colors
        assert question.prompt.split()[-1] in kinds | colors


def test_prompts_are_as_long_as_those_of_rooms_and_use_the_same_words(
    asked: list[tuple[clips.ClipSample, Question]],
) -> None:
    known = set(clips.vocabulary())
    assert clips.vocabulary() == rooms.vocabulary()
    for _, question in asked:
        assert len(question.prompt.split()) == clips.PROMPT_WORDS == rooms.PROMPT_WORDS
        assert known.issuperset([*question.prompt.split(), question.answer])


def test_no_answer_dominates_and_the_first_named_comes_first_half_of_the_time(
    asked: list[tuple[clips.ClipSample, Question]],
) -> None:
    found = clips.priors(question for _, question in asked)
    assert set(found) == {"all", *clips.TASKS}
    assert max(found.values()) < 0.25
    orders = [question for _, question in asked if question.task == "order"]
    assert 0.4 < np.mean([question.answer == question.prompt.split()[4] for question in orders]) < 0.6


def test_events_do_not_overlap_and_their_kinds_are_distinct(samples: list[clips.ClipSample]) -> None:
    for sample in samples:
        events = sample.scene.events
        assert 4 <= len({event.kind for event in events}) == len(events) <= 5
        assert events[0].start >= 0
        assert events[-1].stop <= clips.FRAMES
        assert all(4 <= event.stop - event.start <= 6 for event in events)
        assert all(one.stop < two.start for one, two in zip(events, events[1:], strict=False))


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.99])
def test_any_32_even_frames_show_every_event(samples: list[clips.ClipSample], offset: float) -> None:
    chosen = clips.evenly(32, offset=offset)
    assert len(set(chosen)) == 32
    assert max(chosen) < clips.FRAMES
    for sample in samples:
        shown = {event for index in chosen for event in sample.scene.active(index)}
        assert shown == set(range(len(sample.scene.events)))


def test_a_thing_is_whole_in_all_frames_of_its_event_and_in_no_other(samples: list[clips.ClipSample]) -> None:
    for sample in samples[:12]:
        scene = sample.scene
        for index in range(clips.FRAMES):
            owner = scene.frame(index).owner
            found = sorted(set(np.unique(owner).tolist()) - {-1})
            assert found == scene.active(index)
            if found:
                mine = owner == found[0]
                assert mine.sum() >= 60
                rows, columns = np.nonzero(mine)
                assert columns.min() > 0
                assert columns.max() < 47
                assert rows.max() < 47


def test_frames_are_the_same_however_they_are_asked_for(samples: list[clips.ClipSample]) -> None:
    scene = samples[0].scene
    whole = scene.frames
    assert whole.shape == (clips.FRAMES, 48, 48, 3)
    assert whole.dtype == np.uint8
    for index in (95, 3, 3, 40):
        assert np.array_equal(scene.frame(index).pixels, whole[index])
    assert scene.times.tolist() == list(range(clips.FRAMES))


def test_the_camera_moves_slowly(samples: list[clips.ClipSample]) -> None:
    for sample in samples:
        poses = np.stack([camera.pose for camera in sample.scene.cameras])
        ahead = poses[:, :3, 2]
        turns = np.degrees(np.arccos(np.clip((ahead[1:] * ahead[:-1]).sum(1), -1, 1)))
        assert turns.max() < 4.5
        assert np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1).max() < 0.05
        assert turns.sum() > 60


def test_an_events_seconds_are_those_of_its_first_and_last_frame(samples: list[clips.ClipSample]) -> None:
    for event in samples[0].scene.events:
        assert event.seconds == (float(event.start), float(event.stop - 1))


def test_the_same_seed_gives_the_same_clips_and_a_shorter_set_begins_a_longer_one() -> None:
    short, long, other = clips.test_set(1, SEED, first=2), clips.test_set(3, SEED), clips.test_set(3, SEED + 1)
    assert short[0].questions == long[2].questions
    assert short[0].scene.events == long[2].scene.events
    assert np.array_equal(short[0].scene.frame(5).pixels, long[2].scene.frame(5).pixels)
    assert long[2].scene.events != other[2].scene.events
