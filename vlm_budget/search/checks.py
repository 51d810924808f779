"""Arguments of the searches that mean nothing, refused before a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from ..errors import OptionError

_SEEDS = 2**32  # what numpy's generators, and so optuna's samplers, can be seeded with


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number from ``least`` on.

    Args:
        name: The argument, for the message.
        value: What was passed for it.
        least: The smallest that makes sense.

    Raises:
        OptionError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise OptionError(f"{name} must be a number from {least} on, got {value!r}")
    return int(value)


def check_seed(seed: Any) -> int:
    """A seed of optuna's samplers.

    Raises:
        OptionError: No whole number from 0 on, or one that is too large.
    """
    if whole("seed", seed, least=0) >= _SEEDS:
        raise OptionError(f"seed must be below {_SEEDS}, got {seed!r}")
    return int(seed)


def check_running(batch: Any, max_spread: Any) -> None:
    """How many prompts run at once, and how far apart their sizes may be.

    Raises:
        OptionError: ``batch`` is no whole number from 1 on, or ``max_spread`` no number from 1 on.
    """
    whole("batch", batch)
    if isinstance(max_spread, bool) or not isinstance(max_spread, Real) or not float(max_spread) >= 1:
        raise OptionError(f"max_spread must be a number from 1 on, got {max_spread!r}")


def listed(name: str, value: Any, single: tuple[type, ...]) -> list[Any]:
    """Several things, or a single one as a list of one.

    Args:
        name: The argument, for the message.
        value: What was passed for it.
        single: Types of one of them.

    Raises:
        OptionError: Neither one nor several.
    """
    if isinstance(value, single):
        return [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise OptionError(f"{name} must be a list, got {value!r}")
    return list(value)
