"""The reference every patched model is held against: it shares no code with the engine.

What the *unpatched* model hands to its language model is recorded. A prompt is then compacted by hand, one row at a
time, without padding: the embeddings, positions, masks and deepstack features of the kept columns. The inner language
model runs on them directly, with no cache, once per generated token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tiny_parts import IMAGE, VIDEO

Calls = list[dict[str, Any]]


def language_model(model: Any) -> nn.Module:
    """The decoder inside a ``...ForConditionalGeneration`` model."""
    return model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model


@contextmanager
def recorded(module: nn.Module) -> Iterator[Calls]:
    """The keyword arguments of every call of a module, as the last pre-hook left them."""
    calls: Calls = []
    hook = module.register_forward_pre_hook(lambda _module, _args, kwargs: calls.append(dict(kwargs)), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def language_model_calls(model: Any, inputs: dict[str, Any], **options: Any) -> Calls:
    """What one forward hands to the language model."""
    with recorded(language_model(model)) as calls, torch.no_grad():
        model(**inputs, **options)
    return calls


@dataclass(frozen=True)
class Row:
    """One prompt without padding, as the language model would see it alone.

    Attributes:
        model: The outer model.
        embeds: [n, D].
        positions: [n], or [3, n] with M-RoPE.
        following: Position of the token after the row, in the caller's numbering.
        visual: [n] bool.
        masks: Per layer type [n, n] bool, "the row may see the column"; None where plain causal attention is meant.
        deepstack: Per level [visual tokens, D] that are added to visual columns; empty for most models.
    """

    model: Any
    embeds: torch.Tensor
    positions: torch.Tensor
    following: int
    visual: torch.Tensor
    masks: dict[str, torch.Tensor] | None = None
    deepstack: tuple[torch.Tensor, ...] = ()

    @property
    def length(self) -> int:
        """n."""
        return len(self.embeds)

    @property
    def multi_axis(self) -> bool:
        """Positions have several axes."""
        return self.positions.ndim == 2

    def compact(self, columns: Sequence[int], packed: bool) -> Row:
        """The row with only these columns; packed positions have no gaps, the others stay what they were."""
        index = torch.tensor(list(columns))
        positions, following = self.positions[..., index], self.following
        if packed:
            first = int(self.positions.min())
            positions, following = first + torch.arange(len(index)), first + len(index)
        masks = self.masks
        if masks is not None:
            masks = {kind: mask[index][:, index] for kind, mask in masks.items()}
        among_visual = self.visual.cumsum(0) - 1
        features = among_visual[index[self.visual[index]]]
        return replace(
            self,
            embeds=self.embeds[index],
            positions=positions,
            following=following,
            visual=self.visual[index],
            masks=masks,
            deepstack=tuple(level[features] for level in self.deepstack),
        )

    def then(self, tokens: Sequence[int]) -> Row:
        """The row followed by text."""
        ids = torch.tensor(list(tokens), dtype=torch.long)
        with torch.no_grad():
            embeds = self.model.get_input_embeddings()(ids)
        positions = (self.following + torch.arange(len(ids))).expand(*self.positions.shape[:-1], -1)
        total = self.length + len(ids)
        masks = self.masks
        if masks is not None:
            grown = {}
            for kind, mask in masks.items():
                grown[kind] = torch.ones(total, total, dtype=torch.bool).tril()
                grown[kind][: self.length, : self.length] = mask
            masks = grown
        return replace(
            self,
            embeds=torch.cat([self.embeds, embeds]),
            positions=torch.cat([self.positions, positions], -1),
            following=self.following + len(ids),
            visual=torch.cat([self.visual, torch.zeros(len(ids), dtype=torch.bool)]),
            masks=masks,
        )

    @torch.no_grad()
    def hidden(self) -> torch.Tensor:
        """[n, D] last hidden states."""
        return self._hidden()

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """[n, V] float32."""
        return self.graph()

    def graph(self) -> torch.Tensor:
        """The logits, with gradients to the language model's weights."""
        return self.model.lm_head(self._hidden()).float()

    def _hidden(self) -> torch.Tensor:
        ones = torch.ones(1, self.length, dtype=torch.long)
        mask: Any = ones
        if self.masks is not None:
            square = {kind: mask[None, None] for kind, mask in self.masks.items()}
            mask = square if len(square) > 1 else next(iter(square.values()))
        extra = {}
        if self.deepstack:
            extra = {"visual_pos_masks": self.visual[None], "deepstack_visual_embeds": list(self.deepstack)}
        output = language_model(self.model)(
            inputs_embeds=self.embeds[None],
            position_ids=self.positions[..., None, :],
            attention_mask=mask,
            use_cache=False,
            **extra,
        )
        return output.last_hidden_state[0]


