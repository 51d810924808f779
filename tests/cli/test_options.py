"""``--option key=value``: values by the field's type, or an error that names the field."""

from pathlib import Path
from typing import Any, Literal

import pytest

from vlm_budget.budget import Budget
from vlm_budget.cli.options import Wanted, build_methods, convert
from vlm_budget.errors import BudgetError, OptionError, PatchError, UnknownNameError
from vlm_budget.pruners.token_transforming import TokenTransforming
from vlm_budget.registry import PRUNERS


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("0.3", float, 0.3),
        ("3", float, 3.0),
        ("yes", bool, True),
        ("False", bool, False),
        ("a=b", str, "a=b"),
        ("count", Literal["mass", "count"], "count"),
        ("2", Literal[1, 2], 2),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("x", int | str, "x"),
        ("1, 2,3", tuple[int, ...], (1, 2, 3)),
        ("1,b", tuple[int, str], (1, "b")),
        ("(1,1,0.5, 0.5)", tuple[float, ...], (1.0, 1.0, 0.5, 0.5)),
        ("[1, 0.5,]", tuple[float, ...], (1.0, 0.5)),
        ("()", tuple[float, ...], ()),
    ],
)
def test_text_becomes_a_value_of_the_type(text: str, hint: Any, value: Any) -> None:
    found = convert(text, hint, "field")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "hint", "message"),
    [
        ("x", int, "field is an int, got 'x'"),
        ("0.5", int, "field is an int, got '0.5'"),
        ("x", float, "field is a float"),
        ("maybe", bool, "bool"),
        ("c", Literal["a", "b"], "field must be one of a, b, got 'c'"),
        ("1,2", tuple[int, int, int], "takes 3 values"),
        ("(1,2", tuple[int, ...], r"field takes values separated by commas, got '\(1,2'"),
        ("x", dict, "field is a dict"),
    ],
)
def test_other_text_is_refused(text: str, hint: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        convert(text, hint, "field")


@pytest.mark.parametrize("method", PRUNERS.names())
def test_every_method_is_built_from_text(method: str) -> None:
    vision = PRUNERS.get(method).stage == "vision"
    methods = build_methods(method, ["positions=original", *["newline=keep_all"] * vision])
    pruner = methods.vision or methods.decoder
    assert pruner is not None and type(pruner) is PRUNERS.get(method)
    assert pruner.positions == "original"
    assert pruner.newline == ("keep_all" if vision else "drop")


def test_fields_may_be_written_with_dashes_and_the_last_wins() -> None:
    found = build_methods("hired", ["init-layer=1", "alpha=0.1", "alpha=0.2"])
    assert found.vision == PRUNERS.get("hired")(init_layer=1, alpha=0.2)


def test_two_methods_are_joined_and_an_option_goes_to_the_one_that_has_it() -> None:
    found = build_methods("hired + fastv", ["alpha=0.2", "k=1", "fastv.positions=packed", "hired.positions=original"])
    assert found.vision == PRUNERS.get("hired")(alpha=0.2, positions="original")
    assert found.decoder == PRUNERS.get("fastv")(k=1, positions="packed")
    assert build_methods("vtw+random", []).vision == PRUNERS.get("random")()


def test_a_merging_stage_is_named() -> None:
    found = build_methods("hired", ["merge=token_transforming"]).vision
    assert found == PRUNERS.get("hired")(merge=TokenTransforming())
    assert build_methods("hired", ["merge=none"]).vision == PRUNERS.get("hired")()


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("hired", ["alpa=1"], UnknownNameError, "Did you mean 'alpha'"),
        ("hired", ["alpha"], OptionError, "KEY=VALUE"),
        ("hired", ["=1"], OptionError, "KEY=VALUE"),
        ("hired", ["alpha=2"], OptionError, r"alpha must lie in \[0, 1\]"),
        ("hired", ["count_top=0"], OptionError, "count_top must be at least 1"),
        ("hired", ["merge=token_transform"], UnknownNameError, "Did you mean 'token_transforming'"),
        ("fastv", ["newline=drop"], UnknownNameError, "'fastv' has no option 'newline'"),
        ("hired+fastv", ["positions=packed"], OptionError, r"hired\.positions=\.\.\. or fastv\.positions=\.\.\."),
        ("hired+fastv", ["random.seed=1"], UnknownNameError, "has no option 'random.seed'"),
        ("hired,fastv", [], UnknownNameError, r"joined by '\+': hired\+fastv"),
        ("hired+divprune", [], PatchError, "both act before the language model"),
        ("hired+hird", [], UnknownNameError, "Did you mean 'hired'"),
        ("tome", [], PatchError, "acts inside plain vision transformers"),
        ("svg2", [], PatchError, "acts inside video diffusion transformers"),
    ],
)
def test_a_wrong_option_says_what_is_right(
    method: str, options: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_methods(method, options)


# --- budgets ---------------------------------------------------------------------------------------------------------


def spent(method: str | None, options: list[str], budget: str | None) -> Budget | None:
    wanted = Wanted.read(method, options, budget, None)
    return wanted.spend(wanted.methods())


def test_a_budget_is_assumed_only_where_the_methods_do_not_say_it_all() -> None:
    assert spent(None, [], None) == Budget(0.2)
    assert spent("fastv", [], None) == Budget(0.2)
    assert spent("hired+fastv", ["r=0.5"], None) == Budget(0.2)
    assert spent("hired", [], "128 tokens") == Budget.parse(128)
    for method, option in (
        ("fastv", "r=0.5"),
        ("vtw", "layer=2"),
        ("gsearch", "rates=(1,1,0.5)"),
        ("psigmoid", "t0=0.5"),
    ):
        assert spent(method, [option], None) is None
        with pytest.raises(OptionError, match="Leave --budget out") as caught:
            spent(method, [option], "20%")
        assert "Budget(" not in str(caught.value)
    with pytest.raises(BudgetError):
        spent("fastv", ["r=0.5"], "a fifth")


def test_nothing_is_named_beside_a_plan(tmp_path: Path) -> None:
    for beside in ({"method": "hired"}, {"options": ["alpha=0.2"]}, {"budget": "20%"}):
        given: dict[str, Any] = {"method": None, "options": None, "budget": None, **beside}
        with pytest.raises(OptionError, match="--plan says method, options and budget"):
            Wanted.read(**given, plan=tmp_path / "plan.json")
