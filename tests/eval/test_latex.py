from __future__ import annotations

import pytest

from dataset_files import HOSTILE
from vlm_budget.eval.latex import boxed, same_answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{\text{a {b}}}", r"\text{a {b}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 5", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1} and then \boxed{2", None),  # cut off in the middle of its answer
        (r"\boxed{}", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, found):
    assert boxed(text) == found


SAME = [
    (r"\frac{1}{2}", r"\dfrac12"),
    ("0.5", r"\frac{1}{2}"),
    (r"\frac 59", "5/9"),
    (r"1\frac{1}{2}", "3/2"),
    ("18.90", "18.9"),
    ("-3", "\u22123"),
    ("6-5i", "-5i+6"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"\sqrt[3]{8}", "2"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"90^\circ", "90"),
    (r"10\%", "10"),
    (r"\$36", "36"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"12\text{ cm}^2", "12"),
    (r"\text{(C)}", "C"),
    (r"\text{Evelyn}", "evelyn"),
    ("x=5", "5"),
    ("y = 2x + 3", "y=3+2x"),
    ("1,-2", "-2, 1"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac{1}{3} \\ \frac23 \end{pmatrix}"),
    (r"1 \pm \sqrt{19}", r"1\pm\sqrt{19}"),
    (r"2516_8", "2516_{8}"),
]
DIFFERENT = [
    ("1", "2"),
    ("3.14", r"\pi"),
    ("0.333", r"\frac13"),
    ("3.6055512754639893", r"\sqrt{13}"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1)"),
    ("1,2", "1,2,3"),
    ("12", "1,2"),
    ("2516_8", "2516"),
    ("x", "y"),
    ("a", "A"),
    ("x^2", "2x"),
    ("5", "5x"),
    ("1/0", "2/0"),
    (r"\text{east}", "west"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    ("", ""),
    ("", "1"),
    ("9^{9^{9^{9}}}", "1"),
    ("(" * 200, "1"),
    ("\\frac" * 100, "1"),
    ("9" * 5000, "1"),
    (HOSTILE, "1"),
]


@pytest.mark.parametrize(("one", "two"), SAME)
def test_answers_that_are_the_same(one, two):
    assert same_answer(one, two) and same_answer(two, one)


@pytest.mark.parametrize(("one", "two"), DIFFERENT)
def test_answers_that_differ(one, two):
    assert not same_answer(one, two) and not same_answer(two, one)


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ("1 1", "11", False),
        ("1  1", "11", False),
        ("1 \n 1", "1 1", True),
        ("\\frac 1 2", "\\frac12", True),
        ("x + 1", "x+1", True),
    ],
)
def test_spaces_between_digits_count(one: str, two: str, same: bool) -> None:
    assert same_answer(one, two) == same