def rows(model: Any, inputs: dict[str, Any]) -> list[Row]:
    """The prompts of a batch, recorded from the unpatched model.

    Positions are counted here (tokens before, padding left out), except with M-RoPE, where they are the model's.
    """
    call = language_model_calls(model, inputs)[0]
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    visual = torch.isin(ids, torch.tensor(placeholders(model)))
    found = [_row(model, call, row, valid[row], visual) for row in range(len(ids))]
    if not found[0].multi_axis:
        return found
    # A video's temporal positions may pass those of the text behind it, and transformers generations disagree on what
    # comes next then: ask.
    with recorded(language_model(model)) as calls, torch.no_grad():
        prompt = {name: value for name, value in inputs.items() if name != "labels"}
        model.generate(**prompt, max_new_tokens=2, do_sample=False)
    return [replace(row, following=int(calls[1]["position_ids"][-1, index, 0])) for index, row in enumerate(found)]


def placeholders(model: Any) -> list[int]:
    """Ids of placeholder tokens, under the names of either transformers generation."""
    names = [f"{kind}_token_{suffix}" for kind in ("image", "video") for suffix in ("id", "index")]
    return sorted({getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None})


def _row(model: Any, call: dict[str, Any], row: int, valid: torch.Tensor, visual: torch.Tensor) -> Row:
    given = call.get("position_ids")
    positions = torch.arange(int(valid.sum()))
    if given is not None and given.ndim == 3:
        positions = given[-3:, row][:, valid]  # 5.x puts the text's own positions on top
    features: tuple[torch.Tensor, ...] = ()
    if call.get("deepstack_visual_embeds") is not None:
        mine = torch.arange(len(visual))[:, None].expand_as(visual)[visual] == row
        features = tuple(level[mine] for level in call["deepstack_visual_embeds"])
    return Row(
        model,
        call["inputs_embeds"][row][valid],
        positions,
        int(positions.max()) + 1,
        visual[row][valid],
        _squares(call.get("attention_mask"), row, valid),
        features,
    )


def _squares(mask: Any, row: int, valid: torch.Tensor) -> dict[str, torch.Tensor] | None:
    by_kind = mask if isinstance(mask, dict) else {"full_attention": mask}
    found = {}
    for kind, square in by_kind.items():
        if square is None or square.ndim != 4:
            return None
        flags = square if square.dtype == torch.bool else square == 0
        flags = flags[row if len(flags) > 1 else 0, 0, : len(valid), : len(valid)]
        found[kind] = flags[valid][:, valid]
    return found


def greedy(row: Row, count: int, penalty: float = 1.0, seen: Sequence[int] = ()) -> list[int]:
    """Greedy decoding, the whole sequence again for every token.

    Args:
        row: The compacted prompt.
        count: Tokens to generate; placeholders of no kind are ever among them, as in ``patched.SAMPLE``.
        penalty: Repetition penalty.
        seen: Token ids the penalty counts as seen, those of the caller's prompt.
    """
    tokens: list[int] = []
    for _ in range(count):
        logits = row.then(tokens).logits()[-1]
        if penalty != 1.0:
            known = torch.tensor(sorted({*seen, *tokens}))
            logits[known] = torch.where(logits[known] < 0, logits[known] * penalty, logits[known] / penalty)
        logits[[IMAGE, VIDEO]] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens


def step_logits(row: Row, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, V] logits from which each of these tokens was drawn."""
    return row.then(tokens[:-1]).logits()[row.length - 1 :]


def kept_columns(row: Row, embeds: torch.Tensor) -> list[int]:
    """Which columns a shortened sequence consists of, found by its embeddings alone.

    Equal vectors (newlines) are told apart by order. Fails where the sequence is not a subsequence of the row.
    """
    columns, start = [], 0
    for vector in embeds:
        hits = (row.embeds[start:] == vector).all(-1).nonzero().flatten()
        assert len(hits), f"column {len(columns)} of the shortened sequence is not among the columns after {start}"
        start += int(hits[0]) + 1
        columns.append(start - 1)
    return columns


def physical_rows(call: dict[str, Any], lengths: Sequence[int], right: bool = False) -> list[torch.Tensor]:
    """[k, D] embeddings of each row of a recorded call, its padding cut off, given the lengths."""
    embeds = call["inputs_embeds"]
    return [part[:n] if right else part[len(part) - n :] for part, n in zip(embeds, lengths, strict=True)]
