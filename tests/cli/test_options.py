"""``--option key=value``: values by the field's type, or an error that names the field."""

from typing import Any, Literal

import pytest

from vlm_budget.cli.options import build_pruner, convert
from vlm_budget.errors import OptionError, UnknownNameError
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
        ("x", dict, "field is a dict"),
    ],
)
def test_other_text_is_refused(text: str, hint: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        convert(text, hint, "field")


@pytest.mark.parametrize("method", PRUNERS.names())
def test_every_method_is_built_from_text(method: str) -> None:
    separators = ["newline=keep_all"] if PRUNERS.get(method).stage == "vision" else []
    pruner = build_pruner(method, ["positions=original", *separators])
    assert pruner.positions == "original"
    assert pruner.newline == ("keep_all" if separators else "drop")


def test_fields_may_be_written_with_dashes_and_the_last_wins() -> None:
    assert build_pruner("hired", ["init-layer=1", "alpha=0.1", "alpha=0.2"]) == PRUNERS.get("hired")(
        init_layer=1, alpha=0.2
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["alpa=1"], UnknownNameError, "Did you mean 'alpha'"),
        (["alpha"], OptionError, "KEY=VALUE"),
        (["=1"], OptionError, "KEY=VALUE"),
        (["alpha=2"], OptionError, r"alpha must lie in \[0, 1\]"),
        (["count_top=0"], OptionError, "count_top must be at least 1"),
    ],
)
def test_a_wrong_option_says_what_is_right(options: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_pruner("hired", options)
