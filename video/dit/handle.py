"""``patch`` for diffusers pipelines and video transformers, and what it returns."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import nn

from vlm_budget.budget import Budget
from vlm_budget.errors import BudgetError, OptionError, PatchError, UnknownNameError, UnsupportedModelError
from vlm_budget.ops.block_sparse_attention import Backend
from vlm_budget.ops.flash_blocks import TILE, require_flash
from vlm_budget.registry import VIDEO_METHODS, VIDEO_MODELS

from .break_even import BREAK_EVEN
from .clock import Clock
from .control import HANDLE, Attached, Control, check_head
from .method import SparseAttention
from .models.base import VideoModel
from .quality import Quality, compare, without_comparison
from .report import VideoReport

_SLOTS = ("transformer", "transformer_2")
_OWN_OPTIONS = ("force", "break_even", "backend", "timesteps")
_DEFAULT = "svg2"


class VideoHandle:
    """A patched video pipeline or transformer: its report, and the way back.

    Use it as a context manager to undo the patch at the end of a block. Undoing twice is harmless.
    """

    def __init__(self, model: Any, control: Control, attached: Sequence[Attached]) -> None:
        self._model = model
        self._control = control
        self._attached = tuple(attached)
        self._quality: Quality | None = None

    @property
    def model(self) -> Any:
        """The patched pipeline or transformer."""
        return self._model

    @property
    def method(self) -> SparseAttention:
        """The method in force, as it was configured; what it leaves None is the model's preset."""
        return self._control.method

    @property
    def budget(self) -> Budget | None:
        """The budget in force; None where the method's fields, or the model's preset, say what is computed."""
        return self._control.budget

    @property
    def active(self) -> bool:
        """The patch is in place, on one transformer at least."""
        return any(one.active for one in self._attached)

    def __repr__(self) -> str:
        """Method, budget, model and whether the patch is in place."""
        at = "" if self.budget is None else f" at {self.budget}"
        state = "active" if self.active else "undone"
        return f"<VideoHandle {self.method}{at} on {type(self.model).__name__}, {state}>"

    def __enter__(self) -> VideoHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Take the patch away; transformers are exactly what they were: the same processors, hooks and attributes."""
        for one in self._attached:
            one.detach()

    def reset(self) -> None:
        """Forget what was kept from step to step: the next forward begins a new run.

        A run's beginning is found out by itself. Only a loop of one's own whose first timestep is not above the last
        one's needs to say it.
        """
        self._control.reset()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Everything runs dense inside, and nothing is taken note of."""
        before, self._control.suspended = self._control.suspended, True
        try:
            yield
        finally:
            self._control.suspended = before

    def compare(self, run: Callable[[], Any], repeat: bool = False) -> Quality:
        """Run sparse and dense, and say how far the clips are apart.

        Args:
            run: Makes the clips, with a seed of its own: whenever it is called, the same ones.
            repeat: Run dense twice, to see whether ``run`` keeps that contract.

        Returns:
            PSNR and SSIM of each clip; ``report(quality=True)`` has them too.

        Raises:
            PatchError: The patch was undone.
            DataError: What ``run`` returns are no clips.
        """
        if not self.active:
            raise PatchError("this patch was undone, or replaced by a later one: both runs would be dense")
        self._quality = compare(run, self.suspended, repeat)
        return self._quality

    def report(self, quality: bool = False) -> VideoReport:
        """What the self-attention of the last run computed. Waits for the device.

        Args:
            quality: Tell PSNR and SSIM too, of the last :meth:`compare`.

        Raises:
            PatchError: No video has run since the patch, or ``quality`` without a comparison.
        """
        if quality and self._quality is None:
            raise without_comparison()
        return self._control.account.report(self._quality if quality else None)


