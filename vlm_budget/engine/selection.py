"""From what the vision tower showed to which tokens stay: one selection per prompt pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import LayoutError, PlanError
from ..layout import Modality, VisualItem, group_rows
from ..plan import Plan
from ..precision import exactly
from ..pruner import Attention, Context, Pruner, Selection, unprojected
from ..transfer import moved
from .precision import as_the_model

Project = Callable[[torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class Observation:
    """What one call of the vision encoder showed.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        items: Layout of every encoded item, in placeholder order over the batch.
        features: Per item [n, D], as the language model gets them.
        attention: Per need, per item, one [T] tensor per partition; [T, C] for keys.
        hidden: Per item [n, C], what the projector was given for every token, zeros for separators; None for items
            whose tokens are not projected one by one. None as a whole where it was not wanted.
    """

    modality: Modality
    items: list[VisualItem]
    features: list[torch.Tensor]
    attention: Mapping[Attention, Sequence[Sequence[torch.Tensor]]]
    hidden: Sequence[torch.Tensor | None] | None = None

    def lacks(self, needs: Sequence[Attention], hidden: bool) -> bool:
        """Something that a method wants was not recorded.

        Args:
            needs: The scores it named.
            hidden: It wants the projector's inputs.
        """
        return any(need not in self.attention for need in needs) or (hidden and self.hidden is None)


_SEEN = "_vlm_budget_seen"


def tie_observation(output: Any, seen: Observation) -> None:
    """Tie scores to features: whoever passes these features to a later call gets their scores."""
    for features in (output, getattr(output, "pooler_output", None)):
        if isinstance(features, torch.Tensor) or hasattr(features, "pooler_output"):
            setattr(features, _SEEN, seen)


def tied_observations(kwargs: Mapping[str, Any]) -> dict[Modality, Observation]:
    """What was seen of the features that a call was given in place of pixels."""
    given = {"image": kwargs.get("image_hidden_states"), **(kwargs.get("mm_encoder_outputs") or {})}
    return {modality: getattr(features, _SEEN) for modality, features in given.items() if hasattr(features, _SEEN)}


@dataclass(frozen=True, eq=False)
class Seen:
    """One item with what was observed of it; see :class:`vlm_budget.pruner.Context`."""

    item: VisualItem
    features: torch.Tensor
    attention: Mapping[Attention, Sequence[torch.Tensor]]
    hidden: torch.Tensor | None = None
    project: Project = unprojected


@dataclass(frozen=True, eq=False)
class PromptText:
    """The instruction of one prompt: the text behind its last image or video, all its text where none is behind.

    Attributes:
        embeds: [t, D] input embeddings.
        ids: [t] int64 token ids.
    """

    embeds: torch.Tensor
    ids: torch.Tensor


def seen_rows(
    observations: Sequence[Observation],
    counts: Mapping[Modality, Sequence[int]],
    needs: Sequence[Attention],
    project: Project | None = None,
) -> list[list[Seen]]:
    """Hand observed items to the prompts they stand in: per prompt, images first, then videos.

    Args:
        observations: At most one per modality.
        counts: Per modality, the visual tokens of every prompt.
        needs: The scores the method named, in its order; others are left out.
        project: [k, C] projector inputs to [k, D] features, where the method wants the former; None where not.

    Raises:
        LayoutError: Placeholders and encoded items do not agree.
    """
    rows: list[list[Seen]] = [[] for _ in next(iter(counts.values()))]
    for seen in observations:
        grouped = group_rows(seen.items, counts[seen.modality])
        if grouped is None:
            raise LayoutError(
                f"the prompts hold {list(counts[seen.modality])} {seen.modality} tokens, the encoder produced items of "
                f"{[item.size for item in seen.items]}: they do not fit together. Pass pixel inputs and prompts made "
                "by one processor call, and features encoded by this patched model."
            )
        index = 0
        for row, items in zip(rows, grouped, strict=True):
            for item in items:
                attention = {need: seen.attention[need][index] for need in needs}
                row.append(Seen(item, seen.features[index], attention, *_projected(seen, index, project)))
                index += 1
    return rows


def _projected(seen: Observation, index: int, project: Project | None) -> tuple[torch.Tensor | None, Project]:
    """What a method gets as ``hidden`` and ``project``."""
    if project is None or seen.hidden is None:
        return None, unprojected
    hidden = seen.hidden[index]
    if hidden is None:
        return seen.features[index], unprojected
    return hidden, as_the_model(lambda rows: project(rows.to(hidden)), hidden.device)


@dataclass(eq=False)
class PromptSelection:
    """Which visual tokens stay, for a batch of prompts, and how far they have been consumed.

    Attributes:
        plan: The promised counts.
        keep: Per modality, [R, V] bool over the prompt's visual tokens of that modality in order.
        values: Per modality, [R, V, D] replacement embeddings and [R, V] bool where they apply; absent if none merge.
        kept: [items] int64, kept counts in plan order, for the check against the plan.
        consumed: Per modality, [B] int64 visual tokens that earlier chunks of a chunked prefill have taken.
    """

    plan: Plan
    keep: dict[Modality, torch.Tensor]
    values: dict[Modality, tuple[torch.Tensor, torch.Tensor]]
    kept: torch.Tensor
    consumed: dict[Modality, torch.Tensor] = field(default_factory=dict)

    @property
    def keeps_all(self) -> bool:
        """Nothing is dropped, so the original call can run untouched."""
        return self.plan.keep == self.plan.total and not self.values

    def row_tokens(self) -> tuple[list[int], list[int]]:
        """Per prompt, the visual tokens that the plan keeps, and those before."""
        kept, total = [0] * self.plan.rows, [0] * self.plan.rows
        for item in self.plan.items:
            kept[item.row] += item.keep
            total[item.row] += item.total
        return kept, total

    def columns(self, modality: Modality, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the next visual columns stand in their prompt's selection.

        Args:
            modality: Which placeholders.
            mask: [B, L] bool, their columns in this call; B is a multiple of R (beams, return sequences).

        Returns:
            [B, 1] prompt rows and [B, L] positions, for indexing ``keep`` and ``values`` (meaningless off ``mask``).
        """
        table = self.keep[modality]
        batch, prompts = mask.shape[0], table.shape[0]
        if batch % prompts:
            raise LayoutError(f"{prompts} prompts were encoded, but the language model got {batch} rows")
        done = self.consumed.get(modality, torch.zeros(batch, dtype=torch.long, device=mask.device))
        position = (mask.cumsum(1) - 1 + done[:, None]).clamp(0, table.shape[1] - 1)
        self.consumed[modality] = done + mask.sum(1)
        prompt = torch.arange(batch, device=mask.device) // (batch // prompts)
        return prompt[:, None], position

    def rewind(self) -> None:
        """Start over: the same features are used for another prefill."""
        self.consumed.clear()


