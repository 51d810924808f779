from __future__ import annotations

import pytest

from vlm_budget.eval.choices import accuracy_by, lettered, plain, read_choice, score_choice

OPTIONS = ["red", "blue", "a red car", "green"]


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("b", "B"),
        ("(b)", "B"),
        (" B \n", "B"),
        ("A.\n", "A"),
        ("Answer: B", "B"),
        ("answer: b", "B"),
        ("The answer is (B) because it's blue", "B"),
        ("The answer is A because it's red", "A"),
        ("The correct option is A.", "A"),
        ("The best answer is: D", "D"),
        ("The answer is option D", "D"),
        ("the answer: B, not A", "B"),
        ("The answer isn't B. It is (C).", "C"),
        ("I would choose C.", "C"),
        ("**B**", "B"),
        ("B. blue", "B"),
        ("B) blue", "B"),
        ("(B) blue", "B"),
        ("B: blue", "B"),
        ("B, because the car is blue", "B"),
        ("Best option: (C) a red car", "C"),
        ("Let me think.\nSo it moves.\nD", "D"),
        ("the final answer is \\boxed{C}.", "C"),
        ("<think>A or B? The answer is A</think>B", "B"),
        ("The answer is A. Wait, the answer is B.", "B"),
        ("Based on the video, (D) seems right", "D"),
        ("Blue.", "B"),
        ("The answer is blue", "B"),
        ("It is a red car.", "C"),
        ("A red", "A"),
        ("A red car", "C"),
        ("The color of the thing is blue", "B"),
    ],
)
def test_a_choice_is_read(said, letter):
    assert read_choice(said, OPTIONS) == letter


@pytest.mark.parametrize(
    "said",
    [
        "",
        "?",
        "E",
        "Yes",
        "A dog is running",
        "The answer is a dog",
        "The answer is A or B",
        "Answer: A and C",
        "(A) or (B)",
        "A, B",
        "A. red B. blue C. a red car D. green",
        "A. red\nB. blue\nC. a red car\nD. green",
        "I do not know",
        "It is not blue",
        "red or blue",
        "The answer is not B",
        "None of the above",
        "I think the answer is I",
        "<script>alert('B')</script> or C",
        "(((((" * 500,
        "answer " * 500,
    ],
)
def test_nothing_is_guessed(said):
    assert read_choice(said, OPTIONS) is None


def test_only_letters_of_the_options_count():
    assert read_choice("C", ["yes", "no"]) is None
    assert read_choice("E", ["1", "2", "3", "4", "5"]) == "E"
    assert read_choice("B", []) is None


def test_options_that_say_the_same_are_no_choice():
    assert read_choice("red", ["red", "red", "blue"]) is None
    assert read_choice("blue", ["red", "red", "blue"]) == "C"


def test_yes_and_no_as_options():
    options = ["Yes", "No"]
    assert read_choice("No, it does not.", options) == "B"
    assert read_choice("Yes. It is there.", options) == "A"
    assert read_choice("It is not there", options) is None
    assert read_choice("No, wait, yes", options) is None


def test_numbers_as_options():
    assert read_choice("4", ["2", "4", "14"]) == "B"
    assert read_choice("There are 14 of them", ["2", "4", "14"]) == "C"


def test_lettered_and_plain_are_inverse():
    assert lettered(OPTIONS).splitlines() == ["A. red", "B. blue", "C. a red car", "D. green"]
    assert plain(lettered(OPTIONS).splitlines()) == OPTIONS
    assert plain(["(A) x", "(B) y"]) == ["x", "y"]
    # Not every option has its letter: then they are part of the text.
    assert plain(["A. Smith", "J. Doe"]) == ["A. Smith", "J. Doe"]


def test_scores_and_figures():
    assert score_choice("B", OPTIONS, "B") == {"accuracy": 1.0, "readable": 1.0}
    assert score_choice("A", OPTIONS, "B") == {"accuracy": 0.0, "readable": 1.0}
    assert score_choice("who knows", OPTIONS, "B") == {"accuracy": 0.0, "readable": 0.0}
    rows = [({"accuracy": one}, {"size": size}) for one, size in [(1.0, "60"), (0.0, "60"), (1.0, "600"), (0.0, "8")]]
    found = accuracy_by(rows, "size", "missing")
    assert found == {"accuracy, size 8": 0.0, "accuracy, size 60": 0.5, "accuracy, size 600": 1.0}
    assert list(found)[0] == "accuracy, size 8"  # numbers in their own order


def test_a_letter_on_a_first_line_of_its_own_is_the_choice() -> None:
    assert read_choice("B\n\nExplanation: A is wrong", ["red", "blue"]) == "B"
    assert read_choice("Z\nthe answer is A", ["red", "blue"]) == "A"
