"""What is compared: methods, each at its budgets, and the unpatched model.

A method is written as on the command line: ``hired``, ``hired+fastv``, and with options ``hired(alpha=0.3)``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_budget.budget import Budget
from vlm_budget.errors import OptionError
from vlm_budget.methods import resolve_methods
from vlm_budget.planning import Methods
from vlm_budget.pruner import Pruner

UNPATCHED = "unpatched"
FIXED = "fixed"
BASELINES = (UNPATCHED, "random", "uniform")
_CALL = re.compile(r"^\s*(?P<name>\w+)\s*(?:\((?P<options>.*)\))?\s*$", re.DOTALL)


@dataclass(frozen=True, order=True)
class Cell:
    """One column of a comparison.

    Attributes:
        methods: As written; :data:`UNPATCHED` for the model as it is.
        budget: As text; :data:`FIXED` where the options say the schedule; empty for the unpatched model.
    """

    methods: str = UNPATCHED
    budget: str = ""

    @property
    def unpatched(self) -> bool:
        """The model as it is."""
        return self.methods == UNPATCHED

    def __str__(self) -> str:
        """For people."""
        return self.methods if self.unpatched or self.budget == FIXED else f"{self.methods} at {self.budget}"

    @property
    def acting(self) -> Methods:
        """The configured methods.

        Raises:
            UnknownNameError: There is no such method or option; the message suggests.
            OptionError: The text cannot be read.
        """
        return parse_methods(self.methods)

    @property
    def spend(self) -> Budget | None:
        """The budget; None for the unpatched model, and where the options say the schedule."""
        return None if self.budget in ("", FIXED) else Budget.parse(self.budget)


def parse_methods(text: str) -> Methods:
    """Methods as written in a cell.

    Raises:
        UnknownNameError: There is no such method or option; the message suggests.
        OptionError: The text cannot be read.
    """
    named: list[Pruner] = []
    for part in _split(text, "+"):
        match = _CALL.match(part)
        if match is None:
            raise OptionError(f"cannot read method {part!r}; write hired, hired+fastv or hired(alpha=0.3)")
        found = resolve_methods(match["name"], _options(match["options"] or "", part))
        named += found.named
    return resolve_methods(named, {})


def split_methods(text: str) -> list[str]:
    """Methods separated by commas, commas within brackets apart."""
    return [part.strip() for part in _split(text, ",") if part.strip()]


def make_cells(methods: Sequence[str], budgets: Sequence[str], without: Sequence[str] = ()) -> list[Cell]:
    """The columns of a comparison: the baselines unless refused, then every method at every budget.

    A budget of everything is the unpatched model, to the bit, so it runs once and under that name.

    Args:
        methods: As written.
        budgets: As text.
        without: Baselines that are refused, of :data:`BASELINES`.

    Raises:
        UnknownNameError: There is no such method or option.
        OptionError: Something cannot be read, or nothing is left to run.
        BudgetError: A budget cannot be read.
    """
    if strange := sorted(set(without) - set(BASELINES)):
        raise OptionError(f"{', '.join(strange)} is no baseline; there are {', '.join(BASELINES)}")
    spends = [Budget.parse(text) for text in budgets]
    part = [str(spend) for spend in spends if not (spend.relative and spend.amount >= 1)]
    names = [name for name in BASELINES[1:] if name not in without and part]
    cells = [] if UNPATCHED in without else [Cell()]
    seen: list[Methods] = []
    for method in (one.strip() for one in (*names, *methods)):
        if method == UNPATCHED:
            continue
        acting = parse_methods(method)
        if acting in seen:  # spelled in another way
            continue
        seen.append(acting)
        fixed = acting.vision is None and acting.decoder is not None and acting.decoder.fixed
        cells += [Cell(method, FIXED)] if fixed else [Cell(method, budget) for budget in part]
    if not cells:
        raise OptionError("nothing is left to run: name methods and budgets, or keep a baseline")
    return list(dict.fromkeys(cells))


def method_text(entry: str | Mapping[str, Any]) -> str:
    """A method of a YAML file as text: a name, or a mapping of one name to its options."""
    if isinstance(entry, str):
        return entry
    if len(entry) != 1:
        raise OptionError(f"a method is a name, or one name with its options, got {dict(entry)!r}")
    ((name, options),) = entry.items()
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in dict(options or {}).items())})"


def _options(text: str, whole: str) -> dict[str, Any]:
    found = {}
    for part in filter(str.strip, _split(text, ",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"cannot read {whole!r}: options are written name=value")
        try:
            found[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            found[name.strip()] = value.strip()
    return found


def _split(text: str, mark: str) -> list[str]:
    """Split at a mark outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        if not quote:
            depth += (letter in "([") - (letter in ")]")
        if letter == mark and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
