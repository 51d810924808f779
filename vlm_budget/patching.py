"""The verb: ``patch`` a model, and undo it exactly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .budget import Budget
from .diffusion import is_diffusion, patch_diffusion, unpatch_diffusion
from .engine.account import Account
from .engine.beside import FrameScores, Views
from .engine.boundary import Boundary
from .engine.taps import Tap
from .engine.vit import is_vit, patch_vit, unpatch_vit
from .errors import PatchError, SelectionError
from .families.base import Family
from .geometry import FitKind
from .layout import Modality
from .methods import MethodLike
from .models import find_family, layout_of, text_tokens
from .plan import FIXED, Plan
from .planning import Methods
from .pruner import Pruner
from .recipe import Recipe
from .registry import FAMILIES, PRUNERS
from .report import KeptItem, Report, titled_plan
from .request import position_modes, read_request

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
    def methods(self) -> Methods:
        """The methods in force."""
        return self._boundary.request.methods

    @property
    def method(self) -> Pruner:
        """The method in force, the one before the language model where there are two."""
        method = self.methods.vision or self.methods.decoder
        assert method is not None
        return method

    @property
    def budget(self) -> Budget | Plan | None:
        """The budget in force, or the plan that is replayed; None where the method's own fields say how much."""
        return self._boundary.request.spend

    @property
    def reason(self) -> str | None:
        """Why this method was chosen, where ``patch`` was given none."""
        return self._boundary.request.reason

    @property
    def active(self) -> bool:
        """The patch is in place."""
        return bool(self._undo)

    def __repr__(self) -> str:
        """Methods, budget, model and whether the patch is in place."""
        spend = self.budget
        at = f" with {titled_plan(spend)}" if isinstance(spend, Plan) else "" if spend is None else f" at {spend}"
        state = "active" if self.active else "undone"
        return f"<PatchHandle {self.methods}{at} on {type(self._outer).__name__}, {state}>"

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.undo()
        else:  # which is what the caller must hear of, not of promises; and a device in trouble is not waited for
            self._take_back()

    def undo(self) -> None:
        """Take the patch away; the model is exactly what it was: the same hooks, attributes and objects.

        Raises:
            PatchError: Another thread is inside the patched language model; wait for it.
            SelectionError: The patch is gone, and the last prompts did not keep what their method promised (found this
                late on CUDA devices only, which are not waited for).
        """
        self._take_back()
        self._boundary.accounts.promises.settle(wait=True)

    def _take_back(self) -> None:
        """Undo without asking for promises.

        Raises:
            PatchError: Another thread is inside the patched language model.
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
            PatchError: No prompt has run since the patch, or none ran before it was undone.
        """
        account, boundary = self._account(), self._boundary
        spend = self.budget
        budget = FIXED if spend is None else spend.budget if isinstance(spend, Plan) else spend
        return account.report(str(self.methods), budget, str(boundary.modes), boundary.chooser.cost())

    def kept(self) -> tuple[KeptItem, ...]:
        """Which visual tokens of its last prompt the model saw, per image and video; empty for a text-only prompt.

        Raises:
            PatchError: No prompt has run since the patch.
        """
        return self._account().kept()

    def _account(self) -> Account:
        account: Account | None = self._boundary.account
        if account is None and not self.active:
            raise PatchError(
                "nothing to report: this patch was undone, or replaced by a later one, before a prompt ran through it. "
                "Ask the handle of the patch in force."
            )
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
        return boundary.plan_for(
            layout_of(boundary.base, boundary.family, inputs), text_tokens(boundary.base, boundary.family, inputs)
        )

    def views(
        self,
        *,
        depth: Any = None,
        pose: Any = None,
        intrinsics: Any = None,
        token_xyz: Any = None,
        size: tuple[int, int] | None = None,
        fit: FitKind | None = None,
    ) -> PatchHandle:
        """Lay the geometry of posed pictures beside the next prompts, until other geometry is laid there.

        One view per picture, in the order of the placeholders over the whole batch. Called with nothing, it takes away
        what lay there. All threads see the same: lay nothing new while another one runs a prompt.

        Args:
            depth: [V, H, W] metres along the optical axis, of the pictures before any resizing; 0, NaN and infinity
                where it is not known. A list where the pictures differ in size.
            pose: [V, 4, 4] camera to world; the camera looks along +z, x to the right, y down. A view whose pose is not
                finite has no geometry, of which a warning tells.
            intrinsics: [3, 3] or [V, 3, 3], in the pixels of ``depth``; the centre of the first pixel is (0, 0).
            token_xyz: Instead of these, a list of [n, 3] world coordinates of every picture's tokens.
            size: Height and width of the pictures in whose pixels the intrinsics are, where depth is of another size.
            fit: ``"stretch"``, ``"pad"`` or ``"crop"``: what the processor did to the pictures, where it is set
                differently from the family's released ones.

        Returns:
            The handle itself.

        Raises:
            PatchError: The method in force does not look at geometry, or the patch was undone.
            GeometryError: It cannot be geometry of any pictures. That it belongs to others than the prompt's is told
                when the model runs, before it encodes them.
        """
        self._require("reads_views", "geometry")
        given = {
            "depth": depth,
            "pose": pose,
            "intrinsics": intrinsics,
            "token_xyz": token_xyz,
            "size": size,
            "fit": fit,
        }
        views = Views.of(**given) if any(value is not None for value in given.values()) else None
        self._boundary.beside = replace(self._boundary.beside, views=views)
        return self

    def frames(self, scores: Any = None, *, of: Modality | None = None) -> PatchHandle:
        """Lay relevance scores of frames beside the next prompts, until others are laid there.

        Called with nothing, it takes away what lay there. All threads see the same, as with :meth:`views`.

        Args:
            scores: One vector of numbers from 0 on per video, in the order of the placeholders over the whole batch (or
                a single vector where there is one video); one vector over all pictures where frames are pictures.
            of: ``"video"`` or ``"image"``: what the frames are. By default those of videos, where the model has them.

        Returns:
            The handle itself.

        Raises:
            PatchError: The method in force does not look at scores, the model knows no such input, or the patch was
                undone.
            FrameScoreError: They are no scores. That they belong to others than the prompt's frames is told when the
                model runs, before it encodes them.
        """
        self._require("reads_frames", "scores of frames")
        known = tuple(self._boundary.family.encoders)
        modality = of or ("video" if "video" in known else "image")
        if modality not in known:
            raise PatchError(f"of must be one of {known} for this model, got {of!r}")
        found = None if scores is None else FrameScores.of(scores, modality)
        self._boundary.beside = replace(self._boundary.beside, scores=found)
        return self

    def _require(self, reads: str, what: str) -> None:
        if not self.active:
            raise PatchError(f"this patch was undone, or replaced by a later one: no prompt would see the {what}")
        if not (self.methods.vision is not None and getattr(self.methods.vision, reads)):
            readers = [name for name in PRUNERS if getattr(PRUNERS.get(name), reads)]
            raise PatchError(f"{self.methods} does not look at {what}; of the library's methods, {readers} do.")

    def _install(self) -> None:
        """Put everything in place; a failure on the way takes back what was done."""
        boundary, outer, base = self._boundary, self._outer, self._boundary.base
        family = boundary.family
        try:
            for probe in boundary.attach_probes():
                self._undo.append(probe.detach)
            watchers = {"image": boundary.watch_image_encoder, "video": boundary.watch_video_encoder}
            taps = [Tap(base, name, watchers[modality]) for modality, name in family.encoders.items()]
            if hasattr(type(outer), "generate"):
                taps.append(Tap(outer, "generate", boundary.watch_generate))
            for tap in taps:
                tap.attach()
                self._undo.append(tap.detach)
            for module, register, hook, options in boundary.hooks():
                self._undo.append(getattr(module, register)(hook, with_kwargs=True, **options).remove)
            base.__dict__[_HANDLE] = self
            self._undo.append(self._forget)
        except BaseException:
            self._take_back()
            raise

    def _forget(self) -> None:
        self._boundary.base.__dict__.pop(_HANDLE, None)


