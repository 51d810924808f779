"""Watches one call of the vision encoder: the layout from its inputs, the scores from its attention, the features."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import PatchError
from ..families.base import Family
from ..layout import Modality, VisualItem
from ..pruner import Attention, Finer, Pruner
from .beside import NOTHING, ONCE, Beside, Repeated
from .clock import Interval
from .local import CallLocal
from .precision import as_the_model
from .probes import AttachedProbe, AttentionSink, attach
from .reading import Known, on_host
from .selection import Observation


class InputSink:
    """Collects what a module is given, per thread."""

    def __init__(self) -> None:
        self._local = CallLocal()

    def start(self) -> None:
        """Begin to collect on this thread."""
        self._local.inputs = []

    def stop(self) -> list[torch.Tensor]:
        """End collecting; the first argument of each call of the module, in call order."""
        inputs = getattr(self._local, "inputs", None)
        self._local.inputs = None
        return inputs or []

    @torch.compiler.disable
    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the module."""
        inputs = getattr(self._local, "inputs", None)
        if inputs is not None:
            inputs.append((args[0] if args else next(iter(kwargs.values()))).detach())


@dataclass(frozen=True)
class AttachedInput:
    """An input sink in place."""

    handle: RemovableHandle

    def detach(self) -> None:
        """Take the hook away."""
        self.handle.remove()


class Observer:
    """Holds the probes a method needs and turns an encoder call into an :class:`Observation`.

    Args:
        base: The model that holds the vision tower.
        family: What is known about its class.
        needs: Attention scores and keys to collect.
        hidden: Collect the projector's inputs, too.
        unpooled: Collect frames before they are pooled, too.

    Raises:
        PatchError: CLS attention is needed and the tower has no class token.
    """

    def __init__(
        self,
        base: nn.Module,
        family: Family,
        needs: tuple[Attention, ...],
        hidden: bool = False,
        unpooled: bool = False,
    ) -> None:
        self.base = base
        self.family = family
        self.needs = needs
        self.hidden = hidden
        self.unpooled = unpooled
        if any(need.kind in ("cls", "joint_cls") for need in needs) and not family.has_cls(base):
            raise PatchError(
                f"{type(base).__name__}'s vision tower has no class token, so there is no CLS attention to rank by. "
                "Ask for 'received' attention, or let vlm_budget.pruner.saliency choose."
            )
        kinds: dict[int, set[str]] = {}
        for need in needs:
            kinds.setdefault(need.layer, set()).add(need.kind)
        self.sinks = {layer: AttentionSink(tuple(sorted(wanted))) for layer, wanted in kinds.items()}  # type: ignore[arg-type]
        self.inputs, self.frames = InputSink(), InputSink()

    @classmethod
    def for_method(cls, base: nn.Module, family: Family, pruner: Pruner | None) -> Observer:
        """An observer of what a method looks at; of nothing for None."""
        if pruner is None:
            return cls(base, family, ())
        return cls(base, family, pruner.all_needs(family.tower(base)), pruner.wants_hidden, pruner.reads_unpooled)

    def attach(self) -> list[AttachedProbe | AttachedInput]:
        """Probe the layers, and the projector if its inputs are wanted; the caller owns the undoing."""
        probes: list[AttachedProbe | AttachedInput] = []
        try:
            for layer, probed in self.sinks.items():
                probes.append(attach(self.family.vision_attention(self.base, layer), probed))
            for sink, modules in ((self.inputs, self._projectors()), (self.frames, self._poolers())):
                for module in modules:
                    probes.append(AttachedInput(module.register_forward_pre_hook(sink.see, with_kwargs=True)))
        except BaseException:
            for probe in reversed(probes):
                probe.detach()
            raise
        return probes

    def _projectors(self) -> list[nn.Module]:
        """Those of all modalities, each once; none where their inputs are not wanted."""
        if not self.hidden:
            return []
        return _each_once([self.family.projector(self.base, modality) for modality in self.family.encoders])

    def _poolers(self) -> list[nn.Module]:
        """The modules that are given frames before they are pooled; none where these are not wanted."""
        if not self.unpooled:
            return []
        return _each_once([self.family.unpooled(self.base, modality) for modality in self.family.encoders])

    @property
    def project(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """[k, C] projector inputs to [k, D] features; None where the projector's inputs are not wanted."""
        return self._project if self.hidden else None

    @torch.no_grad()
    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        return self.family.project(self.base, rows)

    def probe_intervals(self) -> list[Interval]:
        """What the probes of the last observed call on this thread took."""
        return [interval for sink in self.sinks.values() for interval in sink.intervals]

    def observe(
        self,
        modality: Modality,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
        known: Known = (),
        beside: Beside = NOTHING,
        repeated: Repeated = ONCE,
    ) -> tuple[Any, Observation]:
        """Run the encoder and account for what it showed.

        Args:
            modality: Which encoder.
            call: It, as a bound method.
            args: Its arguments.
            kwargs: Same.
            known: What was read of them before.
            beside: What the user laid beside the prompts.
            repeated: How the prompts were repeated since.

        Raises:
            LayoutError: The features do not have the length the layout says, or what was laid beside belongs to other
                pictures or frames; the latter before the encoder runs.
        """
        inputs = on_host(self.family, modality, bound_arguments(call, args, kwargs), known)
        items = self.family.items(self.base, modality, inputs)
        laid = beside.laid(self.base, self.family, modality, items, repeated)
        for sink in self.sinks.values():
            sink.start()
        if self.hidden:
            self.inputs.start()
        if self.unpooled:
            self.frames.start()
        try:
            output = call(*args, **kwargs)
        finally:
            rows = {layer: sink.stop() for layer, sink in self.sinks.items()}
            given, frames = self.inputs.stop(), self.frames.stop()
        attention = {
            need: self.family.token_attention(
                self.base, modality, need.kind, rows[need.layer][need.kind], items, inputs
            )
            for need in self.needs
        }
        features = self.family.features(self.base, modality, output, items)
        hidden, finer = self._token_hidden(modality, given, items), self._finer(modality, frames, items)
        return output, Observation(modality, items, features, attention, hidden, finer, laid)

    def _token_hidden(
        self, modality: Modality, given: list[torch.Tensor], items: list[VisualItem]
    ) -> list[torch.Tensor | None] | None:
        if not self.hidden:
            return None
        if self.family.projector(self.base, modality) is None:
            return [None] * len(items)
        return self.family.token_hidden(self.base, given, items)

    def _finer(
        self, modality: Modality, given: list[torch.Tensor], items: list[VisualItem]
    ) -> list[Finer | None] | None:
        if not self.unpooled:
            return None
        if self.family.unpooled(self.base, modality) is None or not given:
            return [None] * len(items)
        rows = torch.cat(given)
        side, project = math.isqrt(rows.shape[1]), as_the_model(self._project, rows.device)
        parts = rows.split([len(item.partitions) for item in items])
        return [Finer(side, side, partial(_projected_frame, project, part)) for part in parts]


def _projected_frame(project: Callable[[torch.Tensor], torch.Tensor], frames: torch.Tensor, index: int) -> torch.Tensor:
    return project(frames[index])


def _each_once(modules: Sequence[nn.Module | None]) -> list[nn.Module]:
    return list({id(module): module for module in modules if module is not None}.values())


def bound_arguments(call: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by parameter name, extra keywords included."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
