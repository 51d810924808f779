"""One call of the language model, layer by layer, while tokens are dropped or were dropped in an earlier call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..decoder import Captured
from ..pruner import moved
from .cache import CacheState, LayerGroup
from .candidates import Passed, PromptTokens, Scene, step
from .clock import Interval
from .compact import Compaction, compact, packed_positions, untouched
from .masks import layer_mask
from .probes import AttentionSink, ProbeStop, QueryKey
from .promises import Promises

if TYPE_CHECKING:
    from .layers import LayerDropper


@dataclass(frozen=True, eq=False)
class Entered:
    """What entered the language model: B rows of K slots behind P cached columns.

    Attributes:
        embeds: [B, K, D].
        positions: [..., 1 | B, K] position ids.
        valid: [B, K] bool, slots that hold a token.
        right_padded: On which side rows are padded.
        square: The outer model made the mask, which may show more than the past.
        past_valid: [B, P] bool, cached columns of layer 0 that hold a token.
        added: How many of them came after the last drop.
        groups: The layers whose caches hold fewer columns.
        prompts: The tokens of every prompt, from which more are dropped; empty where none are.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    right_padded: bool
    square: bool
    past_valid: torch.Tensor
    added: int
    groups: tuple[LayerGroup, ...]
    prompts: Sequence[PromptTokens] = ()

    @property
    def past(self) -> int:
        """P."""
        return self.past_valid.shape[1]


@dataclass(frozen=True, eq=False)
class Segment:
    """What decoder layers see, from one on to the next that sees something else.

    Attributes:
        layer: The first of them.
        new: The slots of the language model's call that are left.
        full: All of them hold a token, provided that layer 0 needed no mask.
        past: The group their caches belong to; None where they hold all cached columns.
    """

    layer: int
    new: Compaction
    full: bool
    past: LayerGroup | None


