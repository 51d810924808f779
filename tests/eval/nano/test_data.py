from collections import Counter

import numpy as np
import pytest

from vlm_budget.eval.nano import data
from vlm_budget.eval.nano.scene import CANVAS, COLOR_NAMES, HARD_KINDS, MARK, Scene, make_scene

SEED = 4_242


@pytest.fixture(scope="module")
def samples() -> list[data.Sample]:
    return data.test_set(400, SEED)


def true_answer(scene: Scene, prompt: str) -> str:
    """The answer worked out from the scene alone, form by form."""
    words = prompt.split()
    if words[:2] == ["what", "color"]:
        return next(COLOR_NAMES[item.color] for item in scene.items if item.digit == int(words[-1]))
    if words[:2] == ["which", "corner"]:
        item = next(item for item in scene.items if item.digit == int(words[-1]))
        return ("top" if item.y < CANVAS / 2 else "bottom") + ("left" if item.x < CANVAS / 2 else "right")
    matching = [item for item in scene.items if COLOR_NAMES[item.color] == words[-1]]
    if words[:2] == ["which", "digit"]:
        assert len(matching) == 1, "asked for the digit of a colour that several digits have"
        return str(matching[0].digit)
    if words[0] == "how":
        return str(len(matching))
    return "yes" if matching else "no"


def test_the_same_seed_gives_the_same_pages_and_questions() -> None:
    first, second = data.test_set(5, SEED), data.test_set(5, SEED)
    for a, b in zip(first, second, strict=True):
        assert a.questions == b.questions
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_a_shorter_set_begins_a_longer_one_and_another_seed_differs() -> None:
    assert data.test_set(2, SEED)[1].questions == data.test_set(7, SEED)[1].questions
    assert data.test_set(2, SEED)[1].questions != data.test_set(2, SEED + 1)[1].questions


def test_every_answer_follows_from_the_scene(samples: list[data.Sample]) -> None:
    for sample in samples:
        for question in sample.questions:
            assert question.answer == true_answer(sample.scene, question.prompt), question


def test_prompts_have_one_length_and_only_known_words(samples: list[data.Sample]) -> None:
    known = set(data.vocabulary())
    for question in (question for sample in samples for question in sample.questions):
        words = question.prompt.split()
        assert len(words) == data.PROMPT_WORDS
        assert known.issuperset([*words, question.answer])


def test_faint_pages_are_asked_about_faint_digits_or_absent_colours_only(samples: list[data.Sample]) -> None:
    faint = [sample for sample in samples if sample.scene.hard_kind == "faint"]
    assert faint
    for sample in faint:
        for question in sample.questions:
            targets = [sample.scene.items[i] for i in question.targets]
            assert not targets or any(item.faint for item in targets), question


def test_priors_are_sane(samples: list[data.Sample]) -> None:
    priors = data.priors(question for sample in samples for question in sample.questions)
    assert priors["count"] <= 0.52
    assert priors["existence"] <= 0.58
    assert priors["place"] <= 0.35
    assert priors["retrieval"] <= 0.20
    assert priors["all"] <= 0.40


def test_every_task_and_every_kind_of_hard_page_is_there(samples: list[data.Sample]) -> None:
    assert {question.task for sample in samples for question in sample.questions} == set(data.TASKS)
    kinds = Counter(sample.scene.hard_kind for sample in samples)
    assert set(kinds) == {None, *HARD_KINDS}
    assert 0.5 < kinds[None] / len(samples) < 0.75


@pytest.mark.parametrize("kind", [None, *HARD_KINDS])
def test_owner_map_shows_every_item_and_mark_where_it_is(kind: str | None) -> None:
    for seed in range(5):
        scene = make_scene(np.random.default_rng(seed), kind)
        assert len({item.digit for item in scene.items}) == len(scene.items) >= 1
        assert bool(scene.marks) <= (kind == "distractor")
        owners = {*range(len(scene.items)), *(MARK + i for i in range(len(scene.marks)))}
        assert set(np.unique(scene.owner)) == {-1, *owners}
        for index, item in enumerate(scene.items):
            rows, columns = np.nonzero(scene.owner == index)
            assert abs(rows.mean() - item.y) < item.height / 2
            assert abs(columns.mean() - item.x) < item.height / 2


def test_marks_outshine_the_digits_of_a_distractor_page() -> None:
    scenes = [make_scene(np.random.default_rng(seed), "distractor") for seed in range(20)]
    ink = [((scene.owner >= MARK).sum(), ((scene.owner >= 0) & (scene.owner < MARK)).sum()) for scene in scenes]
    assert sum(marks for marks, _ in ink) > sum(digits for _, digits in ink)
