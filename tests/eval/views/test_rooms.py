from __future__ import annotations

import numpy as np
import pytest

from vlm_budget.eval.views import labels, questions, rooms
from vlm_budget.eval.views.world import COLOR_NAMES, KINDS, Picture, Thing, points

SEED = 4_243


@pytest.fixture(scope="module")
def samples() -> list[rooms.RoomSample]:
    return rooms.test_set(60, SEED)


@pytest.fixture(scope="module")
def asked(samples: list[rooms.RoomSample]) -> list[tuple[rooms.RoomSample, questions.Question]]:
    return [(sample, question) for sample in samples for question in sample.questions]


def true_answer(things: tuple[Thing, ...], prompt: str) -> str:
    """The answer worked out from the room alone, form by form."""
    words = prompt.split()
    by_kind = {KINDS[thing.kind]: thing for thing in things}
    matching = [KINDS[thing.kind] for thing in things if COLOR_NAMES[thing.color] == words[-1]]
    if words[:2] == ["what", "is"]:
        return COLOR_NAMES[by_kind[words[-1]].color]
    if words[0] == "how":
        return str(len(matching))
    if "colored" in words:
        assert len(matching) == 1, "asked for the thing of a colour that several have"
        return matching[0]
    me = np.array(by_kind.pop(words[-1]).place)
    far = sorted((float(np.hypot(*(me - other.place))), name) for name, other in by_kind.items())
    assert far[1][0] >= 2 * far[0][0], "asked for the nearest where it is not clear"
    return far[0][1]


def test_every_answer_follows_from_the_room(asked: list[tuple[rooms.RoomSample, questions.Question]]) -> None:
    for sample, question in asked:
        assert question.answer == true_answer(sample.scene.room.things, question.prompt), question


def test_targets_are_the_things_that_decide(asked: list[tuple[rooms.RoomSample, questions.Question]]) -> None:
    for sample, question in asked:
        things = [sample.scene.room.things[index] for index in question.targets]
        named = {KINDS[thing.kind] for thing in things} | {COLOR_NAMES[thing.color] for thing in things}
        if question.task == "count":
            assert len(things) == int(question.answer)
        else:
            assert question.answer in named
        assert not things or question.prompt.split()[-1] in named


def test_prompts_have_one_length_and_only_known_words(
    asked: list[tuple[rooms.RoomSample, questions.Question]],
) -> None:
    known = set(rooms.vocabulary())
    assert len(known) == len(rooms.vocabulary())
    for _, question in asked:
        words = question.prompt.split()
        assert len(words) == rooms.PROMPT_WORDS
        assert known.issuperset([*words, question.answer])


def test_every_task_is_asked_and_no_answer_dominates(
    asked: list[tuple[rooms.RoomSample, questions.Question]],
) -> None:
    found = rooms.priors(question for _, question in asked)
    assert set(found) == {"all", *rooms.TASKS}
    assert found["count"] < 0.4
    assert max(found["color"], found["kind"], found["nearest"]) < 0.3
    assert found["all"] < 0.3


def test_no_question_is_asked_twice_of_a_room(samples: list[rooms.RoomSample]) -> None:
    for sample in samples:
        prompts = [question.prompt for question in sample.questions]
        assert len(set(prompts)) == len(prompts) == rooms.QUESTIONS_PER_ROOM


def test_every_thing_is_well_seen_from_several_places(samples: list[rooms.RoomSample]) -> None:
    for sample in samples:
        well = (sample.scene.seen() >= rooms.SEEN_PIXELS).sum(1)
        assert well.min() >= rooms.SEEN_VIEWS
        assert len(sample.scene.pictures) == len(sample.scene.cameras) == rooms.VIEWS


def test_pixels_of_a_thing_lie_where_it_stands(samples: list[rooms.RoomSample]) -> None:
    for sample in samples[:10]:
        for camera, picture in zip(sample.scene.cameras, sample.scene.pictures, strict=True):
            at = points(picture, camera)
            for index, thing in enumerate(sample.scene.room.things):
                mine = at[picture.owner == index]
                assert np.linalg.norm(mine[:, :2] - thing.place, axis=1).max(initial=0) < thing.radius + 1e-4
                assert mine[:, 2].max(initial=0) < thing.height + 1e-4


