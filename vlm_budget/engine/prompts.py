"""What is known of the prompts of one call: a ``generate``, which may prefill in chunks, or a single forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..allocate import split
from ..errors import PatchError
from ..layout import Modality, VisualLayout
from ..plan import Plan
from ..pruner import moved
from .candidates import ItemTokens, PromptTokens, first
from .reading import RowCounts
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
        padding_known: There is a mask, or there is no padding.
        counts: Of their tokens, once read.
    """

    ids: torch.Tensor | None
    mask: torch.Tensor | None
    cached: int
    length: int
    rows: int
    padding_known: bool = False
    counts: RowCounts | None = None

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
        last = _last(mask, fresh.shape[1])
        # Without a mask ``generate`` makes one of its own.
        return cls(fresh, last, cached, cached + fresh.shape[1], len(ids), last is not None)

    @classmethod
    def of_forward(cls, kwargs: Mapping[str, Any], cached: int) -> Prompts:
        """What the model's forward was called with."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        given = ids if ids is not None else kwargs.get("inputs_embeds")
        if given is None:
            return cls(None, None, cached, cached, 0)
        length = given.shape[1]
        last = _last(mask, length)
        return cls(ids, last, cached, cached + length, len(given), last is not None or mask is None)

    def to_read(self, tokens: Mapping[Modality, int], given: Iterable[Modality]) -> dict[str, torch.Tensor]:
        """What :meth:`counted` wants on the host, by name; nothing without token ids.

        Args:
            tokens: Placeholder per modality.
            given: The modalities that the call brings features of.
        """
        if self.ids is None:
            return {}
        valid = self._valid(self.ids)
        visual = {modality: self.ids == token for modality, token in tokens.items()}
        everything, mine = _any(visual, tokens, valid), _any(visual, given, valid)
        text = valid & ~everything
        return {
            **{modality: mask.sum(1) for modality, mask in visual.items()},
            "text": text.sum(1),
            "instruction": instruction(everything, valid).sum(1),
            "behind": text_behind(mine, valid).sum(1),
            "tokens": valid.sum(1),
            "hidden": (mine & ~valid).sum(1),
            "last": valid[:, -1],
        }

    def counted(
        self, tokens: Iterable[Modality], given: Iterable[Modality], numbers: Mapping[str, torch.Tensor]
    ) -> Prompts:
        """The prompts with what was read of them.

        Args:
            tokens: The modalities that have placeholders.
            given: Those that the call brings features of.
            numbers: What :meth:`to_read` wanted.
        """
        if not numbers:
            return self
        found = {name: tensor.tolist() for name, tensor in numbers.items()}
        # Placeholders that the mask hides may be kept or not, so that a row's length cannot be told from their number.
        known = self.padding_known and not any(found["hidden"])
        counts = RowCounts(
            visual={modality: found[modality] for modality in tokens},
            given=frozenset(given),
            text=found["text"],
            instruction=found["instruction"],
            behind=found["behind"],
            tokens=found["tokens"] if known else None,
            right_padded=not all(found["last"]),
        )
        return replace(self, counts=counts)

    def extra(self, past: int, length: int) -> int:
        """Columns of a language model's call, of ``length`` behind ``past``, that come after the prompts."""
        return max(0, past + length - self.length) if self.length else 0

    def require_whole(self, past: int, length: int) -> None:
        """Refuse one chunk of a prompt.

        Raises:
            PatchError: The language model's call does not hold the prompts as a whole.
        """
        if not self._whole(past, length):
            raise PatchError(
                f"columns {past} to {past + length - 1} of a prompt of {self.length} reached the language model as a "
                "chunk of their own, and dropping tokens inside it needs the whole prompt at once. Pass "
                "prefill_chunk_size=None."
            )

    def texts(self, tokens: Mapping[Modality, int], embedding: nn.Module) -> list[PromptText] | None:
        """The instruction of every prompt; None without token ids."""
        if self.ids is None:
            return None
        assert self.counts is not None, "counted as soon as there are ids"
        valid = self._valid(self.ids)
        flags = instruction(_any({m: self.ids == token for m, token in tokens.items()}, tokens, valid), valid)
        rows = zip(self.ids, flags, self.counts.instruction, strict=True)
        mine = [ids[first(behind, count)] for ids, behind, count in rows]
        with torch.no_grad():
            return [PromptText(embedding(ids), ids) for ids in mine]

    def lengths(self, call: CallShape, kept: Sequence[int], visual: Sequence[int]) -> Rows | None:
        """The rows of a language model's call behind the drop, without asking the device.

        Args:
            call: What the language model was given.
            kept: Visual tokens that enter it, per prompt; prompts may be more or fewer than here (beams, copies).
            visual: Visual tokens before, the same way.

        Returns:
            None where that is not known: for one chunk of a prompt, embeddings without ids, padding that the call does
            not show.
        """
        counts, batch = self.counts, call.batch
        if counts is None or counts.tokens is None or counts.given != call.given:
            return None
        if not self._whole(call.past, call.length) or batch % self.rows or batch % len(kept):
            return None
        extra = self.extra(call.past, call.length)
        lengths, entering, behind = [], [], []
        for row in range(batch):
            mine, its = row * self.rows // batch, row * len(kept) // batch
            before = sum(counts.visual[modality][mine] for modality in counts.given)
            if before != visual[its]:
                return None
            lengths.append(counts.tokens[mine] - before + kept[its] + extra)
            entering.append(kept[its])
            behind.append(counts.behind[mine])
        # What comes behind the prompts stands on the right of any padding there.
        return Rows(lengths, entering, behind, extra, counts.right_padded and not extra, max(1, *lengths))

    def _whole(self, past: int, length: int) -> bool:
        return not self.length or (past == self.cached and past + length >= self.length)

    def _valid(self, ids: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return moved(self.mask, ids.device).expand(len(ids), -1)


@dataclass(frozen=True)
class CallShape:
    """What a call of the language model holds.

    Attributes:
        batch: Rows.
        past: Columns in the cache before.
        length: Its columns.
        given: The modalities of its visual columns.
    """

    batch: int
    past: int
    length: int
    given: frozenset[Modality]


def placeholders(token: int, inputs: Mapping[str, Any], base: nn.Module) -> torch.Tensor:
    """[B, L] bool, the columns of a placeholder token in what a model is called with: ids, else embeddings."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is not None:
        return ids == token
    assert embeds is not None, "transformers asks for the one or the other"
    embedding: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
    vector = embedding(torch.full((), token, device=embeds.device))
    return (embeds == vector).all(-1)


def _any(visual: Mapping[Modality, torch.Tensor], names: Iterable[Modality], like: torch.Tensor) -> torch.Tensor:
    """[B, L] bool, placeholders of some modalities."""
    return torch.stack([torch.zeros_like(like), *(visual[name] for name in names)]).any(0)


def instruction(visual: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, L] bool, the text behind a row's last visual column, all its text where there is none behind."""
    behind = text_behind(visual, valid)
    return torch.where(behind.any(1, keepdim=True), behind, valid & ~visual)


def text_behind(visual: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, L] bool, the text behind a row's last visual column."""
    columns = torch.arange(1, visual.shape[1] + 1, device=visual.device)
    last = (visual * columns).amax(1, keepdim=True)
    return valid & ~visual & (columns > last)


def _last(mask: Any, length: int) -> torch.Tensor | None:
    """The last columns of a 2-D mask."""
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        return mask[:, mask.shape[1] - length :].bool()
    return None


@dataclass(frozen=True)
class Rows:
    """The rows of a shortened call, on the host.

    Attributes:
        lengths: [B] tokens per row.
        visual: [B] of these, the visual ones.
        behind: [B] of these, the text behind the last visual token and before ``extra``; 0 where none is.
        extra: Tokens behind the prompts.
        right_padded: On which side rows are padded.
        slots: The longest row's tokens, at least 1.
    """

    lengths: list[int]
    visual: list[int]
    behind: list[int]
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
    entering = _entering(selection)
    found = []
    for index, items in enumerate(layout.rows):
        row = index * copies
        length = rows.lengths[row] - rows.extra
        start = 0 if rows.right_padded else rows.slots - rows.lengths[row]
        flags = {modality: mask[row, start : start + length] for modality, mask in visual.items()}
        own = entering[index * (selection.plan.rows // plan.rows)]
        steps = _steps(plan, index, own)
        kept: list[ItemTokens] = []
        done: dict[Modality, tuple[int, int]] = {}
        for item, count, left in zip(items, own, steps, strict=True):
            begin, before = done.get(item.modality, (0, 0))
            done[item.modality] = (begin + item.size, before + count)
            table = selection.keep[item.modality]
            mine = table[index * (len(table) // plan.rows), begin : begin + item.size]
            columns = first(flags[item.modality], before + count)[before:]
            kept.append(ItemTokens(item, left, first(mine, count), columns))
        any_visual = torch.stack(list(flags.values())).any(0)
        text = first(~any_visual, length - sum(len(item.alive) for item in kept))
        behind = rows.behind[row]
        asked = text[len(text) - behind :] if behind else text
        found.append(PromptTokens(tuple(kept), text, asked, length, rows.extra, behind))
    return found


def _entering(selection: PromptSelection) -> list[list[int]]:
    """Per row of the selection, per item, tokens that enter the language model."""
    rows: list[list[int]] = [[] for _ in range(selection.plan.rows)]
    for item, count in zip(selection.plan.items, selection.entering(), strict=True):
        rows[item.row].append(count)
    return rows


def _steps(plan: Plan, row: int, entering: Sequence[int]) -> list[dict[int, int]]:
    """Per item of a prompt, the tokens left from decoder layers on.

    Where the method before the language model has shared the tokens out by what it saw, every step is shared out anew,
    in proportion to what each item has left.
    """
    plans = [item for item in plan.items if item.row == row]
    if not plan.joint:
        return [dict(item.steps) for item in plans]
    left = list(entering)
    found: list[dict[int, int]] = [{} for _ in plans]
    for place, (layer, _) in enumerate(plans[0].steps if plans else ()):
        left = split(sum(item.steps[place][1] for item in plans), left, left)
        for mine, count in zip(found, left, strict=True):
            mine[layer] = count
    return found
