import math

import pytest

from vlm_budget.eval.report import words
from vlm_budget.eval.statistics import Comparison, Estimate


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00b", "a[U+0000]b"),
        ("\x1b[31m", "[U+001B][31m"),
        ("\u202egnp", "[U+202E]gnp"),
        ("\ud800", "[U+D800]"),
        ("\ufffe\ufdd0\U0001ffff", "[U+FFFE][U+FDD0][U+1FFFF]"),
        ("a\r\nb\tc", "a b c"),
        ("a\u2028b", "a[U+2028]b"),
        ("naïve 漢字 👩\u200d👧 می\u200cخواهم", "naïve 漢字 👩\u200d👧 می\u200cخواهم"),
    ],
)
def test_characters_that_hide_or_reorder_are_shown_and_words_of_all_scripts_are_kept(text: str, shown: str) -> None:
    assert words.clean(text) == shown


def test_a_long_text_is_cut_and_the_rest_counted() -> None:
    assert words.clean("x" * 3100, 100) == "x" * 100 + "… (3,000 more characters)"
    assert words.clean("x" * 100, 100) == "x" * 100


def test_whatever_is_no_markup_is_escaped_in_content_and_attributes() -> None:
    found = words.element("p", "<b>", words.element("i", '"&'), title="\"'<>", hidden=None)
    assert found == '<p title="&quot;&#x27;&lt;&gt;">&lt;b&gt;<i>&quot;&amp;</i></p>'


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@A1", "\t=1", " =1", "\n=1", "\uff1d1", "\r=1"])
def test_a_spreadsheet_gets_no_formula(text: str) -> None:
    assert words.escape_csv(text)[0] in "'["


def test_text_that_is_no_formula_stays_as_it_is_in_csv() -> None:
    assert words.escape_csv("hired(alpha=0.3)") == "hired(alpha=0.3)"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.8124, "0.812"), (-0.5, "−0.500"), (1503.25, "1,503.2"), (math.nan, "–"), (math.inf, "–"), (None, "–")],
)
def test_numbers_for_people(value: float | None, shown: str) -> None:
    assert words.number(value) == shown


def test_differences_and_means_for_people() -> None:
    assert words.interval(Comparison(0.1, -0.02, 0.2, 0.1, 9)) == "+0.100 [−0.020, +0.200]"
    assert words.mean(Estimate(0.5, 0.05, 9)) == "0.500 ± 0.050"
    assert words.mean(Estimate(0.5, math.nan, 1)) == "0.500"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("flops", 410e6, "410 MFLOP"),
        ("flops", 2.5e18, "2,500 PFLOP"),
        ("kv_bytes", 1536, "1.50 KiB"),
        ("prefill_ms", 12.34, "12.3 ms"),
        ("kept", 77, "77"),
        ("mean_kept", 76.84, "76.8"),
    ],
)
def test_costs_have_units(name: str, value: float, shown: str) -> None:
    assert words.cost(name, value) == shown
