"""Watches one call of the vision encoder: the layout from its inputs, the scores from its attention, the features."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import PatchError
from ..families.base import Family
from ..layout import Modality
from ..pruner import Attention
from .clock import Interval
from .probes import AttachedProbe, AttentionSink, attach
from .selection import Observation


class Observer:
    """Holds the probes a method needs and turns an encoder call into an :class:`Observation`.

    Args:
        base: The model that holds the vision tower.
        family: What is known about its class.
        needs: Attention scores to collect.

    Raises:
        PatchError: CLS attention is needed and the tower has no class token.
    """

    def __init__(self, base: nn.Module, family: Family, needs: tuple[Attention, ...]) -> None:
        self.base = base
        self.family = family
        self.needs = needs
        if any(need.kind == "cls" for need in needs) and not family.has_cls(base):
            raise PatchError(
                f"{type(base).__name__}'s vision tower has no class token, so there is no CLS attention to rank by. "
                "Ask for 'received' attention, or let vlm_budget.pruner.saliency choose."
            )
        kinds: dict[int, set[str]] = {}
        for need in needs:
            kinds.setdefault(need.layer, set()).add(need.kind)
        self.sinks = {layer: AttentionSink(tuple(sorted(wanted))) for layer, wanted in kinds.items()}  # type: ignore[arg-type]

    def attach(self) -> list[AttachedProbe]:
        """Probe the layers; the caller owns the undoing."""
        probes: list[AttachedProbe] = []
        try:
            for layer, sink in self.sinks.items():
                probes.append(attach(self.family.vision_attention(self.base, layer), sink))
        except BaseException:
            for probe in reversed(probes):
                probe.detach()
            raise
        return probes

    def probe_intervals(self) -> list[Interval]:
        """What the probes of the last observed call on this thread took."""
        return [interval for sink in self.sinks.values() for interval in sink.intervals]

    def observe(self, modality: Modality, call: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Observation]:
        """Run the encoder and account for what it showed.

        Raises:
            LayoutError: The features do not have the length the layout says.
        """
        inputs = bound_arguments(call, args, kwargs)
        items = self.family.items(self.base, modality, inputs)
        for sink in self.sinks.values():
            sink.start()
        try:
            output = call(*args, **kwargs)
        finally:
            rows = {layer: sink.stop() for layer, sink in self.sinks.items()}
        attention = {
            need: self.family.token_attention(
                self.base, modality, need.kind, rows[need.layer][need.kind], items, inputs
            )
            for need in self.needs
        }
        return output, Observation(modality, items, self.family.features(self.base, modality, output, items), attention)


def bound_arguments(call: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by parameter name, extra keywords included."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
