"""The verb: ``patch`` a model, and undo it exactly."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from .budget import Budget
from .engine.account import Account
from .engine.boundary import Boundary
from .engine.selection import make_plan
from .engine.taps import Tap
from .errors import BudgetError, LayoutError, PatchError, PlanError, UnknownNameError, UnsupportedModelError
from .families.base import Family
from .layout import Modality, VisualItem, VisualLayout, group_rows
from .plan import Plan
from .pruner import Pruner
from .registry import FAMILIES, PRUNERS
from .report import KeptItem, Report

_HANDLE = "_vlm_budget_handle"


class PatchHandle:
    """A patched model: its report, its plans, and the way back.

    Use it as a context manager to undo the patch at the end of a block. Undoing twice is harmless.
    """

    def __init__(self, outer: nn.Module, boundary: Boundary) -> None:
        self._outer = outer
        self._boundary = boundary
        self._undo: list[Callable[[], None]] = []

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        return self._outer

    @property
    def method(self) -> Pruner:
        """The method in force."""
        return self._boundary.pruner

    @property
    def budget(self) -> Budget | Plan:
        """The budget in force, or the plan that is replayed."""
        return self._boundary.budget

    @property
    def active(self) -> bool:
        """The patch is in place."""
        return bool(self._undo)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Take the patch away; the model is exactly what it was: the same hooks, attributes and objects.

        Raises:
            PatchError: Another thread is inside the patched language model; wait for it.
        """
        if self._undo and self._boundary.running.others():
            raise PatchError(
                f"{self._boundary.running.others()} other thread(s) are running the patched model, and would go on "
                "half patched. Wait for them before undoing or patching anew."
            )
        while self._undo:
            self._undo.pop()()

    def report(self) -> Report:
        """What the model did with its last prompt.

        Raises:
            PatchError: No prompt has run since the patch.
        """
        account, boundary = self._account(), self._boundary
        budget = boundary.budget.budget if isinstance(boundary.budget, Plan) else str(boundary.budget)
        return account.report(str(boundary.pruner), budget, boundary.positions)

    def kept(self) -> tuple[KeptItem, ...]:
        """Which visual tokens of its last prompt the model saw, per image and video; empty for a text-only prompt.

        Raises:
            PatchError: No prompt has run since the patch.
        """
        return self._account().kept()

    def _account(self) -> Account:
        account: Account | None = self._boundary.account
        if account is None:
            raise PatchError("nothing to report: no prompt has run through the patched model yet")
        return account

    def plan(self, **inputs: Any) -> Plan:
        """The exact counts the budget means for an input, without running the model.

        Args:
            inputs: What the processor returned: ``input_ids``, ``pixel_values``, …

        Raises:
            BudgetError: The budget cannot be met by this input.
            LayoutError: Prompts and pixels do not fit together.
        """
        boundary = self._boundary
        layout = layout_of(boundary.base, boundary.family, inputs)
        if isinstance(boundary.budget, Plan):
            boundary.budget.row_counts(layout.row_sizes())
            return boundary.budget
        return make_plan(boundary.pruner, boundary.budget, layout)

    def _install(self) -> None:
        """Put everything in place; a failure on the way takes back what was done."""
        boundary, outer, base = self._boundary, self._outer, self._boundary.base
        family = boundary.family
        language_model = family.language_model(base)
        try:
            for probe in boundary.observer.attach():
                self._undo.append(probe.detach)
            watchers = {"image": boundary.watch_image_encoder, "video": boundary.watch_video_encoder}
            taps = [Tap(base, name, watchers[modality]) for modality, name in family.encoders.items()]
            if hasattr(type(outer), "generate"):
                taps.append(Tap(outer, "generate", boundary.watch_generate))
            for tap in taps:
                tap.attach()
                self._undo.append(tap.detach)
            for module, register, hook, options in (
                (base, "register_forward_pre_hook", boundary.before_base, {}),
                (base, "register_forward_hook", boundary.after_base, {"always_call": True}),
                (language_model, "register_forward_pre_hook", boundary.before_language_model, {}),
                (language_model, "register_forward_hook", boundary.after_language_model, {"always_call": True}),
            ):
                self._undo.append(getattr(module, register)(hook, with_kwargs=True, **options).remove)
            base.__dict__[_HANDLE] = self
            self._undo.append(self._forget)
        except BaseException:
            self.undo()
            raise

    def _forget(self) -> None:
        self._boundary.base.__dict__.pop(_HANDLE, None)


