"""From what a user names to the methods that act: one before the language model, one inside, or both."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .decoder import DecoderPruner
from .errors import OptionError, PatchError, UnknownNameError
from .planning import Methods
from .pruner import Merge, Pruner
from .registry import MERGES, PRUNERS, VIDEO_METHODS, VIT_METHODS

MethodLike = str | Pruner


def resolve_methods(method: MethodLike | Sequence[MethodLike], options: Mapping[str, Any]) -> Methods:
    """The methods that a user named.

    Args:
        method: A name, a configured instance, or two of them: one that acts before the language model and one inside.
        options: Fields of the named methods; each goes to the one method that has it.

    Raises:
        UnknownNameError: Unknown method or option; the message suggests.
        OptionError: An option's value is not usable, or two methods have the option.
        PatchError: Two methods for the same stage, or options beside instances only.
    """
    named = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
    if not named:
        raise UnknownNameError("no method is named; pass one, or a list of one or two")
    given = _options_of_each(named, options)
    found = [one if isinstance(one, Pruner) else configured(one, mine) for one, mine in zip(named, given, strict=True)]
    decoders = [one for one in found if isinstance(one, DecoderPruner)]
    visions = [one for one in found if not isinstance(one, DecoderPruner)]
    for stage, members in (("before the language model", visions), ("inside the language model", decoders)):
        if len(members) > 1:
            raise PatchError(
                f"{' and '.join(str(one) for one in members)} both act {stage}. Name at most one method for each "
                "place, such as ['hired', 'fastv']."
            )
    return Methods(next(iter(visions), None), next(iter(decoders), None))


def _options_of_each(named: Sequence[MethodLike], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hand every option to the named method that has a field of that name."""
    known = [_fields(one) if isinstance(one, str) else [] for one in named]
    if options and not any(isinstance(one, str) for one in named):
        for one in named:
            _check_kind(one)
        raise PatchError(f"options {sorted(options)} go with a method's name; configure the instance instead")
    given: list[dict[str, Any]] = [{} for _ in named]
    for name, value in options.items():
        owners = [index for index, mine in enumerate(known) if name in mine]
        if len(owners) > 1:
            both = " and ".join(repr(named[index]) for index in owners)
            raise OptionError(f"{both} both have an option {name!r}; configure instances to say whose is meant")
        if not owners:
            every = sorted({each for mine in known for each in mine})
            who = " and ".join(repr(one) for one in named if isinstance(one, str))
            raise _no_option(who, name, value, every)
        given[owners[0]][name] = value
    return given


def _no_option(who: str, name: str, value: Any, known: Sequence[str]) -> UnknownNameError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if name == "ratio":
        hint = f" The share that stays is the budget: budget={value!r}."
    return UnknownNameError(f"{who} has no option {name!r}.{hint} Options: {', '.join(known)}.")


def _fields(name: str) -> list[str]:
    if name in VIT_METHODS and name not in PRUNERS:
        advice = f" Name a selector and pass merge={name!r} to merge what it drops." if name in MERGES else ""
        raise PatchError(f"{name!r} acts inside plain vision transformers such as timm's, not on a VLM.{advice}")
    if name in VIDEO_METHODS and name not in PRUNERS:
        raise PatchError(f"{name!r} acts inside video diffusion transformers of diffusers, not on a VLM.")
    cls = PRUNERS.get(name)
    foreign = {"newline", "merge"} if issubclass(cls, DecoderPruner) else set()
    return [field.name for field in fields(cls) if field.name not in foreign]


def _check_kind(one: Any) -> None:
    if not isinstance(one, str | Pruner):
        raise UnknownNameError(f"method must be a name or a Pruner, got {type(one).__name__}")


def configured(name: Any, options: Mapping[str, Any]) -> Pruner:
    """A method by name, with its options; ``merge`` may be a name too.

    Raises:
        UnknownNameError: No such method, option or merging stage.
        OptionError: An option's value is not usable.
    """
    _check_kind(name)
    known = sorted(field.name for field in fields(PRUNERS.get(name)))
    for option, value in options.items():
        if option not in known:
            raise _no_option(repr(name), option, value, known)
    merge = options.get("merge")
    if isinstance(merge, str):
        stage: Merge = MERGES.get(merge)()
        options = {**options, "merge": stage}
    pruner: Pruner = PRUNERS.get(name)(**options)
    return pruner