def patch_video(
    model: Any,
    method: str | SparseAttention | None = None,
    budget: Budget | str | float | None = None,
    *,
    force: bool = False,
    break_even: int = BREAK_EVEN,
    backend: Backend = "auto",
    timesteps: int | Sequence[float] | torch.Tensor | None = None,
    plan: Any = None,
    positions: Any = None,
    **options: Any,
) -> VideoHandle:
    """Make the self-attention of a video diffusion model sparse.

    The pipeline is called as before. Patching what is patched replaces the patch; undoing then restores the unpatched
    model. Cross-attention, and text, are never sparse.

    A run's beginning reads its first timestep and looks for NaN in its latents, which waits for the device; later steps
    do not. In blocks that are compiled, the code of attention processors runs uncompiled, in dense steps too.

    Args:
        model: A diffusers pipeline with one or two supported transformers, or such a transformer.
        method: Name of a method (see :func:`vlm_budget.list_video_methods`) or a configured instance; ``"svg2"`` where
            None.
        budget: What the video's self-attention may spend: ``0.25`` or ``"25%"`` (density of sparse calls), ``"30%
            flops"`` (of the whole run's, dense steps and layers counted; a number of FLOPs counts one forward per
            step), ``"900 ms"`` or ``"50% ms"`` (of one forward's self-attention). ``1.0`` leaves the model
            bit-identical.
        force: Be sparse where the video is too short for it to pay.
        break_even: Tokens of the video below which dense attention is faster, and is used with a warning. The default
            is an estimate, not a measurement.
        backend: What computes sparse calls: ``"auto"``; ``"tma"``, the same kernel with keys read by the tensor memory
            accelerator; ``"fa4"``, FlashAttention-4 where it is installed, on Hopper, for methods with fixed blocks of
            128. Neither of the latter two was timed yet.
        timesteps: Of a transformer without its pipeline, the number of steps of a run, or their timesteps; needed
            where the first steps are dense. Every forward then reads the timestep it is given, which waits for the
            device.
        plan: Only for VLMs, refused.
        positions: Same.
        options: Fields of the method, such as ``density=0.3`` or ``warmup=0.1``.

    Raises:
        UnsupportedModelError: No supported transformer; the message lists them.
        UnknownNameError: Unknown method or option; the message suggests.
        OptionError: An option's value is not usable.
        MissingExtraError: ``backend="fa4"`` without FlashAttention-4.
        BudgetError: Not a budget, or not one for video.
        VideoAttentionError: Heads of more than 128 dimensions.
        PatchError: The combination cannot work.
    """
    for name, value in (("plan", plan), ("positions", positions)):
        if value is not None:
            raise OptionError(f"{name}={value!r} is for VLMs; a video model takes a density or a budget")
    transformers = find_transformers(model)
    chosen = _method(method, options)
    spend = _budget(chosen, budget)
    if isinstance(break_even, bool) or not isinstance(break_even, int) or break_even < 0:
        raise OptionError(f"break_even is a number of video tokens, 0 or more, got {break_even!r}")
    _check_backend(backend, chosen)
    if not isinstance(force, bool):
        raise OptionError(f"force must be True or False, got {force!r}")
    is_pipeline = not isinstance(unwrapped(model), nn.Module)
    if is_pipeline and timesteps is not None:
        raise OptionError("timesteps= is for a transformer alone; a pipeline's scheduler tells its steps")
    rising = any(known.rising for _, known in transformers.values())
    clock = Clock(model if is_pipeline else None, timesteps, rising)
    control = Control(chosen, spend, clock, force, break_even, backend)
    attached = []
    for name, (transformer, known) in transformers.items():
        _check(transformer, known, chosen, clock)
        attached.append(Attached(name, transformer, known, control))
    _install(attached)
    return VideoHandle(model, control, attached)


def unpatch_video(model: Any) -> None:
    """Undo the patch of a video pipeline or transformer, also of a copy of a patched one.

    Raises:
        PatchError: The model is not patched.
    """
    found = [transformer.__dict__.get(HANDLE) for transformer, _ in find_transformers(model).values()]
    patched = [one for one in found if one is not None]
    if not patched:
        raise PatchError(f"this {type(unwrapped(model)).__name__} is not patched")
    for one in patched:
        one.detach()


def unwrapped(model: Any) -> Any:
    """The model inside what ``torch.compile`` makes of it."""
    return getattr(model, "_orig_mod", model)