def patch(
    model: Any,
    method: str | Pruner,
    budget: Budget | str | float | None = None,
    *,
    plan: Plan | None = None,
    positions: str | None = None,
    **options: Any,
) -> PatchHandle:
    """Make a VLM keep only the visual tokens that matter, within a budget.

    The same ``model(...)``, ``model.generate(...)`` and pipeline calls work as before, on the same attention backend.
    Patching a patched model replaces the patch; undoing then restores the unpatched model.

    Args:
        model: A supported transformers VLM, a PEFT model around one, or a transformers pipeline with one.
        method: Name of a method (see :func:`vlm_budget.list_methods`), or a configured instance.
        budget: ``0.2`` or ``"20%"`` (share of each prompt's visual tokens), ``128`` or ``"128 tokens"`` (per prompt).
            ``1.0`` leaves the model bit-identical.
        plan: Exact counts to replay instead of a budget.
        positions: ``"packed"`` or ``"original"``, to override the method's position ids (1-D RoPE only).
        options: Fields of the method, such as ``alpha=0.3`` for ``"hired"``.

    Returns:
        The handle, with ``report()``, ``plan()`` and ``undo()``; also a context manager.

    Raises:
        UnsupportedModelError: No family knows the model.
        UnknownNameError: Unknown method or option; the message suggests.
        BudgetError: Not a budget.
        PatchError: The combination cannot work.
    """
    pruner = _pruner(method, options)
    if (budget is None) == (plan is None):
        raise BudgetError("pass either a budget, such as budget=0.2, or a plan")
    if not isinstance(plan, Plan | None):
        raise PlanError(f"plan must be a Plan, got {type(plan).__name__}. Read one with Plan.load(path).")
    spend: Budget | Plan = plan if plan is not None else Budget.parse(budget)  # type: ignore[arg-type]
    if isinstance(spend, Budget):
        spend.require_token_unit()
    outer, base, family = find_family(model)
    boundary = Boundary(base, family, pruner, spend, _positions(family, pruner, positions))
    earlier: PatchHandle | None = base.__dict__.get(_HANDLE)
    if earlier is not None:
        earlier.undo()
    if _is_compiled(model) or _is_compiled(outer) or _is_compiled(base):
        torch.compiler.reset()  # its guards overlook hooks that are added to what has run compiled before
    handle = PatchHandle(outer, boundary)
    try:
        handle._install()
    except BaseException:
        if earlier is not None:
            earlier._install()
        raise
    return handle


def unpatch(model: Any) -> None:
    """Undo the patch of a model, also of a copy of a patched one.

    Raises:
        PatchError: The model is not patched.
    """
    _, base, _ = find_family(model)
    handle: PatchHandle | None = base.__dict__.get(_HANDLE)
    if handle is None:
        raise PatchError(f"this {type(base).__name__} is not patched")
    handle.undo()


def find_family(model: Any) -> tuple[nn.Module, nn.Module, Family]:
    """The unwrapped model, its inner model, and what is known about its class.

    Raises:
        UnsupportedModelError: No family matches; the message lists the supported classes.
    """
    outer = _unwrap(model)
    names = {cls.__name__ for cls in type(outer).__mro__}
    supported: list[str] = []
    for name in FAMILIES:
        family: Family = FAMILIES.get(name)()
        if names.intersection(family.models):
            return outer, family.base(outer), family
        supported.append(family.models[0])
    raise UnsupportedModelError(
        f"{type(outer).__name__} is not a supported model. Supported: {', '.join(sorted(supported))}."
    )


def layout_of(base: nn.Module, family: Family, inputs: dict[str, Any]) -> VisualLayout:
    """Where the visual tokens of a processor's output are, without running the model.

    Raises:
        LayoutError: Prompts and pixels do not fit together, or there are no ``input_ids``.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise LayoutError("a layout needs the processor's input_ids tensor")
    rows: list[list[VisualItem]] = [[] for _ in range(len(ids))]
    tokens = family.token_ids(base.config)
    for modality in family.given_modalities(inputs):
        items = encoder_items(base, family, modality, inputs)
        grouped = group_rows(items, (ids == tokens[modality]).sum(1).tolist())
        if grouped is None:
            raise LayoutError(
                f"the prompts hold {(ids == tokens[modality]).sum(1).tolist()} {modality} tokens, the pixels make "
                f"items of {[item.size for item in items]}"
            )
        for row, members in zip(rows, grouped, strict=True):
            row += members
    return VisualLayout(tuple(tuple(row) for row in rows))


def encoder_items(base: nn.Module, family: Family, modality: Modality, inputs: dict[str, Any]) -> list[VisualItem]:
    """Layout of one modality from the processor's inputs, read under the names the encoder gives them."""
    names = list(inspect.signature(getattr(base, family.encoders[modality])).parameters)
    try:
        return family.items(base, modality, family.encoder_inputs(modality, inputs, names))
    except KeyError as missing:
        raise LayoutError(f"a layout needs {missing} from the processor; got {sorted(inputs)}") from missing


def _is_compiled(model: Any) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _unwrap(model: Any) -> nn.Module:
    # Pipelines and DDP hold the model in an attribute, PEFT behind a method, torch.compile in _orig_mod.
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
            model = model.model
        else:
            break
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a model or a pipeline, got {type(model).__name__}")
    return model


def _pruner(method: str | Pruner, options: dict[str, Any]) -> Pruner:
    if isinstance(method, Pruner):
        if options:
            raise PatchError(f"options {sorted(options)} go with a method's name; configure the instance instead")
        return method
    if not isinstance(method, str):
        raise UnknownNameError(f"method must be a name or a Pruner, got {type(method).__name__}")
    cls = PRUNERS.get(method)
    known = [field.name for field in fields(cls)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(f"{method!r} has no option {name!r}.{hint} Options: {', '.join(known)}.")
    pruner: Pruner = cls(**options)
    return pruner


def _positions(family: Family, pruner: Pruner, override: str | None) -> str:
    if override not in (None, "packed", "original"):
        raise PatchError(f"positions must be 'packed' or 'original', got {override!r}")
    if not family.mrope:
        return override or pruner.positions
    if override == "packed":
        raise PatchError("this model uses M-RoPE, whose positions are two-dimensional: only 'original' makes sense")
    return "original"
