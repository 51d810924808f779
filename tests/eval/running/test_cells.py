"""What is compared, as it is written."""

import pytest

from vlm_budget.errors import BudgetError, OptionError, UnknownNameError
from vlm_budget.eval.cells import FIXED, Cell, make_cells, method_text, parse_methods, split_methods


def test_baselines_are_always_there_and_a_budget_of_everything_is_the_unpatched_model() -> None:
    cells = make_cells(["hired", "hired+fastv"], ["1.0", "0.4", "100%", "40% flops"])
    names = ("random", "uniform", "hired", "hired+fastv")
    assert cells == [Cell(), *(Cell(name, budget) for name in names for budget in ("40%", "40% flops"))]
    assert [str(cell) for cell in cells[:2]] == ["unpatched", "random at 40%"]


def test_baselines_are_refused_by_name_only() -> None:
    assert make_cells(["hired"], ["0.4"], ["random", "unpatched", "uniform"]) == [Cell("hired", "40%")]
    with pytest.raises(OptionError, match="hired is no baseline"):
        make_cells(["hired"], ["0.4"], ["hired"])
    with pytest.raises(OptionError, match="nothing is left"):
        make_cells([], ["1.0"], ["unpatched"])


def test_a_method_named_twice_or_named_like_a_baseline_runs_once() -> None:
    assert make_cells(["random", "hired", "hired"], ["0.4"]) == [
        Cell(),
        Cell("random", "40%"),
        Cell("uniform", "40%"),
        Cell("hired", "40%"),
    ]


def test_a_schedule_in_the_options_takes_no_budget() -> None:
    (cell,) = make_cells(["fastv(k=2, r=0.5)"], ["0.4", "0.2"], ["unpatched", "random", "uniform"])
    assert cell == Cell("fastv(k=2, r=0.5)", FIXED)
    assert cell.spend is None
    assert str(cell) == "fastv(k=2, r=0.5)"


def test_options_reach_the_methods() -> None:
    methods = parse_methods("hired(alpha=0.25, newline=keep_all)+pyramiddrop(at=(0.5, 0.75))")
    assert methods.vision.alpha == 0.25
    assert methods.vision.newline == "keep_all"
    assert methods.decoder.at == (0.5, 0.75)


def test_commas_within_brackets_do_not_separate() -> None:
    assert split_methods("hired, fastv(k=2,r=0.5),a(x=(1,2))+b") == ["hired", "fastv(k=2,r=0.5)", "a(x=(1,2))+b"]
    assert split_methods("a(x='1,2+3)'),b(y=\"it's\"),c") == ["a(x='1,2+3)')", 'b(y="it\'s")', "c"]
    assert method_text({"fastv": {"k": 2, "r": 0.5}}) == "fastv(k=2, r=0.5)"
    assert method_text("hired") == "hired"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("hird", UnknownNameError, "Did you mean 'hired'"),
        ("hired(alfa=1)", UnknownNameError, "Did you mean 'alpha'"),
        ("hired(alpha)", OptionError, "name=value"),
        ("hired(", OptionError, "cannot read method"),
        ("<script>", OptionError, "cannot read method"),
        ("", OptionError, "cannot read method"),
    ],
)
def test_bad_methods(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_cells([text], ["0.4"])


def test_bad_budgets() -> None:
    with pytest.raises(BudgetError):
        make_cells(["hired"], ["lots"])
    with pytest.raises(OptionError, match="one name with its options"):
        method_text({"hired": {}, "fastv": {}})
