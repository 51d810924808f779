"""``--option key=value``: text to the fields of a method, by their types."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import OptionError, UnknownNameError
from ..registry import PRUNERS

if TYPE_CHECKING:
    from ..pruner import Pruner

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def build_pruner(method: str, options: Sequence[str]) -> Pruner:
    """A method from its name and ``key=value`` texts.

    Raises:
        UnknownNameError: No such method or field; the message suggests.
        OptionError: Not ``key=value``, or not a value of the field.
    """
    cls = PRUNERS.get(method)
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise OptionError(f"--option takes KEY=VALUE, got {option!r}. {method} has: {', '.join(known)}.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(f"{method!r} has no option {key!r}.{hint} Options: {', '.join(known)}.")
        values[key] = convert(text.strip(), hints[key], key)
    try:
        pruner: Pruner = cls(**values)
    except (ValueError, TypeError) as error:
        raise OptionError(f"{method}: {error}") from error
    return pruner


def convert(text: str, hint: Any, name: str) -> Any:
    """Text to a value of a type.

    Args:
        text: What the user wrote.
        hint: ``int``, ``float``, ``bool``, ``str``, a ``Literal``, a tuple of these, or a union of these with None.
        name: The field, for messages.

    Raises:
        OptionError: The text is no value of the type.
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
        parts = [part.strip() for part in text.split(",")]
        each = [arguments[0]] * len(parts) if arguments[1:] == (...,) else list(arguments)
        if len(each) != len(parts):
            raise OptionError(f"{name} takes {len(each)} values separated by commas, got {text!r}")
        return tuple(convert(part, kind, name) for part, kind in zip(parts, each, strict=True))
    if hint is bool and text.lower() in (*_YES, *_NO):
        return text.lower() in _YES
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError as error:
            raise OptionError(f"{name} is {_article(hint)} {hint.__name__}, got {text!r}") from error
    if hint is str:
        return text
    raise OptionError(f"{name} is a {getattr(hint, '__name__', hint)}, cannot read {text!r} as one")


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
