from __future__ import annotations

import math

import pytest

from vlm_budget.eval.captions import Cider, bleu, bleu_counts, rouge_l, words


def test_bleu_by_hand():
    # Papineni et al. 2002, example 2: "the" counts twice, as often as in the reference that has it most.
    counts = bleu_counts("the the the the the the the", ["The cat is on the mat.", "There is a cat on the mat."])
    assert (counts["match1"], counts["runs1"], counts["match2"], counts["runs2"]) == (2, 7, 0, 6)
    assert counts["reference"] == 7  # seven words, the second reference's length
    same = [bleu_counts("a b c d e", ["a b c d e"])]
    assert bleu(same) == pytest.approx(1.0)
    # Half of the words, all in order: precisions 1, brevity exp(1 - 8/4).
    short = [bleu_counts("a b c d", ["a b c d e f g h"])]
    assert bleu(short) == pytest.approx(math.exp(-1))
    # Orders 1 to 4 of "a b c d x": 4/5, 3/4, 2/3, 1/2, whose product is 1/5.
    assert bleu([bleu_counts("a b c d x", ["a b c d e"])]) == pytest.approx(0.2**0.25)
    # Sums over the corpus, not means: (4 + 0) / (5 + 5).
    assert bleu([bleu_counts("a b c d x", ["a b c d e"]), bleu_counts("v w x y z", ["a b c d e"])], 1) == 0.4
    assert bleu([]) == 0.0


def test_rouge_by_hand():
    # Lin 2004, section 3.1: "police kill the gunman" to "police killed the gunman": three of four words.
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    # "the gunman kill police": two of four.
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    # Precision 1, recall 1/2, beta 1.2: 2.44 * 0.5 / (0.5 + 1.44).
    assert rouge_l("a b", ["a b c d"]) == pytest.approx(2.44 * 0.5 / 1.94)
    # The best precision and the best recall may come from two references: 1 from each here.
    assert rouge_l("a b", ["a b c d", "b"]) == pytest.approx(1.0)
    assert rouge_l("", ["a"]) == rouge_l("a", [""]) == 0.0


def test_cider_by_hand():
    # Three questions. "x" is in one of them: weight ln 3; "a" is in all: weight 0.
    cider = Cider.of([["a x"], ["a y"], ["a z"]])
    assert cider.questions == 3 and cider.seen[("a",)] == 3 and cider.seen[("x",)] == 1
    # Orders 1 and 2 agree wholly, 3 and 4 have no runs: 10 * 2 / 4.
    assert cider.score("a x", ["a x"]) == pytest.approx(5.0)
    assert cider.score("a", ["a x"]) == 0.0  # a word that every reference has says nothing
    # "x": order 1 is the same vector, one word too few costs exp(-1 / 72), order 2 has none: 10 / 4 of it.
    assert cider.score("x", ["a x"]) == pytest.approx(10 / 4 * math.exp(-1 / 72))
    # Twice "x" in the answer: min(2, 1) * 1 / (2 * 1), one word too many against "x".
    twice = Cider.of([["x"], ["y"]])
    assert twice.score("x x", ["x"]) == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / 72))
    assert cider.score("", ["a x"]) == 0.0
    assert words("Isn't it a T-shirt? Yes!") == ["isn't", "it", "a", "t-shirt", "yes"]
