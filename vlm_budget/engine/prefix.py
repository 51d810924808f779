"""Prompt passes that stop in front of a decoder layer and go on from there, again and again, under other counts.

A search tries many schedules that agree on their first layers. What those layers give is computed once and kept; only
the layers behind run for every trial. The values are those of whole runs: the same modules get the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import PatchError
from ..plan import Plan
from .candidates import PromptTokens
from .layers import LayerDropper
from .probes import QueryKey
from .run import DropRun, Entered, Segment
from .taps import Tap


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt pass in front of a decoder layer. Nothing of it is ever changed.

    Attributes:
        layer: The layer that comes next; what it drops is not dropped yet.
        hidden: [B, S, D] its input.
        given: What the language model hands to every layer beside it.
        shown: Queries and keys of the layer before.
        entered: What entered the language model.
        prompts: The tokens still there.
        segments: What the layers so far saw.
    """

    layer: int
    hidden: torch.Tensor
    given: dict[str, Any]
    shown: QueryKey
    entered: Entered
    prompts: Sequence[PromptTokens]
    segments: Sequence[Segment]

    @property
    def nbytes(self) -> int:
        """Memory of what would otherwise be gone."""
        kept = (self.hidden, self.shown.query, self.shown.key, self.entered.embeds)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class _Stop(Exception):
    """Leaves the model once the prefix is recorded."""


@dataclass(eq=False)
class _Recorder:
    """Two hooks that record a pass in front of a layer and stop it there."""

    dropper: LayerDropper
    layer: int
    found: Prefix | None = None
    _removers: list[Any] = field(default_factory=list)

    def __enter__(self) -> _Recorder:
        layers = self.dropper.language_model.layers
        # In front of the engine's own hooks, which drop at the layer's input.
        options = {"with_kwargs": True, "prepend": True}
        self._removers = [
            layers[self.layer - 1].register_forward_pre_hook(self.before_last, **options),
            layers[self.layer].register_forward_pre_hook(self.before_next, **options),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._removers:
            handle.remove()

    def before_last(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The layer's queries and keys are wanted."""
        self.dropper.sinks[self.layer - 1].start()

    def before_next(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record, and stop."""
        run = self.dropper.run
        if run is None:
            raise PatchError("nothing is dropped inside the language model, so there is nothing to record")
        given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        hidden = args[0] if args else kwargs["hidden_states"]
        shown = self.dropper.sinks[self.layer - 1].stop()["qk"][-1]
        self.found = Prefix(self.layer, hidden, given, shown, run.entered, tuple(run.prompts), tuple(run.segments))
        raise _Stop


class _Resumed(DropRun):
    """A run that begins in front of a later layer."""

    def __init__(self, dropper: LayerDropper, prefix: Prefix, prompts: Sequence[PromptTokens]) -> None:
        super().__init__(dropper, replace(prefix.entered, prompts=prompts))
        self.segments = list(prefix.segments)
        self._prefix = prefix

    def _queries_and_keys(
        self, layer: int, module: Any, hidden: torch.Tensor, given: dict[str, Any]
    ) -> QueryKey | None:
        if layer == self._prefix.layer:
            return self._prefix.shown
        return super()._queries_and_keys(layer, module, hidden, given)


def capture_prefix(model: Any, inputs: dict[str, Any], dropper: LayerDropper, layer: int) -> Prefix:
    """Run a patched model up to a layer.

    Args:
        model: The patched model, with a method whose scores are of the previous layer and which drops somewhere.
        inputs: A batch without padding.
        dropper: The patch's.
        layer: The layer in front of which to stop, at least 1.
    """
    with _Recorder(dropper, layer) as recorder, suppress(_Stop):
        model(**inputs, use_cache=False, logits_to_keep=1)
    assert recorder.found is not None, "the language model has this layer"
    return recorder.found


def advance_prefix(prefix: Prefix, dropper: LayerDropper, plan: Plan) -> Prefix:
    """Run one more layer.

    Args:
        prefix: Where to go on.
        dropper: Of a patch with the same method.
        plan: Counts of the batch; those of the layer that runs are used.
    """
    run = _Resumed(dropper, prefix, _with_counts(prefix, plan))
    dropper.enter(run)
    try:
        dropper.sinks[prefix.layer].start()
        hidden = _layer(dropper, prefix.layer, prefix.hidden, prefix.given)
        shown = dropper.sinks[prefix.layer].stop()["qk"][-1]
    finally:
        dropper.leave()
    return Prefix(
        prefix.layer + 1, hidden, prefix.given, shown, prefix.entered, tuple(run.prompts), tuple(run.segments)
    )


def run_suffix(prefix: Prefix, dropper: LayerDropper, plan: Plan) -> torch.Tensor:
    """Run the layers behind a prefix.

    Args:
        prefix: Where to go on.
        dropper: Of a patch with the same method.
        plan: Counts of the batch; those from the prefix's layer on are used.

    Returns:
        [B, 1, D] last hidden state of the last token, behind the final norm.
    """
    dropper.enter(_Resumed(dropper, prefix, _with_counts(prefix, plan)))
    try:
        hidden = prefix.hidden
        for layer in range(prefix.layer, dropper.layers):
            hidden = _layer(dropper, layer, hidden, prefix.given)
    finally:
        dropper.leave()
    found: torch.Tensor = dropper.language_model.norm(hidden)[:, -1:]
    return found


def head_logits(outer: Any, base: nn.Module, inputs: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    """[B, 1, V] what the outer model makes of a last hidden state, its head and whatever it does to logits.

    Args:
        outer: The ``…ForConditionalGeneration`` model.
        base: The model inside, which does not run.
        inputs: Of the outer model.
        hidden: [B, 1, D].
    """
    tap = Tap(base, "forward", _Instead(hidden))
    tap.attach()
    try:
        logits: torch.Tensor = outer(**inputs, use_cache=False, logits_to_keep=1).logits
        return logits
    finally:
        tap.detach()


@dataclass(frozen=True, eq=False)
class _Instead:
    """What a tap gives in place of the inner model's output."""

    last_hidden_state: torch.Tensor

    def __call__(self, call: Any, args: Any, kwargs: Any) -> _Instead:
        return self

    def __getattr__(self, name: str) -> None:
        """No cache, no attentions: the outer models pass on what is not there."""
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]


def _with_counts(prefix: Prefix, plan: Plan) -> list[PromptTokens]:
    """The prompts with a plan's counts from the prefix's layer on."""
    prompts = []
    for row, prompt in enumerate(prefix.prompts):
        plans = [item for item in plan.items if item.row == row]
        items = [
            replace(item, counts={layer: count for layer, count in own.steps if layer >= prefix.layer})
            for item, own in zip(prompt.items, plans, strict=True)
        ]
        prompts.append(replace(prompt, items=tuple(items)))
    return prompts


def _layer(dropper: LayerDropper, layer: int, hidden: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    output = dropper.language_model.layers[layer](hidden, **given)
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
