"""Every metric against examples that were worked out by hand from its published definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_budget.eval.metrics import (
    anls,
    contains_reference,
    denies,
    exact_match,
    relaxed_accuracy,
    vqa_accuracy,
    vqa_normal,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # Left out one of those who agree: (n - 1) / 3; one of the others: n / 3; each at most 1.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_by_people_who_agree(agreeing: int, expected: float):
    people = ["red"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert vqa_accuracy("Red.", people) == pytest.approx(expected)


def test_vqa_accuracy_is_the_mean_over_all_sets_of_nine():
    people = ["two", "2", "a pair", "2 dogs", "two!", "3", "none", "", "zwei", "deux"]
    same = [one in ("two", "2", "two!") for one in people]
    by_hand = sum(min(1, (sum(same) - same[out]) / 3) for out in range(10)) / 10
    assert by_hand == pytest.approx(0.9)
    assert vqa_accuracy("The Two", people) == pytest.approx(by_hand)


def test_vqa_accuracy_of_an_empty_answer():
    assert vqa_accuracy("", ["yes"] * 10) == 0
    assert vqa_accuracy("the", ["a"] * 10) == 1  # nothing is left of either


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("YES", "yes"),  # lower case
        ("Yes.", "yes"),  # period
        ("3.50", "3.50"),  # decimal point stays
        ("U.S. flag", "us flag"),
        ("version .5", "version .5"),
        ("four cats", "4 cats"),  # number words
        ("None", "0"),
        ("eleven", "eleven"),  # only to ten
        ("The man on a horse", "man on horse"),  # articles
        ("an", ""),
        ("dont know", "don't know"),  # contractions
        ("couldntve", "couldntve"),  # both apostrophes left out: not in the evaluation's list
        ("couldnt've", "couldn't've"),
        ("yall", "y'all"),
        ("its", "its"),  # a word of its own
        ("girl's", "girl's"),  # apostrophe stays
        ("2:50 pm", "2:50 pm"),  # colon stays
        ("100,978", "100978"),  # comma within a number: no space
        ("red,blue", "red blue"),  # other punctuation: a space
        ("red, blue", "red blue"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("(left)", "left"),
        ("really?!", "really"),
        ("50%", "50%"),  # no mark of the list
        ("$5", "$5"),
        ("  much \t space\n here ", "much space here"),
        ("Café Москва 東京", "café москва 東京"),
        ("", ""),
        ("...", ""),
        ("1,000-2,000", "10002000"),  # the published evaluation drops every mark where a number has a comma
    ],
)
def test_vqa_normal_form(text: str, expected: str):
    assert vqa_normal(text) == expected


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("ITC Limited", ["itc limited"], 1.0),
        ("itc  limited ", ["ITC Limited"], 1.0),
        ("itclimited", ["itc limited"], 1 - 1 / 11),  # a space counts, its number does not
        ("kitten", ["sitting"], 1 - 3 / 7),  # three edits in seven letters: 0.43 < 0.5
        ("abcd", ["abxy"], 0.0),  # 2 / 4 is the threshold itself
        ("abcde", ["abcxy"], 0.6),
        ("dog", ["cat"], 0.0),
        ("03/17/98", ["3/17/98", "1998"], 1 - 1 / 8),  # the nearest reference
        ("", ["page"], 0.0),
        ("", [""], 1.0),
        ("page", [""], 0.0),
        ("café", ["cafe"], 0.75),
        ("anything", [], 0.0),
    ],
)
def test_anls_examples(answer: str, references: list[str], expected: float):
    assert anls(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("105", "100", 1),  # five percent
        ("95", "100", 1),
        ("106", "100", 0),
        ("94.9", "100", 0),
        ("-105", "-100", 1),
        ("100", "-100", 0),
        ("12.", "12", 1),
        (" 12 ", "12", 1),
        ("0", "0", 1),
        ("0.0", "0", 1),
        ("0.01", "0", 0),
        ("25%", "0.25", 1),  # a percent sign divides by a hundred
        ("25%", "25%", 1),
        ("26%", "25%", 1),  # 0.01 of 0.25 is four percent
        ("27%", "25%", 0),
        ("25%", "25", 0),
        ("1,000", "1000", 0),  # a separator makes it a text
        ("1,000", "1,000", 1),
        ("Yes", "yes", 1),
        ("Yes.", "yes", 0),  # texts must be equal
        ("light blue", "blue", 0),
        ("Côte d'Ivoire", "côte d'ivoire", 1),
        ("", "5", 0),
        ("", "", 1),
        ("%", "5", 0),
        ("nan", "5", 0),
        ("NaN", "nan", 1),  # a text
        ("inf", "5", 0),
        ("2009", "2010", 1),  # years are numbers, too
    ],
)
def test_relaxed_accuracy_examples(answer: str, reference: str, expected: float):
    assert relaxed_accuracy(answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "references", "formula", "expected"),
    [
        ("The word is CENTRE.", ["centre"], False, 1),
        ("CENTER", ["centre"], False, 0),
        ("line one\nline two", ["one line"], False, 1),
        ("Total: 12.50", ["12.5", "13"], False, 1),
        ("1250", ["12.5"], False, 0),
        ("x ^ { 2 } + 1", ["x^{2}"], True, 1),  # spaces do not count
        ("X ^ { 2 }", ["x^{2}"], True, 0),  # case does
        ("X ^ { 2 }", ["x^{2}"], False, 0),  # spaces count
        ("你好世界", ["你好"], False, 1),
        ("", ["a"], False, 0),
    ],
)
def test_containment_examples(answer: str, references: list[str], formula: bool, expected: float):
    assert contains_reference(answer, references, formula) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Left.", "left", 1),
        ("  light  Brown ", "light brown", 1),
        ("t-shirt", "t shirt", 0),
        ("T-Shirt", "tshirt", 1),
        ("the left", "left", 0),
        ("", "left", 0),
        ("leftmost", "left", 0),
    ],
)
def test_exact_match_examples(answer: str, reference: str, expected: float):
    assert exact_match(answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        (" YES, there is.", "yes"),
        ("yes, there is", "yes"),
        ("No, there is not", "no"),
        ("y", "yes"),
        ("N", "no"),
        ("a yes", None),
        ("I think yes", None),
        ("It is not", None),
        ("", None),
        ("да", None),
    ],
)
def test_yes_or_no_by_the_first_four_characters(answer: str, expected: str | None):
    assert yes_or_no(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", False),
        ("yes, there is", False),
        ("No", True),
        ("NO.", True),
        ("no, there is", True),
        ("There is not a dog.", True),
        ("There is a dog. It is not big.", False),  # the first sentence
        ("nothing of the kind", False),  # whole words
        ("isn't there", False),
        ("", False),
    ],
)
def test_denies_by_words_of_the_first_sentence(answer: str, expected: bool):
    assert denies(answer) is expected


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=2, max_size=10))
def test_any_text_scores_between_zero_and_one_and_itself_one(answer: str, references: list[str]):
    for value in (vqa_accuracy(answer, references), anls(answer, references), contains_reference(answer, references)):
        assert 0 <= value <= 1
    assert vqa_accuracy(answer, [answer] * 10) == anls(answer, [answer]) == exact_match(answer, answer) == 1
    assert relaxed_accuracy(answer, answer) == 1


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab c", max_size=8), st.text(alphabet="ab c", max_size=8))
def test_edit_distance_is_symmetric_and_obeys_its_bounds(first: str, second: str):
    value = anls(first, [second], threshold=2.0)
    assert value == pytest.approx(anls(second, [first], threshold=2.0))
    one, two = (" ".join(text.split()) for text in (first, second))
    longest = max(len(one), len(two))
    if longest:
        assert (1 - value) * longest >= abs(len(one) - len(two)) - 1e-9