def select(
    pruner: Pruner | None,
    plan: Plan,
    rows: Sequence[Sequence[Seen]],
    device: torch.device,
    texts: Sequence[PromptText] | None = None,
) -> PromptSelection:
    """Ask the method about every item.

    Args:
        pruner: The method; None where the plan keeps all that enters the language model.
        plan: Promised counts for these rows.
        rows: Observed items per prompt.
        device: Where the language model's embeddings live.
        texts: The instruction of every prompt, for methods that read it; None where it is not known.

    Raises:
        SelectionError: The method broke its promise.
        LayoutError: The method reads the instruction, and it is not known or empty.
        PlanError: Tokens are to be dropped before the language model, and no method acts there.
    """
    counts = plan.row_counts([[seen.item.size for seen in row] for row in rows])
    flags: dict[Modality, list[list[torch.Tensor]]] = {}
    merged: dict[Modality, list[list[Selection | None]]] = {}
    kept = []
    for modality in ("image", "video"):
        flags[modality], merged[modality] = [[] for _ in rows], [[] for _ in rows]
    for index, (row, row_counts) in enumerate(zip(rows, counts, strict=True)):
        for order, (seen, count) in enumerate(zip(row, row_counts, strict=True)):
            chosen = _select_item(pruner, seen, order, count, texts[index] if texts is not None else None)
            flag = torch.ones(seen.item.size, dtype=torch.bool, device=device)
            if chosen is not None:
                flag = flag.zero_().index_fill_(0, moved(chosen.keep, device), True)
            flags[seen.item.modality][index].append(flag)
            merged[seen.item.modality][index].append(chosen)
            kept.append(flag.sum())
    keep: dict[Modality, torch.Tensor] = {}
    replaced: dict[Modality, tuple[torch.Tensor, torch.Tensor]] = {}
    for modality, per_row in flags.items():
        if any(per_row):
            keep[modality] = _pad(
                [torch.cat(row) if row else torch.zeros(0, dtype=torch.bool, device=device) for row in per_row]
            )
            if any(chosen is not None and chosen.values is not None for row in merged[modality] for chosen in row):
                replaced[modality] = _overlay(per_row, merged[modality], keep[modality])
    return PromptSelection(plan, keep, replaced, torch.stack(kept))


def _select_item(
    pruner: Pruner | None, seen: Seen, order: int, count: int, text: PromptText | None
) -> Selection | None:
    """What the method chooses of an item; None where all of it stays."""
    item = seen.item
    if count == item.size:  # keeping all is not a question to ask: the unpatched model is the answer
        return None
    if pruner is None:
        raise PlanError(
            f"the plan keeps {count} of {item.size} {item.modality} tokens before the language model, where no method "
            "acts. Name one, such as ['hired', 'fastv'], or make a plan for this method."
        )
    device = seen.features.device
    with exactly(device):
        return pruner.select(_context(pruner, seen, order, text, device), count)


def _context(pruner: Pruner, seen: Seen, order: int, text: PromptText | None, device: torch.device) -> Context:
    known = Context(seen.item, seen.attention, seen.features, order, device)
    if pruner.wants_hidden:
        assert seen.hidden is not None, "the observation was checked"
        known = replace(known, hidden=seen.hidden, project=seen.project)
    if not pruner.reads_text:
        return known
    if text is None:
        raise LayoutError(
            f"{pruner} ranks by the prompt's text, which this call does not show: it has no input_ids, or is one chunk "
            "of a prompt. Pass input_ids, and prefill in one piece or through generate."
        )
    if not len(text.ids):
        raise LayoutError(f"{pruner} ranks by the prompt's text, and the prompt has none. Add an instruction.")
    return replace(known, text=moved(text.embeds, device), text_ids=moved(text.ids, device))


def _pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _overlay(
    flags: Sequence[Sequence[torch.Tensor]], chosen: Sequence[Sequence[Selection | None]], keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    some = next(s.values for row in chosen for s in row if s is not None and s.values is not None)
    table = torch.zeros(*keep.shape, some.shape[-1], dtype=some.dtype, device=keep.device)
    where = torch.zeros_like(keep)
    for index, (row_flags, row_chosen) in enumerate(zip(flags, chosen, strict=True)):
        start = 0
        for flag, selection in zip(row_flags, row_chosen, strict=True):
            stop = start + len(flag)
            if selection is not None and selection.values is not None:
                mine = moved(selection.keep, table.device)
                table[index, start:stop].index_copy_(0, mine, moved(selection.values, table.device).to(table.dtype))
                where[index, start:stop] = flag
            start = stop
    return table, where