class DropRun:
    """Follows one call of the language model down its layers.

    Args:
        dropper: Whose hooks call.
        entered: What entered the language model.
    """

    def __init__(self, dropper: LayerDropper, entered: Entered) -> None:
        self.dropper = dropper
        self.entered = entered
        self.prompts = list(entered.prompts)
        self.steps = sorted({layer for prompt in self.prompts for item in prompt.items for layer in item.counts})
        self.segments: list[Segment] = []
        self.groups: list[LayerGroup] = []
        self.intervals: list[Interval] = []
        self.kept: list[tuple[int, list[PromptTokens]]] = []
        self._prepared: dict[str, Any] | None = None
        self._counted: list[tuple[torch.Tensor, int]] = []
        if dropper.pruner.scores == "previous":
            for layer in self.steps:
                if self._asks(layer):
                    self._sink(layer).start()

    @property
    def segment(self) -> Segment | None:
        """What the layers at hand see; None above the first that sees less than layer 0."""
        return self.segments[-1] if self.segments else None

    # --- at the layers ---------------------------------------------------------------------------------------------

    def before_layer(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The layer's arguments in its own columns; None, the untouched call, above the first drop."""
        hidden = args[0] if args else kwargs["hidden_states"]
        past = next((group for group in self.entered.groups if group.layer == layer), None)
        if past is not None:
            self._enter(replace(self._here(layer), past=past))
        if layer in self.steps:
            interval = Interval(hidden.device)
            hidden = self._drop(layer, module, hidden, kwargs)
            self.intervals.append(interval.stop())
        if self.segment is None:
            return None
        changed = self._arguments(kwargs, hidden)
        return ((hidden, *args[1:]), changed) if args else (args, {**changed, "hidden_states": hidden})

    def _here(self, layer: int) -> Segment:
        """The segment at hand, taken to begin at a layer."""
        if self.segment is not None:
            return replace(self.segment, layer=layer)
        return Segment(layer, untouched(self.entered.valid), True, None)

    def _enter(self, segment: Segment) -> None:
        if self.segments and self.segments[-1].layer == segment.layer:
            self.segments.pop()
        self.segments.append(segment)
        self._prepared = None

    def _drop(self, layer: int, module: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The hidden states of the tokens that go on."""
        scenes = self._scenes(layer, module, hidden, kwargs)
        before = [prompt.total for prompt in self.prompts]
        passed = [step(self.dropper.pruner, *pair) for pair in zip(self.prompts, scenes, strict=True)]
        self.prompts = [each.tokens for each in passed]
        self.kept.append((layer, self.prompts))
        after = [prompt.total for prompt in self.prompts]
        if after == before:
            return hidden
        slots = max(1, *after)
        keep = torch.zeros(len(passed), hidden.shape[1], dtype=torch.bool, device=hidden.device)
        for row, each in enumerate(passed):
            keep[row, self._span(before[row], hidden.shape[1])] = each.keep
        self._counted += [(flags.sum(), count) for flags, count in zip(keep, after, strict=True)]
        copies = len(hidden) // len(passed)
        taken = compact(keep.repeat_interleave(copies, 0), slots, self.entered.right_padded)
        here = self._here(layer)
        self._enter(replace(here, new=here.new.to(hidden.device).then(taken), full=min(after) == slots))
        return self._with_values(taken.take(hidden), passed, copies)

    def _with_values(self, hidden: torch.Tensor, passed: Sequence[Passed], copies: int) -> torch.Tensor:
        """Put in the hidden states that a method gave."""
        for row, each in enumerate(passed):
            start = self._span(each.tokens.total, hidden.shape[1]).start
            rows = slice(row * copies, (row + 1) * copies)
            for columns, values in each.values:
                hidden[rows, columns + start] = values.to(hidden)
        return hidden

    def _span(self, tokens: int, slots: int) -> slice:
        """Where a row's tokens stand among its slots."""
        return slice(0, tokens) if self.entered.right_padded else slice(slots - tokens, slots)

    # --- what methods see ------------------------------------------------------------------------------------------

    def _asks(self, layer: int) -> bool:
        return any(item.asks(layer) for prompt in self.prompts for item in prompt.items)

    def _sink(self, layer: int) -> AttentionSink:
        sink = self.dropper.sink(layer)
        assert sink is not None, "the method asked for scores"
        return sink

    def _scenes(self, layer: int, module: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]) -> list[Scene]:
        given = self._arguments(kwargs, hidden) if self.segment is not None else kwargs
        shown = self._queries_and_keys(layer, module, hidden, given) if self._asks(layer) else None
        embeds, copies = self.entered.embeds.to(hidden.device), len(hidden) // len(self.prompts)
        if self.segment is not None:
            embeds = self.segment.new.take(embeds)
        scenes = []
        for index, prompt in enumerate(self.prompts):
            row, span = index * copies, self._span(prompt.total, hidden.shape[1])
            span = slice(span.start, span.start + prompt.length)  # drafts behind the prompt stay out of sight
            captured = None if shown is None else self._captured(shown, given, row, span)
            norm = self.dropper.language_model.norm
            scenes.append(Scene(layer, hidden[row, span], embeds[row, span], norm, captured))
        return scenes

    def _queries_and_keys(
        self, layer: int, module: Any, hidden: torch.Tensor, given: dict[str, Any]
    ) -> QueryKey | None:
        if self.dropper.pruner.scores == "none":
            return None
        sink = self._sink(layer)
        if self.dropper.pruner.scores == "own":
            sink.start(stop=True)
            try:
                with torch.no_grad():
                    alone = {**given, "past_key_values": None, "use_cache": False}
                    module.self_attn(hidden_states=module.input_layernorm(hidden), **alone)
            except ProbeStop:
                pass
            except BaseException:
                sink.stop()
                raise
        shown: QueryKey = sink.stop()["qk"][-1]
        return shown

    def _captured(self, shown: QueryKey, given: dict[str, Any], row: int, span: slice) -> Captured:
        cached = shown.key.shape[2] - shown.query.shape[2]
        keys = slice(cached + span.start, cached + span.stop)
        rotary, visible = given.get("position_embeddings"), None
        cos = sin = None
        if rotary is not None and not self.dropper.family.mrope:
            cos, sin = (part[row if len(part) > 1 else 0, span] for part in rotary)
        if self.entered.square:
            mask = given["attention_mask"]
            offset = mask.shape[3] - shown.query.shape[2]
            square = mask[row if len(mask) > 1 else 0, 0, span, offset + span.start : offset + span.stop]
            visible = square if square.dtype == torch.bool else square == 0
        query, key = shown.query[row, :, span], shown.key[row, :, keys]
        return Captured(query, key, shown.scaling, visible, cos, sin)

    # --- arguments of a shortened layer ----------------------------------------------------------------------------

    def _arguments(self, kwargs: dict[str, Any], hidden: torch.Tensor) -> dict[str, Any]:
        """The keyword arguments of a layer in the columns of its segment, worked out once per segment."""
        if self._prepared is None:
            self._prepared = self._prepare(kwargs, hidden)
        return {**kwargs, **{name: value for name, value in self._prepared.items() if name in kwargs}}

    def _prepare(self, kwargs: dict[str, Any], hidden: torch.Tensor) -> dict[str, Any]:
        segment, device = self.segment, hidden.device
        assert segment is not None
        given = kwargs.get("attention_mask")
        full = segment.full and (segment.past is None or segment.past.full)
        positions, shift = self._positions(segment)
        index, valid = self._columns(segment)
        known = full and (given is None or not self.entered.past)
        self.groups = [group for group in self.groups if group.layer < segment.layer]
        self.groups.append(LayerGroup(segment.layer, valid, index, shift, known))
        rows, index, valid = segment.new.index.to(device), index.to(device), valid.to(device)
        backend = self.dropper.require_backend()
        changed: dict[str, Any] = {"attention_mask": layer_mask(given, rows, index, valid, full, backend, hidden.dtype)}
        rotary = kwargs.get("position_embeddings")
        if positions is not None:
            changed["position_embeddings"] = self.dropper.language_model.rotary_emb(hidden, positions.to(device))
        elif rotary is not None and self.prompts:
            changed["position_embeddings"] = tuple(_take_positions(part, rows) for part in rotary)
        if isinstance(kwargs.get("position_ids"), torch.Tensor) and self.prompts:
            # Only flash attention reads them here: gaps would look like several sequences packed into one.
            changed["position_ids"] = torch.arange(rows.shape[1], device=device)[None]
        if isinstance(kwargs.get("cache_position"), torch.Tensor):  # up to transformers 4.x
            changed["cache_position"] = torch.arange(index.shape[1] - rows.shape[1], index.shape[1], device=device)
        return changed

    def _columns(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, m] columns of layer 0 that the layers hold behind this call, and which hold a token."""
        entered, new = self.entered, segment.new
        device = new.index.device
        cached = torch.arange(entered.past, device=device).expand(len(new.index), -1)
        valid = entered.past_valid.to(device)
        if segment.past is not None:
            start = entered.past - entered.added
            cached = torch.cat([segment.past.index.to(device), cached[:, start:]], 1)
            valid = torch.cat([segment.past.valid.to(device), valid[:, start:]], 1)
        return torch.cat([cached, entered.past + new.index], 1), torch.cat([valid, new.valid], 1)

    def _positions(self, segment: Segment) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Position ids to be computed anew, if any, and [B] how far they lie below those of layer 0."""
        new = segment.new
        shift = torch.zeros(len(new.valid), dtype=torch.long, device=new.valid.device)
        if segment.past is not None:
            shift = segment.past.shift.to(shift.device)
        if self.dropper.positions == "original":
            return None, shift
        given = self.entered.positions.expand(len(new.valid), -1).to(shift.device)
        valid = self.entered.valid.to(shift.device)
        start = torch.where(valid, given, given.max() + 1).amin(1) - shift
        packed = packed_positions(new, start)
        # Equal where nothing was dropped; a row's last token tells how far apart they are now.
        return packed * new.valid, _highest(given, valid) - _highest(packed, new.valid)

    # --- behind the last layer -------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of what the probes hold."""
        for sink in self.dropper.sinks.values():
            sink.stop()

    def finish(self, output: Any, promises: Promises) -> None:
        """Bring the output back to the columns of the language model's call, in place.

        Args:
            output: Of the language model.
            promises: Where a token taken twice will be noticed.

        Raises:
            SelectionError: A method took a token twice, and the host knows.
        """
        if self._counted:
            there = self._counted[0][0].device
            kept = torch.stack([moved(count, there) for count, _ in self._counted])
            promised = [count for _, count in self._counted]
            promises.expect(kept, promised, f"{self.dropper.pruner} promised rows of")
        if not self.prompts or self.segment is None:
            return
        output.last_hidden_state = self.segment.new.grow(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self._grown(index, h) for index, h in enumerate(output.hidden_states))

    def _grown(self, index: int, hidden: Any) -> Any:
        """``hidden_states[i]`` is what layer ``i - 1`` gave, the last one behind the final norm."""
        segment = next((each for each in reversed(self.segments) if each.layer <= index - 1), None)
        if segment is None or hidden is None or hidden.shape[1] != segment.new.slots:
            return hidden
        return segment.new.grow(hidden)

    def state(self, before: CacheState, boundary: Compaction) -> CacheState:
        """The cache's state behind a prompt, the layers' own lengths included.

        Args:
            before: The state without them.
            boundary: From the caller's columns to the language model's.
        """
        if self.segment is None:
            return before
        gone = boundary.valid & ~self.segment.new.keep.to(boundary.valid.device)
        last = (gone * (boundary.index + 1)).max()
        tail = torch.where(last > 0, torch.minimum(before.tail, boundary.length - last), before.tail)
        return replace(before, tail=tail, groups=tuple(self.groups))


def _take_positions(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather [..., 1 | B, K, d] to [..., B, S, d]."""
    index = index.to(part.device)
    wide = part.expand(*part.shape[:-3], len(index), *part.shape[-2:])
    return wide.gather(-2, index[..., None].expand(*wide.shape[:-3], *index.shape, part.shape[-1]))


def _highest(positions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return torch.where(valid, positions, positions.min() - 1).amax(1)
