"""What is known of the prompts of one call: a ``generate``, which may prefill in chunks, or a single forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PatchError
from ..layout import Modality, VisualLayout
from ..plan import Plan
from .candidates import ItemTokens, PromptTokens, first
from .selection import PromptSelection, PromptText


@dataclass(frozen=True, eq=False)
class Prompts:
    """The text side of a batch of prompts, without what the cache holds already.

    Attributes:
        ids: [B, L] int64 token ids, None where embeddings were given instead.
        mask: [B, L] bool, columns that hold a token; None if unknown, which means all.
        cached: Columns in the cache before the call.
        length: Columns at the end of the prompts, cached ones included.
        rows: B, or 0 if unknown.
    """

    ids: torch.Tensor | None
    mask: torch.Tensor | None
    cached: int
    length: int
    rows: int

    @classmethod
    def of_generate(cls, args: Sequence[Any], kwargs: Mapping[str, Any], cached: int) -> Prompts:
        """What ``generate`` was called with."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if not (isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.numel()):
            embeds = kwargs.get("inputs_embeds")
            if not isinstance(embeds, torch.Tensor):
                return cls(None, None, cached, 0, 0)
            return cls(None, None, cached, embeds.shape[1], len(embeds))
        # A further turn may bring the whole conversation; what the cache holds is not read again. If it brings the new
        # tokens only, its mask is longer than they are.
        mask = kwargs.get("attention_mask")
        only_new = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] > ids.shape[1]
        fresh = ids if only_new or cached >= ids.shape[1] else ids[:, cached:]
        return cls(fresh, _last(mask, fresh.shape[1]), cached, cached + fresh.shape[1], len(ids))

    @classmethod
    def of_forward(cls, kwargs: Mapping[str, Any], cached: int) -> Prompts:
        """What the model's forward was called with."""
        ids = kwargs.get("input_ids")
        given = ids if ids is not None else kwargs.get("inputs_embeds")
        if given is None:
            return cls(None, None, cached, cached, 0)
        length = given.shape[1]
        return cls(ids, _last(kwargs.get("attention_mask"), length), cached, cached + length, len(given))

    def counts(self, tokens: Mapping[Modality, int]) -> dict[Modality, list[int]] | None:
        """Placeholders per prompt, by modality; None without token ids."""
        if self.ids is None:
            return None
        return {modality: (self.ids == token).sum(-1).tolist() for modality, token in tokens.items()}

    def extra(self, past: int, length: int) -> int:
        """Columns of a language model's call, of ``length`` behind ``past``, that come after the prompts."""
        return max(0, past + length - self.length) if self.length else 0

    def require_whole(self, past: int, length: int) -> None:
        """Refuse one chunk of a prompt.

        Raises:
            PatchError: The language model's call does not hold the prompts as a whole.
        """
        if self.length and (past != self.cached or past + length < self.length):
            raise PatchError(
                f"columns {past} to {past + length - 1} of a prompt of {self.length} reached the language model as a "
                "chunk of their own, and dropping tokens inside it needs the whole prompt at once. Pass "
                "prefill_chunk_size=None."
            )

    def texts(self, tokens: Mapping[Modality, int], embedding: nn.Module) -> list[PromptText] | None:
        """The instruction of every prompt; None without token ids."""
        if self.ids is None:
            return None
        visual = torch.isin(self.ids, torch.tensor(sorted(tokens.values()), device=self.ids.device))
        behind = instruction(visual, self._valid(self.ids))
        with torch.no_grad():
            return [PromptText(embedding(ids[flags]), ids[flags]) for ids, flags in zip(self.ids, behind, strict=True)]

    def text_counts(self, tokens: Mapping[Modality, int]) -> list[int]:
        """Text tokens of every prompt, cached ones left out; empty without token ids."""
        return [] if self.ids is None else text_counts(self.ids, self.mask, tokens)

    def _valid(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(ids, dtype=torch.bool) if self.mask is None else self.mask.to(ids.device)


def text_counts(ids: torch.Tensor, mask: torch.Tensor | None, tokens: Mapping[Modality, int]) -> list[int]:
    """Tokens per row of [B, L] ids that are neither padding nor placeholders."""
    text = ~torch.isin(ids, torch.tensor(sorted(tokens.values()), device=ids.device))
    if mask is not None:
        text &= mask.bool().to(ids.device)
    counts: list[int] = text.sum(1).tolist()
    return counts


def instruction(visual: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, L] bool, the text behind a row's last visual column, all its text where there is none behind."""
    columns = torch.arange(1, visual.shape[1] + 1, device=visual.device)
    last = (visual * columns).amax(1, keepdim=True)
    text = valid & ~visual
    behind = text & (columns > last)
    return torch.where(behind.any(1, keepdim=True), behind, text)


def _last(mask: Any, length: int) -> torch.Tensor | None:
    """The last columns of a 2-D mask."""
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        return mask[:, mask.shape[1] - length :].bool()
    return None


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a shortened call, on the host.

    Attributes:
        lengths: [B] tokens per row.
        instructions: [B] of these, the text behind the last visual token and before ``extra``; 0 where none is.
        extra: Tokens behind the prompts.
        right_padded: On which side rows are padded.
        slots: The longest row's tokens, at least 1.
    """

    lengths: list[int]
    instructions: list[int]
    extra: int
    right_padded: bool
    slots: int


def prompt_tokens(
    plan: Plan, layout: VisualLayout, selection: PromptSelection, visual: Mapping[Modality, torch.Tensor], rows: Rows
) -> list[PromptTokens]:
    """Where the tokens of every prompt stand as they enter the language model.

    Args:
        plan: Their counts, one row per prompt.
        layout: Their items, as in the plan.
        selection: What was kept of them before the language model.
        visual: Per modality, [B, K] bool slots that hold a visual token; B is a multiple of the prompts.
        rows: Of the call.
    """
    copies = len(rows.lengths) // plan.rows
    found = []
    for index, items in enumerate(layout.rows):
        row = index * copies
        length = rows.lengths[row] - rows.extra
        start = 0 if rows.right_padded else rows.slots - rows.lengths[row]
        flags = {modality: mask[row, start : start + length] for modality, mask in visual.items()}
        plans = [item for item in plan.items if item.row == index]
        kept: list[ItemTokens] = []
        done: dict[Modality, tuple[int, int]] = {}
        for item, counts in zip(items, plans, strict=True):
            begin, before = done.get(item.modality, (0, 0))
            done[item.modality] = (begin + item.size, before + counts.keep)
            table = selection.keep[item.modality]
            mine = table[index * (len(table) // plan.rows), begin : begin + item.size]
            columns = first(flags[item.modality], before + counts.keep)[before:]
            kept.append(ItemTokens(item, dict(counts.steps), first(mine, counts.keep), columns))
        any_visual = torch.stack(list(flags.values())).any(0)
        text = first(~any_visual, length - sum(len(item.alive) for item in kept))
        behind = rows.instructions[row]
        found.append(
            PromptTokens(tuple(kept), text, text[len(text) - behind :] if behind else text, length, rows.extra)
        )
    return found
