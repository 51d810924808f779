"""Patching plain timm vision transformers, and undoing it exactly.

timm is not imported: a model is known by its class name and by the modules its blocks are made of. Nothing of it is
replaced; a patch is hooks on the model's own modules (:mod:`vlm_budget.engine.vit_hooks`).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from ..budget import Budget
from ..errors import BudgetError, OptionError, PatchError, UnknownNameError, UnsupportedModelError
from ..registry import MERGES, PRUNERS, VIT_METHODS
from ..vit import VitMethod, VitReport
from .vit_hooks import BlockHooks, VitEngine

_HANDLE = "_vlm_budget_handle"
_CLASS, _MODULE = "VisionTransformer", "timm.models.vision_transformer"
_BLOCK_PARTS = ("norm1", "attn", "norm2", "mlp", "drop_path2")
_ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "proj")


class VitHandle:
    """A patched vision transformer: its report, and the way back.

    Use it as a context manager to undo the patch at the end of a block. Undoing twice is harmless.
    """

    def __init__(self, engine: VitEngine) -> None:
        self._engine = engine
        self._undo: list[Callable[[], None]] = []

    @property
    def model(self) -> nn.Module:
        """The patched model."""
        model: nn.Module = self._engine.model
        return model

    @property
    def method(self) -> VitMethod:
        """The method in force."""
        return self._engine.method

    @property
    def budget(self) -> Budget | None:
        """The budget in force; None where the method's own fields say what it spends."""
        return self._engine.budget

    @property
    def active(self) -> bool:
        """The patch is in place."""
        return bool(self._undo)

    def __repr__(self) -> str:
        """Method, budget, model and whether the patch is in place."""
        at = "" if self.budget is None else f" at {self.budget}"
        return f"<VitHandle {self.method}{at} on {type(self.model).__name__}, {'active' if self.active else 'undone'}>"

    def __enter__(self) -> VitHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Take the patch away; the model is exactly what it was: the same hooks, attributes and objects.

        Raises:
            PatchError: Another thread is inside the patched model; wait for it.
        """
        if self._undo and self._engine.running.others():
            raise PatchError(
                f"{self._engine.running.others()} other thread(s) are running the patched model, and would go on half "
                "patched. Wait for them before undoing or patching anew."
            )
        while self._undo:
            self._undo.pop()()

    def report(self) -> VitReport:
        """What the last batch went through. Runs one blank image patched and unpatched, to count operations.

        Raises:
            PatchError: No image has run since the patch, or the patch was undone before its operations were counted.
        """
        if not self.active:
            raise PatchError("the patch is undone; ask for the report before undoing it")
        return self._engine.report()

    def _install(self) -> None:
        """Put everything in place; a failure on the way takes back what was done."""
        engine, model = self._engine, self._engine.model
        try:
            self._hook(model.patch_embed, "register_forward_pre_hook", engine.before_patch_embed)
            for index, block in enumerate(model.blocks):
                self._install_block(block, BlockHooks(engine, index, block.attn.scale))
            if engine.method.weighs:
                self._hook(model.norm, "register_forward_hook", engine.after_norm)
                self._hook(model.fc_norm, "register_forward_pre_hook", engine.before_fc_norm)
            self._hook(model, "register_forward_hook", engine.after_model, always_call=True)
            model.__dict__[_HANDLE] = self
            self._undo.append(self._forget)
        except BaseException:
            self.undo()
            raise

    def _install_block(self, block: Any, hooks: BlockHooks) -> None:
        self._hook(block, "register_forward_pre_hook", hooks.before_block)
        self._hook(block.attn, "register_forward_pre_hook", hooks.before_attention, with_kwargs=True)
        self._hook(block.attn.q_norm, "register_forward_hook", hooks.on_query)
        self._hook(block.attn.k_norm, "register_forward_hook", hooks.on_key)
        self._hook(block.norm2, "register_forward_pre_hook", hooks.before_mlp)
        self._hook(block.drop_path2, "register_forward_hook", hooks.after_mlp)
        self._hook(block, "register_forward_hook", hooks.after_block)

    def _hook(self, module: nn.Module, register: str, hook: Callable[..., Any], **options: bool) -> None:
        self._undo.append(getattr(module, register)(hook, **options).remove)

    def _forget(self) -> None:
        self._engine.model.__dict__.pop(_HANDLE, None)


def is_vit(model: Any) -> bool:
    """The model is timm's ``VisionTransformer``, or a subclass of it."""
    return any(cls.__name__ == _CLASS and cls.__module__ == _MODULE for cls in type(model).__mro__)