def find_transformers(model: Any) -> dict[str, tuple[nn.Module, VideoModel]]:
    """The supported transformers of a pipeline, by the names it has for them, or the transformer itself.

    Raises:
        UnsupportedModelError: There are none.
    """
    model = unwrapped(model)
    parts = {"transformer": model} if isinstance(model, nn.Module) else {}
    for name in () if parts else _SLOTS:
        part = unwrapped(getattr(model, name, None))
        if isinstance(part, nn.Module):
            parts[name] = part
    found = {name: (part, _model_of(part)) for name, part in parts.items()}
    known = {name: (part, adapter) for name, (part, adapter) in found.items() if adapter is not None}
    if len(known) < len(found) or not found:
        strange = [type(part).__name__ for part, adapter in found.values() if adapter is None]
        within = "" if isinstance(model, nn.Module) else f" of {type(model).__name__}"
        got = f"{', '.join(strange)}{within}" if strange else f"{type(model).__name__} without a transformer"
        supported = sorted(VIDEO_MODELS.get(name).transformer for name in VIDEO_MODELS)
        raise UnsupportedModelError(f"{got} is not supported. Supported video transformers: {', '.join(supported)}.")
    return known


def _model_of(transformer: nn.Module) -> VideoModel | None:
    names = {cls.__name__ for cls in type(transformer).__mro__}
    known: list[type[VideoModel]] = [VIDEO_MODELS.get(name) for name in VIDEO_MODELS]
    return next((cls() for cls in known if cls.transformer in names), None)


def _method(method: Any, options: dict[str, Any]) -> SparseAttention:
    if isinstance(method, SparseAttention):
        if options:
            raise PatchError(f"options {sorted(options)} go with a method's name; configure the instance instead")
        return method
    name = _DEFAULT if method is None else method
    if not isinstance(name, str):
        raise UnknownNameError(f"a video model takes {', '.join(VIDEO_METHODS)} or a SparseAttention, got {method!r}")
    cls = VIDEO_METHODS.get(name)
    known = [field.name for field in fields(cls)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, [*known, *_OWN_OPTIONS, "budget"], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(
                f"{name!r} has no option {option!r}.{hint} Options: {', '.join([*known, *_OWN_OPTIONS])}."
            )
    found: SparseAttention = cls(**options)
    return found


def _budget(method: SparseAttention, budget: Any) -> Budget | None:
    if budget is None:
        return None
    spend = Budget.parse(budget)
    if method.settled:
        raise OptionError(f"{method} itself says how much is computed; pass it without a budget, got '{spend}'")
    if spend.unit not in ("ratio", "flops", "ms"):
        raise BudgetError(
            f"a video's budget is a density (0.25, '25%'), FLOPs ('30% flops') or milliseconds ('900 ms', '50% ms'), "
            f"got '{spend}'"
        )
    return spend


def _check_backend(backend: str, method: SparseAttention) -> None:
    if backend not in get_args(Backend):
        raise OptionError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "fa4":
        require_flash()
        if method.tile != TILE:
            raise OptionError(
                f"backend='fa4' takes fixed blocks of {TILE}, which {method} does not cut. Try cut='fixed' with svg2, "
                "or backend='auto'."
            )


def _check(transformer: nn.Module, known: VideoModel, method: SparseAttention, clock: Clock) -> None:
    check_head(known.heads(transformer)[1])
    warmup = method.warmup if method.warmup is not None else known.preset(transformer).warmup
    if warmup and not clock.counts:
        raise OptionError(
            f"the first {warmup:.0%} of a run's steps are dense, and a transformer without its pipeline does not tell "
            "how many there are. Pass timesteps= (their number, or the scheduler's timesteps), warmup=0, or the "
            "pipeline."
        )


def _install(attached: Sequence[Attached]) -> None:
    """Replace what is in place; a failure puts it back."""
    earlier = [one.transformer.__dict__.get(HANDLE) for one in attached]
    for old in earlier:
        if old is not None:
            old.detach()
    try:
        for one in attached:
            one.attach()
    except BaseException:
        for one in attached:
            one.detach()
        for old in earlier:
            if old is not None:
                old.attach()
        raise
    if any(_is_compiled(one.transformer) for one in attached):
        torch.compiler.reset()  # guards of compiled code overlook what changes about processors


def _is_compiled(transformer: nn.Module) -> bool:
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in transformer.modules())
