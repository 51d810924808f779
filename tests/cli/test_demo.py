"""``demo``: a poster, its questions, both answers, and no flattery."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_budget.cli.demo import counted, is_right
from vlm_budget.eval.nano.data import test_set as posters

Cli = Callable[..., Any]


def test_nano_shows_answers_times_accuracy_and_its_limits(cli: Cli, tmp_path: Path) -> None:
    result = cli("demo", "--pages", 1, "--repeats", 1, "--seed", 2)
    assert result.exit_code == 0, result.stderr
    for question in posters(3)[2].questions:
        assert question.prompt in result.stdout
        assert question.answer in result.stdout
    for text in ("192 tokens", "38 tokens", "time to first token", "prefill", "KV cache", "unseen posters", "ratio"):
        assert text in result.stdout
    assert "small synthetic model" in result.stdout
    assert (tmp_path / "kept.png").is_file()
    assert result.stderr == ""


def test_json_judges_every_answer(cli: Cli) -> None:
    arguments = ("--pages", 2, "--repeats", 1, "--seed", 3, "--budget", "10%", "--method", "random", "--json")
    result = cli("demo", *arguments)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    expected = posters(4)[3].questions
    assert [(q["question"], q["truth"]) for q in facts["questions"]] == [(q.prompt, q.answer) for q in expected]
    for asked in facts["questions"]:
        for name in ("full", "pruned"):
            assert asked[f"right_{name}"] == is_right(asked[name]["answer"], asked["truth"], first_word=True)
    assert facts["mean"]["pruned"]["visual_tokens"] == 19
    assert facts["method"] == "Random()"
    assert facts["accuracy"]["questions"] == sum(len(page.questions) for page in posters(2))
    assert facts["accuracy"]["right_full"] > facts["accuracy"]["right_pruned"]


def test_wrong_answers_are_shown_as_wrong(cli: Cli, tiny_model: Path) -> None:
    result = cli("demo", "--model", tiny_model, "--repeats", 1)
    assert result.exit_code == 0, result.stderr
    assert "(wrong)" in result.stdout
    assert "unseen posters" not in result.stdout
    assert "small synthetic model" not in result.stdout


@pytest.mark.parametrize(
    ("answer", "first_word", "right"),
    [
        ("red", True, True),
        ("Red.", True, True),
        ("red blue", True, True),
        ("blue red", True, False),
        ("blue red", False, True),
        ("The digit is RED!", False, True),
        ("reddish", False, False),
        ("", True, False),
        ("", False, False),
    ],
)
def test_an_answer_is_right_when_its_counted_words_hold_the_truth(answer: str, first_word: bool, right: bool) -> None:
    assert is_right(answer, "red", first_word) is right


def test_only_the_first_word_of_a_shipped_model_counts() -> None:
    assert counted("red blue", first_word=True) == "red"
    assert counted("red blue", first_word=False) == "red blue"
    assert counted("", first_word=True) == ""
