"""Dropping inside the language model: pre-hooks of its decoder layers that shorten what they are given.

The language model runs its loop as released; it makes one mask and one set of rotary embeddings for layer 0 and hands
them to every layer. From a dropping layer on, a layer's hook gathers the kept ones of the hidden states, masks and
rotary embeddings. Every layer's cache then holds what the layer saw, and later calls get a mask for each group of
layers (see ``cache.LayerGroup``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..decoder import DecoderPruner
from ..errors import PatchError
from ..families.base import Family
from ..plan import Plan
from .local import CallLocal
from .probes import AttachedProbe, AttentionSink, attach
from .run import DropRun

Hook = tuple[nn.Module, str, Any, dict[str, Any]]


class LayerHook:
    """The forward pre-hook of one decoder layer. An object, so that it copies and pickles with its model."""

    def __init__(self, dropper: LayerDropper, layer: int) -> None:
        self.dropper = dropper
        self.layer = layer

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the layer gets instead; None where nothing was dropped for it."""
        run = self.dropper.run
        return None if run is None else run.before_layer(self.layer, module, args, kwargs)


class LayerDropper:
    """Holds the hooks and probes of one model's decoder layers.

    Args:
        base: The model that holds the language model.
        family: What is known about its class.
        pruner: The method that chooses.
        positions: ``"original"`` or ``"packed"``.
        watch: Probe the layers for the method; without it nothing may be dropped.
        plan: Counts that are replayed, so that only their layers are probed.

    Raises:
        PatchError: The language model's layers cannot be shortened, or not where the plan says.
    """

    def __init__(
        self,
        base: nn.Module,
        family: Family,
        pruner: DecoderPruner,
        positions: str,
        watch: bool = True,
        plan: Plan | None = None,
    ) -> None:
        self.base = base
        self.family = family
        self.pruner = pruner
        self.positions = positions
        self._local = CallLocal()
        _require_full_attention(self.language_model.config, type(base).__name__)
        self.require_backend()
        if plan is not None:
            self.check(plan)
        steps = range(1, self.layers) if plan is None else plan.drop_layers
        before = {"previous": 1, "own": 0}.get(pruner.scores)
        watched = [] if before is None or not watch else [layer - before for layer in steps]
        self.sinks = {layer: AttentionSink(("qk",)) for layer in watched}

    @property
    def language_model(self) -> Any:
        """The decoder."""
        return self.family.language_model(self.base)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.language_model.layers)

    @property
    def run(self) -> DropRun | None:
        """The language model's call in progress on this thread, if any of its layers is to be shortened."""
        return getattr(self._local, "run", None)

    def enter(self, run: DropRun) -> None:
        """Follow a call of the language model from now on."""
        self._local.run = run

    def leave(self) -> DropRun | None:
        """Stop following; the run, whose language model may have raised."""
        run, self._local.run = self.run, None
        if run is not None:
            run.release()
        return run

    def hooks(self) -> list[Hook]:
        """Module, name of the registering method, hook and options of every hook.

        Of all layers but the first: where a prompt drops depends on its budget, where a cache did on its own past.
        """
        layers = list(enumerate(self.language_model.layers))
        return [(layer, "register_forward_pre_hook", LayerHook(self, i), {}) for i, layer in layers[1:]]

    def attach(self) -> list[AttachedProbe]:
        """Probe the layers; the caller owns the undoing."""
        probes: list[AttachedProbe] = []
        try:
            for layer, sink in self.sinks.items():
                probes.append(attach(self.language_model.layers[layer].self_attn, sink))
        except BaseException:
            for probe in reversed(probes):
                probe.detach()
            raise
        return probes

    def check(self, plan: Plan) -> None:
        """Refuse a plan that this model cannot follow.

        Raises:
            PatchError: It drops behind the last layer, or where visual features are still being added.
        """
        added = self.family.deepstack_levels(self.base)
        for layer in plan.drop_layers:
            if layer >= self.layers:
                raise PatchError(
                    f"the plan drops tokens at decoder layer {layer}, but the language model has layers 0 to "
                    f"{self.layers - 1}. Drop at one of the layers {max(1, added)} to {self.layers - 1}."
                )
            if layer < added:
                raise PatchError(
                    f"the plan drops tokens at decoder layer {layer}, but {type(self.base).__name__} adds visual "
                    f"features behind each of its first {added} layers. Start at layer {added} or later: make the plan "
                    "anew with handle.plan(**inputs), or let the method's schedule() begin there."
                )

    def require_backend(self) -> str:
        """Name of the attention backend in use.

        Raises:
            PatchError: Its masks cannot be made for single layers.
        """
        name = str(self.language_model.config._attn_implementation or "eager")
        if name not in ("eager", "sdpa") and "flash" not in name:
            raise PatchError(
                f"tokens cannot be dropped inside a language model that attends by {name!r}: its masks cannot be made "
                "for single layers. Load it with attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
            )
        return name

    def require_droppable(self, cache: Any) -> None:
        """Refuse a call of the language model in which tokens would have to be dropped and cannot be.

        Raises:
            PatchError: Its cache, backend or gradient checkpointing does not allow it.
        """
        self.require_backend()
        if getattr(cache, "is_compileable", False):
            raise PatchError(
                f"a {type(cache).__name__} gives all layers the same length, so no tokens can be dropped inside the "
                "language model. Use the default dynamic cache, or a method that acts before the language model."
            )
        layer = self.language_model.layers[0]
        inside = type(layer).__call__ is not nn.Module.__call__  # the checkpoint wraps hooks and all, up to 4.x
        if inside and layer.training and getattr(layer, "gradient_checkpointing", False):
            raise PatchError(
                "this version of transformers runs the hooks of checkpointed layers again in the backward pass, so no "
                "tokens can be dropped there. Use transformers 5, or switch gradient checkpointing off."
            )

    def sink(self, layer: int) -> AttentionSink | None:
        """The sink whose queries and keys the method sees at a step; None for methods that see none."""
        before = {"previous": 1, "own": 0}.get(self.pruner.scores)
        return None if before is None else self.sinks[layer - before]


def _require_full_attention(config: Any, name: str) -> None:
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    width = getattr(config, "sliding_window", None)
    other = sorted({kind for kind in kinds or () if kind != "full_attention"})
    if kinds is None and width is not None:
        other = ["sliding_attention"]
    if other:
        raise PatchError(
            f"{name} has layers of {' and '.join(other)}, whose windows count tokens that dropping would take away. "
            "Drop before the language model instead, with a method such as 'hired'."
        )
