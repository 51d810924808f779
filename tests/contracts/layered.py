"""The reference for dropping inside the language model: one row, no padding, no cache, layer by layer by hand.

The decoder layers of the unpatched model are called one after the other on hidden states that are compacted by plain
indexing between them. Nothing is shared with the engine; which tokens stay is told by the patched model's handle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tiny_parts import FLOOR, IMAGE, VIDEO
from vlm_budget.report import KeptItem

from .reference import Row, language_model


@dataclass(frozen=True)
class Drop:
    """One step of one prompt.

    Attributes:
        layer: The first decoder layer that sees only what is left.
        columns: Columns of the row that are left, text included.
        values: Hidden states that replace those of some of these columns.
    """

    layer: int
    columns: list[int]
    values: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layered:
    """A prompt and what is dropped from it on its way down the layers.

    Attributes:
        row: The prompt as it enters the language model.
        drops: In the order of their layers.
        packed: Behind a drop, positions are numbered anew without gaps.
    """

    row: Row
    drops: tuple[Drop, ...]
    packed: bool = False

    @property
    def left(self) -> list[int]:
        """Columns that reach the end."""
        return self.drops[-1].columns if self.drops else list(range(self.row.length))

    def then(self, tokens: Sequence[int]) -> Layered:
        """The prompt followed by text, none of which is dropped."""
        new = list(range(self.row.length, self.row.length + len(tokens)))
        drops = tuple(replace(drop, columns=drop.columns + new) for drop in self.drops)
        return replace(self, row=self.row.then(tokens), drops=drops)

    def graph(self, watch: dict[int, torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Hidden states by hand: what enters layer 0, what every layer gives, the last behind the final norm.

        Args:
            watch: Gets the [H, n, n] attention map of every layer, if the model attends eagerly.
        """
        row, lm = self.row, language_model(self.row.model)
        hidden, here = row.embeds[None], list(range(row.length))
        if FLOOR and type(lm).__name__ == "GemmaModel":
            hidden = hidden * torch.tensor(lm.config.hidden_size**0.5)
        positions, drops, states = row.positions, {drop.layer: drop for drop in self.drops}, [hidden]
        for index, layer in enumerate(lm.layers):
            if index in drops:
                drop = drops[index]
                hidden = hidden[:, [here.index(column) for column in drop.columns]]
                here = drop.columns
                for column, value in drop.values.items():
                    hidden[0, here.index(column)] = value
                positions = row.positions[..., here]
                if self.packed:
                    positions = row.positions.min() + torch.arange(len(here))
            hidden = self._layer(layer, hidden, positions, here, index, watch)
            states.append(hidden)
        return [*states[:-1], lm.norm(hidden)]

    def _layer(
        self,
        layer: Any,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        here: list[int],
        index: int,
        watch: dict[int, torch.Tensor] | None,
    ) -> torch.Tensor:
        row, lm = self.row, language_model(self.row.model)
        square = torch.ones(row.length, row.length, dtype=torch.bool).tril()
        if row.masks is not None:
            square = row.masks["full_attention"]
        mask: Any = square[here][:, here][None, None]
        if lm.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        elif "flash" in lm.config._attn_implementation:
            mask = None
        maps: list[torch.Tensor] = []
        hook = layer.self_attn.register_forward_hook(lambda _module, _args, output: maps.append(output[1]))
        output = layer(
            hidden,
            attention_mask=mask,
            position_ids=None,
            past_key_values=None,
            position_embeddings=lm.rotary_emb(hidden, positions[..., None, :]),
        )
        hook.remove()
        if watch is not None:
            watch[index] = maps[0][0]
        hidden = output[0] if isinstance(output, tuple) else output
        if index < len(row.deepstack):
            hidden = hidden.clone()
            hidden[0, row.visual] += row.deepstack[index]
        return hidden

    @torch.no_grad()
    def hidden_states(self) -> list[torch.Tensor]:
        """Of every layer, see :meth:`graph`; only their own columns."""
        return [states[0] for states in self.graph()]

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """[n, V] float32 of the columns that reach the end."""
        return self.row.model.lm_head(self.graph()[-1][0]).float()

    @torch.no_grad()
    def attention(self) -> dict[int, torch.Tensor]:
        """Per layer, the [H, n, n] attention map of the columns it sees; the model must attend eagerly."""
        maps: dict[int, torch.Tensor] = {}
        self.graph(maps)
        return maps


def greedy(prompt: Layered, count: int) -> list[int]:
    """Greedy decoding, all layers again for every token; placeholders are never among them, as in ``SAMPLE``."""
    tokens: list[int] = []
    for _ in range(count):
        logits = prompt.then(tokens).logits()[-1]
        logits[[IMAGE, VIDEO]] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


def step_logits(prompt: Layered, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, V] logits from which each of these tokens was drawn."""
    return prompt.then(tokens[:-1]).logits()[-len(tokens) :]


Values = dict[tuple[int, int], tuple[list[int], torch.Tensor]]


def layered(
    full: Sequence[Row],
    kept: Sequence[KeptItem],
    vision_packed: bool,
    packed: bool,
    values: Sequence[Values] | None = None,
) -> list[Layered]:
    """The prompts with what a handle says was left of them at every step.

    Args:
        full: The unpruned prompts.
        kept: Of the handle.
        vision_packed: What enters the language model is numbered without gaps.
        packed: So is what is left behind every step.
        values: Per prompt, by layer and item: positions in the item, and [k, D] hidden states put in there.
    """
    found = []
    for index, row in enumerate(full):
        mine = [item for item in kept if item.row == index]
        entering = row_columns(row, [item.positions for item in mine], [item.item.size for item in mine])
        compact = row.compact(entering, vision_packed)
        drops = []
        for step, (layer, _) in enumerate(mine[0].steps if mine else ()):
            assert {item.steps[step][0] for item in mine} == {layer}
            left = row_columns(row, [item.steps[step][1] for item in mine], [item.item.size for item in mine])
            assert set(left) <= set(entering)
            put: dict[int, torch.Tensor] = {}
            for order, _ in enumerate(mine):
                positions, states = (values[index] if values else {}).get((layer, order), ([], None))
                for position, state in zip(positions, [] if states is None else states, strict=True):
                    column = int(row.visual.nonzero()[position + sum(item.item.size for item in mine[:order])])
                    put[entering.index(column)] = state
            drops.append(Drop(layer, [entering.index(column) for column in left], put))
        found.append(Layered(compact, tuple(drops), packed))
    return found


def row_columns(row: Row, positions: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    """Text columns and those of the visual tokens at these positions of the row's items."""
    visual, start = row.visual.nonzero().flatten(), 0
    columns = (~row.visual).nonzero().flatten().tolist()
    for mine, size in zip(positions, sizes, strict=True):
        columns += visual[torch.tensor(mine, dtype=torch.long) + start].tolist()
        start += size
    return sorted(columns)