def patch_vit(
    model: nn.Module,
    method: str | VitMethod,
    budget: Budget | str | float | None = None,
    *,
    ratio: float | None = None,
    plan: Any = None,
    positions: Any = None,
    **options: Any,
) -> VitHandle:
    """Make a plain timm vision transformer go on with fewer and fewer patch tokens.

    Patching a patched model replaces the patch; undoing then restores the unpatched model.

    Args:
        model: A ``timm.models.vision_transformer.VisionTransformer``.
        method: ``"tome"`` or ``"token_transforming"``, or a configured instance.
        budget: Patch tokens that leave the last block: a share (``0.5``, ``"50%"``) or a number (``72``). ``1.0``
            leaves the model bit-identical.
        ratio: The share, under the name the literature gives it.
        plan: Only for VLMs, refused.
        positions: Same.
        options: Fields of the method.

    Raises:
        UnsupportedModelError: Not such a model, or one whose blocks are built in another way.
        UnknownNameError: Unknown method or option; the message suggests.
        BudgetError: Not a budget, none where one is needed, or one too many.
        OptionError: An option's value is not usable, or is for VLMs only.
        PatchError: The combination cannot work.
    """
    for name, value in (("plan", plan), ("positions", positions)):
        if value is not None:
            raise OptionError(
                f"{name}={value!r} is for VLMs; a plain vision transformer takes a ratio or a budget, such as ratio=0.5"
            )
    chosen = _method(method, options)
    spend = _budget(chosen, budget, ratio)
    _check_model(model, chosen)
    earlier: VitHandle | None = model.__dict__.get(_HANDLE)
    if earlier is not None:
        earlier.undo()
    # Compiled code overlooks hooks that are added behind its back, and a model does not say whether it was compiled.
    torch.compiler.reset()
    handle = VitHandle(VitEngine(model, chosen, spend))
    try:
        handle._install()
    except BaseException:
        if earlier is not None:
            earlier._install()
        raise
    return handle


def unpatch_vit(model: nn.Module) -> None:
    """Undo the patch of a vision transformer, also of a copy of a patched one.

    Raises:
        PatchError: The model is not patched.
    """
    handle: VitHandle | None = model.__dict__.get(_HANDLE)
    if handle is None:
        raise PatchError(f"this {type(model).__name__} is not patched")
    handle.undo()


def _method(method: Any, options: Mapping[str, Any]) -> VitMethod:
    if isinstance(method, VitMethod):
        if options:
            raise PatchError(f"options {sorted(options)} go with a method's name; configure the instance instead")
        return method
    names = ", ".join(VIT_METHODS)
    if not isinstance(method, str):
        raise UnknownNameError(f"a plain vision transformer takes {names} or a VitMethod, got {method!r}")
    if method not in VIT_METHODS and (method in PRUNERS or method in MERGES):
        raise PatchError(
            f"{method!r} acts on what a VLM's language model sees. A plain vision transformer takes {names}."
        )
    cls = VIT_METHODS.get(method)
    known = [field.name for field in fields(cls)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "ratio"], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(f"{method!r} has no option {name!r}.{hint} Options: ratio, {', '.join(known)}.")
    found: VitMethod = cls(**options)
    return found


def _budget(method: VitMethod, budget: Any, ratio: Any) -> Budget | None:
    if budget is not None and ratio is not None:
        raise BudgetError("pass a budget or a ratio, which mean the same, not both")
    if method.fixed:
        if budget is not None or ratio is not None:
            raise BudgetError(f"{method} itself says how many tokens leave; pass it without a budget or ratio")
        return None
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise BudgetError(f"ratio is the share of tokens that leave the last block, in (0, 1], got {ratio!r}")
        return Budget(float(ratio))
    if budget is None:
        raise BudgetError(f"{method} needs a ratio or a budget, such as ratio=0.5")
    spend = Budget.parse(budget)
    if spend.unit not in ("ratio", "tokens"):
        raise BudgetError(f"a vision transformer's budget is a share or a number of patch tokens, got '{spend}'")
    return spend


def _check_model(model: Any, method: VitMethod) -> None:
    """Refuse what the hooks were not made for.

    Raises:
        UnsupportedModelError: Another class, or blocks of another make.
        PatchError: The method needs more than this timm, or this model's pooling, can do.
    """
    if not is_vit(model):
        raise UnsupportedModelError(f"{type(model).__name__} is not timm's {_CLASS}")
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        missing = [part for part in _BLOCK_PARTS if not isinstance(getattr(block, part, None), nn.Module)]
        missing += [
            f"attn.{part}" for part in _ATTENTION_PARTS if not isinstance(getattr(attention, part, None), nn.Module)
        ]
        kinds = type(block).__name__, type(attention).__name__
        if missing or kinds != ("Block", "Attention"):
            what = f"without {', '.join(missing)}" if missing else f"of {kinds[0]} with {kinds[1]}"
            raise UnsupportedModelError(
                f"block {index} of this {type(model).__name__} is {what}; supported are timm's pre-norm Block with its "
                "Attention"
            )
    if method.weighs:
        _check_weighing(model, method)


def _check_weighing(model: Any, method: VitMethod) -> None:
    if "attn_mask" not in inspect.signature(model.blocks[0].attn.forward).parameters:
        raise PatchError(
            f"{method} adds log(size) to the attention logits, and this timm's attention takes no attn_mask. Upgrade "
            "timm, or pass proportional=False."
        )
    if model.global_pool in ("map", "prr"):
        raise PatchError(
            f"this model pools tokens by attention ({model.global_pool!r}), which cannot count merged tokens by their "
            "sizes. Pass proportional=False to let it count each once."
        )