def test_kinds_are_distinct_and_things_stand_free_of_one_another_and_of_cameras(
    samples: list[rooms.RoomSample],
) -> None:
    for sample in samples:
        room = sample.scene.room
        assert 4 <= len({thing.kind for thing in room.things}) == len(room.things) <= 6
        for index, thing in enumerate(room.things):
            for other in room.things[:index]:
                assert np.hypot(*np.subtract(thing.place, other.place)) > 0.5
            for camera in sample.scene.cameras:
                assert np.abs(camera.pose[:2, 3]).max() < room.half
                high = camera.pose[2, 3] > thing.height + 0.1
                assert high or np.hypot(*(camera.pose[:2, 3] - thing.place)) > 0.7


def test_some_sites_are_seen_seldom_and_some_views_show_nothing(samples: list[rooms.RoomSample]) -> None:
    seen = [(sample.scene.seen() >= rooms.SEEN_PIXELS) for sample in samples]
    assert np.mean([one.sum(1).max() >= 6 for one in seen]) > 0.5
    assert np.mean([one.sum(1).min() <= 3 for one in seen]) > 0.5
    assert np.mean([not one.any(0).all() for one in seen]) > 0.9


def test_the_same_seed_gives_the_same_rooms_and_a_shorter_set_begins_a_longer_one() -> None:
    short, long, other = rooms.test_set(1, SEED, first=2), rooms.test_set(3, SEED), rooms.test_set(3, SEED + 1)
    assert short[0].questions == long[2].questions
    assert short[0].questions != other[2].questions
    for a, b in zip(short[0].scene.pictures, long[2].scene.pictures, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert np.array_equal(a.depth, b.depth)
    assert not np.array_equal(long[0].scene.pictures[0].pixels, other[0].scene.pictures[0].pixels)


def test_validation_and_test_rooms_differ() -> None:
    one, two = rooms.test_set(1, rooms.VALIDATION_SEED)[0], rooms.test_set(1)[0]
    assert not np.array_equal(one.scene.pictures[0].pixels, two.scene.pictures[0].pixels)


def test_labels_say_what_each_patch_shows() -> None:
    things = (Thing(3, 1, (0.0, 0.0)), Thing(5, 2, (0.0, 0.0)))
    owner = np.full((48, 48), -1, np.int16)
    owner[0:4, 0:8] = 0  # half of patch 0
    owner[0:2, 8:16] = 1  # a quarter of patch 1: labelled, 16 pixels are too few for the picture
    owner[0:1, 16:24] = 0  # an eighth of patch 2: bare
    owner[40:48, 40:48] = 0  # the last patch, shared
    owner[40:42, 40:48] = 1
    picture = Picture(np.zeros((48, 48, 3), np.uint8), np.ones((48, 48), np.float32), owner)
    kind, color, summary = labels.picture_labels(picture, things)
    assert kind[[0, 1, 2, 35]].tolist() == [3, 5, labels.NO_KIND, 3]
    assert color[[0, 1, 2, 35]].tolist() == [1, 2, labels.NO_COLOR, 1]
    assert (kind != labels.NO_KIND).sum() == 3
    pairs = len(KINDS) + len(COLOR_NAMES)
    both = [3, 5, 8 + 1, 8 + 2, pairs + 3 * 7 + 1, pairs + 5 * 7 + 2]
    assert np.flatnonzero(summary).tolist() == sorted(both)
    owner[owner == 1] = -1
    assert np.flatnonzero(labels.picture_labels(picture, things)[2]).tolist() == both[::2]


def test_labels_of_many_pictures_are_those_of_each(samples: list[rooms.RoomSample]) -> None:
    scene = samples[0].scene
    many = labels.batch_labels(scene.pictures, [scene.room.things] * rooms.VIEWS)
    for index, picture in enumerate(scene.pictures):
        for got, want in zip(many, labels.picture_labels(picture, scene.room.things), strict=True):
            assert np.array_equal(got[index], want)
