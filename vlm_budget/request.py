"""What ``patch`` was asked for, read and checked before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .budget import Budget
from .defaults import default_for
from .errors import BudgetError, PatchError, PlanError, UnknownNameError
from .families.base import Family
from .methods import MethodLike, configured, resolve_methods
from .plan import Plan
from .planning import Methods
from .pruner import Positions
from .recipe import Recipe, read_plan
from .registry import PRUNERS

MethodArgument = MethodLike | Sequence[MethodLike]


@dataclass(frozen=True)
class Request:
    """A patch to make.

    Attributes:
        methods: What acts where.
        spend: What a prompt may spend, a plan to replay, or None where the method inside is ``fixed``.
        recipe: Where both came from, if from one.
        reason: Why this method, where the user named none.
    """

    methods: Methods
    spend: Budget | Plan | None
    recipe: Recipe | None = None
    reason: str | None = None


def read_request(
    base: nn.Module,
    family: Family,
    method: MethodArgument | None,
    budget: Budget | str | float | None,
    plan: Plan | Recipe | str | Path | None,
    options: Mapping[str, Any],
) -> Request:
    """Read the arguments of ``patch``.

    Raises:
        UnknownNameError: Unknown method or option; the message suggests.
        OptionError: An option's value is not usable.
        BudgetError: Not a budget, none, or one too many.
        PlanError: A plan that cannot be read, is damaged, or was made for another model.
        PatchError: Methods that do not go together.
    """
    _check_place(method)
    if isinstance(plan, str | Path):
        plan = read_plan(plan)
    if isinstance(plan, Recipe):
        return _from_recipe(base, method, budget, plan, options)
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"plan must be a Plan, a Recipe or a path to one, got {type(plan).__name__}")
    if plan is not None and method is None:
        raise PatchError(f"a plan for one batch holds counts only; name the method it was made for ({plan.method})")
    if plan is not None and budget is not None:
        raise BudgetError("pass either a budget, such as budget=0.2, or a plan")
    reason = None
    if method is None:
        if options:
            raise PatchError(f"options {sorted(options)} go with a method's name; name one")
        chosen = default_for(family.has_cls(base), family.mrope)
        method, options, reason = chosen.method, chosen.options, chosen.reason
    methods = resolve_methods(method, options)
    if plan is not None:
        return Request(methods, plan)
    return Request(methods, _spend(methods, budget), reason=reason)


def _check_place(method: Any) -> None:
    """Say where a budget or a plan belongs that was passed as the method.

    Raises:
        UnknownNameError: It was.
    """
    meant = ""
    if isinstance(method, Plan | Recipe | Path) or (isinstance(method, str) and method.endswith(".json")):
        meant = "plan"
    elif not isinstance(method, str | bool) or (isinstance(method, str) and method not in PRUNERS):
        try:
            Budget.parse(method)
            meant = "budget"
        except BudgetError:
            return
    if meant:
        shown = f"plan=<{type(method).__name__}>" if isinstance(method, Plan | Recipe) else f"{meant}={method!r}"
        raise UnknownNameError(
            f"method must be a name or a Pruner, got {type(method).__name__} {method!s:.80}. Did you mean {shown}?"
        )


def _from_recipe(base: nn.Module, method: Any, budget: Any, recipe: Recipe, options: Mapping[str, Any]) -> Request:
    if method is not None or budget is not None or options:
        raise PlanError("the recipe says method, options and budget; pass nothing beside it (positions apart)")
    recipe.check_model(base)
    methods = resolve_methods([configured(name, own) for name, own in recipe.methods()], {})
    return Request(methods, _spend(methods, recipe.budget), recipe)


def _spend(methods: Methods, budget: Budget | str | float | None) -> Budget | None:
    fixed = methods.decoder is not None and methods.decoder.fixed
    if budget is None and not (fixed and methods.vision is None):
        raise BudgetError("pass either a budget, such as budget=0.2, or a plan")
    if budget is not None and fixed and methods.vision is None:
        raise BudgetError(
            f"{methods} says itself how many tokens stay, so there is nothing left for budget={budget!r} to say. Leave "
            "the budget out, or the fields that fix the schedule."
        )
    return None if budget is None else Budget.parse(budget)


@dataclass(frozen=True)
class PositionModes:
    """Position ids of kept tokens, ``"packed"`` or ``"original"``.

    Attributes:
        vision: Behind what is dropped before the language model.
        decoder: Behind what is dropped inside it.
    """

    vision: Positions
    decoder: Positions

    def __str__(self) -> str:
        """One word where both agree."""
        return self.vision if self.vision == self.decoder else f"{self.vision}, inside {self.decoder}"


def position_modes(family: Family, methods: Methods, override: str | None) -> PositionModes:
    """The methods' position policies, or the user's.

    Raises:
        PatchError: No such policy, or one that the model's positions do not allow.
    """
    if override not in (None, "packed", "original"):
        raise PatchError(f"positions must be 'packed' or 'original', got {override!r}")
    if not family.mrope:
        vision, decoder = methods.vision, methods.decoder
        return PositionModes(
            override or (vision or decoder).positions,  # type: ignore[arg-type, union-attr]
            override or (decoder or vision).positions,  # type: ignore[arg-type, union-attr]
        )
    if override == "packed":
        raise PatchError("this model uses M-RoPE, whose positions are two-dimensional: only 'original' makes sense")
    return PositionModes("original", "original")