def patch(
    model: Any,
    method: MethodLike | Sequence[MethodLike] | None = None,
    budget: Budget | str | float | None = None,
    *,
    plan: Plan | Recipe | str | Path | None = None,
    positions: str | None = None,
    **options: Any,
) -> PatchHandle:
    """Make a VLM keep only the visual tokens that matter, or a video model's attention sparse, within a budget.

    The same ``model(...)``, ``model.generate(...)`` and pipeline calls work as before, on the same attention backend.
    Patching a patched model replaces the patch; undoing then restores the unpatched model. Where the last prompts under
    the earlier patch did not keep what its method promised, which CUDA devices tell late, a warning says so.

    Args:
        model: A supported transformers VLM, a PEFT model around one, or a transformers pipeline with one; or one of
            timm's vision transformers; or a video pipeline of diffusers or its transformer, for which
            :func:`vlm_budget.video.dit.handle.patch_video` says what method, budget and options are.
        method: Name of a method (see :func:`vlm_budget.list_methods`), a configured instance, or a list of two: one
            that acts before the language model and one that acts inside it. None takes the default for the model,
            chosen from a recorded table; ``handle.reason`` says why.
        budget: What each prompt may spend: ``0.2`` or ``"20%"`` (share of its visual tokens), ``128`` or
            ``"128 tokens"``, ``"40% flops"``, ``"80 ms"``, ``"200 MB kv"`` (of the language model's prompt pass). For
            methods inside the language model, tokens are the mean over its layers. ``1.0`` leaves the model
            bit-identical.
        plan: Instead of a budget: exact counts to replay, or a recipe that a search has written, or the path of either.
        positions: ``"packed"`` or ``"original"``, to override the method's position ids (1-D RoPE only).
        options: Fields of the methods, such as ``alpha=0.3`` for ``"hired"``; ``merge="token_transforming"`` behind any
            method that acts before the language model.

    Returns:
        The handle, with ``report()``, ``plan()`` and ``undo()``; also a context manager. For timm's vision transformers
        a ``VitHandle``, for video models a ``VideoHandle``, both with ``report()`` and ``undo()``.

    Raises:
        UnsupportedModelError: No family knows the model.
        UnknownNameError: Unknown method or option; the message suggests.
        OptionError: An option's value is not usable.
        BudgetError: Not a budget.
        PlanError: A plan that cannot be read, is damaged, or was made for another model.
        PatchError: The combination cannot work.
    """
    if is_vit(model):
        handle_of_vit: Any = patch_vit(model, method, budget, plan=plan, positions=positions, **options)  # type: ignore[arg-type]
        return handle_of_vit
    if is_diffusion(model):
        handle_of_video: Any = patch_diffusion(model, method, budget, plan=plan, positions=positions, **options)
        return handle_of_video
    outer, base, family = find_family(model)
    request = read_request(base, family, method, budget, plan, options)
    boundary = Boundary(base, family, request, position_modes(family, request.methods, positions))
    if request.reason is not None:
        _log_default(family, request.methods, request.reason)
    earlier: PatchHandle | None = base.__dict__.get(_HANDLE)
    if earlier is not None:
        earlier._take_back()
    if _is_compiled(model) or _is_compiled(outer) or _is_compiled(base):
        torch.compiler.reset()  # its guards overlook hooks that are added to what has run compiled before
    handle = PatchHandle(outer, boundary)
    try:
        handle._install()
    except BaseException:
        if earlier is not None:
            earlier._install()
        raise
    if earlier is not None:
        _tell_broken_promises(earlier)
    return handle


def unpatch(model: Any) -> None:
    """Undo the patch of a model, also of a copy of a patched one.

    Raises:
        PatchError: The model is not patched.
    """
    if is_vit(model):
        unpatch_vit(model)
        return
    if is_diffusion(model):
        unpatch_diffusion(model)
        return
    _, base, _ = find_family(model)
    handle: PatchHandle | None = base.__dict__.get(_HANDLE)
    if handle is None:
        raise PatchError(f"this {type(base).__name__} is not patched")
    handle.undo()


def _tell_broken_promises(earlier: PatchHandle) -> None:
    """Warn where a patch that was replaced had not kept its promises; the new one is in place and did nothing wrong."""
    try:
        earlier._boundary.accounts.promises.settle(wait=True)
    except SelectionError as error:
        warnings.warn(f"under the patch that this one replaces, {error}", stacklevel=3)


def _is_compiled(model: Any) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _log_default(family: Family, methods: Methods, reason: str) -> None:
    name = FAMILIES.name_of(type(family))
    logging.getLogger("vlm_budget").warning("no method named: using %s, the default for %s; %s.", methods, name, reason)
