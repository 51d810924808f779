"""What to prune with: ``--method``, ``--budget``, ``--option key=value`` and ``--plan``, from text to methods."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..budget import Budget
from ..errors import OptionError, UnknownNameError
from ..registry import MERGES, PRUNERS

if TYPE_CHECKING:
    from ..planning import Methods
    from ..recipe import Recipe

METHOD, BUDGET = "hired", "20%"
"""What is taken where nothing is named."""

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_BRACKETS = ("()", "[]")


@dataclass(frozen=True)
class Wanted:
    """What the options of a verb ask for, read and checked before torch is loaded.

    Attributes:
        method: Names joined by ``+``; None with a recipe.
        options: ``key=value`` texts.
        budget: None where none was named.
        recipe: Instead of all of these.
    """

    method: str | None
    options: tuple[str, ...]
    budget: Budget | None
    recipe: Recipe | None

    @classmethod
    def read(cls, method: str | None, options: Sequence[str] | None, budget: str | None, plan: Path | None) -> Wanted:
        """Read the texts that need no method.

        Raises:
            BudgetError: Not a budget.
            PlanError: The plan cannot be read or is damaged.
            OptionError: Something stands beside a plan that says it already, or the plan is for one batch only.
        """
        if plan is None:
            spend = None if budget is None else Budget.parse(budget)
            return cls(method or METHOD, tuple(options or ()), spend, None)
        beside = {"--method": method, "--budget": budget, "--option": options}
        named = [name for name, value in beside.items() if value]
        if named:
            raise OptionError(f"--plan says method, options and budget; leave out {' and '.join(named)}")
        return cls(None, (), None, _read_recipe(plan))

    def methods(self) -> Methods:
        """The methods; loads torch.

        Raises:
            UnknownNameError: Unknown method or field; the message suggests.
            OptionError: A value is not usable.
            PatchError: Two methods for the same place.
        """
        if self.method is not None:
            return build_methods(self.method, self.options)
        from ..methods import configured, resolve_methods

        assert self.recipe is not None
        return resolve_methods([configured(name, own) for name, own in self.recipe.methods()], {})

    def spend(self, methods: Methods) -> Budget | None:
        """The budget; None where the methods' own fields say what stays.

        Raises:
            OptionError: A budget is named beside such fields.
        """
        if self.recipe is not None:
            return None if self.recipe.budget is None else Budget.parse(self.recipe.budget)
        fixed = methods.vision is None and methods.decoder is not None and methods.decoder.fixed
        if not fixed:
            return self.budget or Budget.parse(BUDGET)
        if self.budget is not None:
            raise OptionError(
                f"{methods} says itself how many tokens stay, so there is nothing left for --budget to say. Leave "
                "--budget out, or the options that fix the schedule."
            )
        return None


def _read_recipe(path: Path) -> Recipe:
    from ..recipe import Recipe, read_plan

    found = read_plan(path)
    if not isinstance(found, Recipe):
        raise OptionError(
            f"--plan {str(path)!r} holds the counts of one batch ({found.method}), which fit no other prompt. Name a "
            "recipe, as vlm-budget search writes it; or replay the counts in Python: patch(model, method, plan=...)."
        )
    return found


def build_methods(text: str, options: Sequence[str]) -> Methods:
    """Methods from their names, joined by ``+``, and ``key=value`` texts.

    An option goes to the method that has it. ``fastv.positions=packed`` says whose it is where both have it.

    Raises:
        UnknownNameError: No such method or field; the message suggests.
        OptionError: Not ``key=value``, not a value of the field, or a field that both have.
        PatchError: Two methods for the same place, or one for vision transformers.
    """
    if "," in text:
        raise UnknownNameError(f"--method takes one method, or two joined by '+': {'+'.join(_split(text, ','))}")
    names = _split(text, "+")
    known = {name: _fields_of(name) for name in names}
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            every = ", ".join(dict.fromkeys(field for hints in known.values() for field in hints))
            raise OptionError(f"--option takes KEY=VALUE, got {option!r}. {' and '.join(names)} has: {every}.")
        owner, field = _owner(key.strip().replace("-", "_"), known)
        given[owner][field] = convert(value.strip(), known[owner][field], field)
    built = []
    for name in names:
        try:
            built.append(PRUNERS.get(name)(**given[name]))
        except (ValueError, TypeError) as error:
            raise OptionError(f"{name}: {error}") from error
    from ..methods import resolve_methods

    return resolve_methods(built, {})


def _split(text: str, by: str) -> list[str]:
    return [part.strip() for part in text.split(by)]


def _fields_of(name: str) -> dict[str, Any]:
    """Types of the fields that a method takes."""
    if name not in PRUNERS:
        from ..methods import resolve_methods

        resolve_methods(name, {})  # raises, and says where the name belongs if it is one of another kind
    cls = PRUNERS.get(name)
    hints = get_type_hints(cls)
    refused = {"newline", "merge"} if cls.stage == "decoder" else set()
    return {field.name: hints[field.name] for field in fields(cls) if field.name not in refused}


def _owner(key: str, known: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Whose field an option is.

    Raises:
        UnknownNameError: Nobody's.
        OptionError: That of both methods.
    """
    named, dot, field = key.rpartition(".")
    owners = [name for name, hints in known.items() if field in hints and named in ("", name)]
    if not owners:
        every = list(dict.fromkeys(field for hints in known.values() for field in hints))
        near = difflib.get_close_matches(field, every, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        who = " and ".join(map(repr, known))
        raise UnknownNameError(f"{who} has no option {key!r}.{hint} Options: {', '.join(every)}.")
    if len(owners) > 1:
        ways = " or ".join(f"{name}.{field}=..." for name in owners)
        raise OptionError(f"{' and '.join(owners)} both have an option {field!r}: write {ways}")
    return owners[0], field


def convert(text: str, hint: Any, name: str) -> Any:
    """Text to a value of a type.

    Args:
        text: What the user wrote.
        hint: ``int``, ``float``, ``bool``, ``str``, a ``Literal``, a tuple of these, a merging stage (by its name), or
            a union of these with None.
        name: The field, for messages.

    Raises:
        OptionError: The text is no value of the type.
        UnknownNameError: There is no such merging stage.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(text, arguments, name)
    if origin is Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise OptionError(f"{name} must be one of {', '.join(map(str, arguments))}, got {text!r}")
    if origin is tuple:
        return _convert_tuple(text, arguments, name)
    if hint is bool and text.lower() in (*_YES, *_NO):
        return text.lower() in _YES
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError as error:
            raise OptionError(f"{name} is {_article(hint)} {hint.__name__}, got {text!r}") from error
    if hint is str:
        return text
    if _is_merge(hint):
        return MERGES.get(text)()
    raise OptionError(f"{name} is a {getattr(hint, '__name__', hint)}, cannot read {text!r} as one")


def _convert_tuple(text: str, arguments: Sequence[Any], name: str) -> tuple[Any, ...]:
    """Values separated by commas, with or without the brackets that Python writes around them."""
    inner = text[1:-1].strip() if text[:1] + text[-1:] in _BRACKETS else text
    parts = _split(inner.removesuffix(","), ",") if inner else []
    endless = arguments[1:] == (...,)
    each = [arguments[0]] * len(parts) if endless else list(arguments)
    if len(each) != len(parts):
        raise OptionError(f"{name} takes {len(each)} values separated by commas, got {text!r}")
    try:
        return tuple(convert(part, kind, name) for part, kind in zip(parts, each, strict=True))
    except OptionError as error:
        raise OptionError(f"{name} takes values separated by commas, got {text!r}: {error}") from error


def _is_merge(hint: Any) -> bool:
    from ..pruner import Merge

    return isinstance(hint, type) and issubclass(hint, Merge)


def _convert_union(text: str, members: Sequence[Any], name: str) -> Any:
    if type(None) in members and text.lower() in ("none", "null"):
        return None
    kinds = [member for member in members if member is not type(None)]
    for kind in kinds[:-1]:
        try:
            return convert(text, kind, name)
        except OptionError:
            continue
    return convert(text, kinds[-1], name)


def _article(kind: type) -> str:
    return "an" if kind.__name__[0] in "aeiou" else "a"
