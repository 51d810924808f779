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
from ..pruner import Attention, Context, Finer, Pruner, Selection, unprojected
from ..transfer import moved
from .beside import Laid
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
        finer: Per item, its frames before they were pooled; None where they were not, and as a whole where it was not
            wanted.
        laid: What the user laid beside the items.
    """

    modality: Modality
    items: list[VisualItem]
    features: list[torch.Tensor]
    attention: Mapping[Attention, Sequence[Sequence[torch.Tensor]]]
    hidden: Sequence[torch.Tensor | None] | None = None
    finer: Sequence[Finer | None] | None = None
    laid: Laid = field(default_factory=Laid)

    def lacks(self, needs: Sequence[Attention], hidden: bool, unpooled: bool) -> bool:
        """Something that a method wants was not recorded.

        Args:
            needs: The scores it named.
            hidden: It wants the projector's inputs.
            unpooled: It wants frames before they are pooled.
        """
        missing = (hidden and self.hidden is None) or (unpooled and self.finer is None)
        return missing or any(need not in self.attention for need in needs)


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
    finer: Finer | None = None
    xyz: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    mrope: bool = False


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
    mrope: bool = False,
) -> list[list[Seen]]:
    """Hand observed items to the prompts they stand in: per prompt, images first, then videos.

    Args:
        observations: At most one per modality.
        counts: Per modality, the visual tokens of every prompt.
        needs: The scores the method named, in its order; others are left out.
        project: [k, C] projector inputs to [k, D] features, where the method wants the former; None where not.
        mrope: Positions have several axes.

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
                row.append(_seen(seen, index, item, needs, project, mrope))
                index += 1
    return rows


def _seen(
    seen: Observation, index: int, item: VisualItem, needs: Sequence[Attention], project: Project | None, mrope: bool
) -> Seen:
    hidden, onto = _projected(seen, index, project)
    return Seen(
        item=item,
        features=seen.features[index],
        attention={need: seen.attention[need][index] for need in needs},
        hidden=hidden,
        project=onto,
        finer=None if seen.finer is None else seen.finer[index],
        xyz=None if seen.laid.xyz is None else seen.laid.xyz[index],
        scores=None if seen.laid.scores is None else seen.laid.scores[index],
        mrope=mrope,
    )


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

    def promise(self) -> tuple[torch.Tensor, list[int]]:
        """What was kept and what was promised: per item, per prompt where the method shares its tokens out."""
        if not self.plan.joint:
            return self.kept, [item.keep for item in self.plan.items]
        return torch.stack([part.sum() for part in self.kept.split(self._items_per_row())]), [
            count for count, total in zip(*self.row_tokens(), strict=True) if total
        ]

    def entering(self) -> list[int]:
        """Per item in plan order, tokens that enter the language model; waits for the device where only it knows."""
        return self.kept.tolist() if self.plan.joint else [item.keep for item in self.plan.items]

    def _items_per_row(self) -> list[int]:
        """Items of every prompt that has any."""
        rows = [item.row for item in self.plan.items]
        return [rows.count(row) for row in dict.fromkeys(rows)]

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
    found: dict[Modality, list[list[Chosen]]] = {modality: [[] for _ in rows] for modality in ("image", "video")}
    kept = []
    for index, (row, row_counts) in enumerate(zip(rows, counts, strict=True)):
        choices = _select_row(pruner, row, row_counts, texts[index] if texts is not None else None)
        for seen, chosen in zip(row, choices, strict=True):
            flag = moved(chosen.flag, device)
            values = None if chosen.values is None else moved(chosen.values, device)
            found[seen.item.modality][index].append(Chosen(flag, values))
            kept.append(flag.sum())
    keep: dict[Modality, torch.Tensor] = {}
    replaced: dict[Modality, tuple[torch.Tensor, torch.Tensor]] = {}
    for modality, per_row in found.items():
        if any(per_row):
            empty = torch.zeros(0, dtype=torch.bool, device=device)
            keep[modality] = _pad([torch.cat([empty, *(one.flag for one in row)]) for row in per_row])
            if any(one.values is not None for row in per_row for one in row):
                replaced[modality] = _overlay(per_row)
    return PromptSelection(plan, keep, replaced, torch.stack(kept))


@dataclass(frozen=True, eq=False)
class Chosen:
    """What becomes of an item's tokens.

    Attributes:
        flag: [n] bool, which stay.
        values: [n, D] what replaces those that stay, anything elsewhere; None where they stay as they are.
    """

    flag: torch.Tensor
    values: torch.Tensor | None = None

    @classmethod
    def all_of(cls, seen: Seen) -> Chosen:
        """All of it stays."""
        return cls(torch.ones(seen.item.size, dtype=torch.bool, device=seen.features.device))

    @classmethod
    def of(cls, selection: Selection, size: int) -> Chosen:
        """A method's choice among ``size`` tokens."""
        keep, values = selection.keep, selection.values
        flag = torch.zeros(size, dtype=torch.bool, device=keep.device).index_fill_(0, keep, True)
        if values is None:
            return cls(flag)
        dense = torch.zeros(size, values.shape[-1], dtype=values.dtype, device=keep.device)
        return cls(flag, dense.index_copy_(0, keep, values.to(keep.device)))

    def split(self, sizes: list[int]) -> list[Chosen]:
        """Those of several items, laid end to end."""
        values = [None] * len(sizes) if self.values is None else self.values.split(sizes)
        return [Chosen(*parts) for parts in zip(self.flag.split(sizes), values, strict=True)]


def _select_row(
    pruner: Pruner | None, row: Sequence[Seen], counts: Sequence[int], text: PromptText | None
) -> list[Chosen]:
    """What the method chooses of a prompt's items. Where all stays it is not asked: that is the unpatched model."""
    if pruner is None or not pruner.joint:
        return [_select_item(pruner, *one, text) for one in zip(row, range(len(row)), counts, strict=True)]
    sizes = [seen.item.size for seen in row]
    if sum(counts) == sum(sizes):
        return [Chosen.all_of(seen) for seen in row]
    device = row[0].features.device
    with exactly(device):
        contexts = [_context(pruner, seen, order, text, device) for order, seen in enumerate(row)]
        return Chosen.of(pruner.select_prompt(contexts, sum(counts)), sum(sizes)).split(sizes)


def _select_item(pruner: Pruner | None, seen: Seen, order: int, count: int, text: PromptText | None) -> Chosen:
    item = seen.item
    if count == item.size:
        return Chosen.all_of(seen)
    if pruner is None:
        raise PlanError(
            f"the plan keeps {count} of {item.size} {item.modality} tokens before the language model, where no method "
            "acts. Name one, such as ['hired', 'fastv'], or make a plan for this method."
        )
    device = seen.features.device
    with exactly(device):
        return Chosen.of(pruner.select(_context(pruner, seen, order, text, device), count), item.size)


def _context(pruner: Pruner, seen: Seen, order: int, text: PromptText | None, device: torch.device) -> Context:
    known = Context(seen.item, seen.attention, seen.features, order, device, mrope=seen.mrope)
    if pruner.reads_views:
        known = replace(known, xyz=seen.xyz)
    if pruner.reads_frames:
        known = replace(known, scores=seen.scores)
    if pruner.reads_unpooled:
        known = replace(known, finer=seen.finer)
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


def _overlay(rows: Sequence[Sequence[Chosen]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, V, D] replacement embeddings, and [R, V] bool where they apply."""
    some = next(one.values for row in rows for one in row if one.values is not None)
    tables, where = [], []
    for row in rows:
        dense = [some.new_zeros(len(one.flag), some.shape[-1]) if one.values is None else one.values for one in row]
        tables.append(torch.cat([some[:0], *(part.to(some.dtype) for part in dense)]))
        flags = [one.flag if one.values is not None else torch.zeros_like(one.flag) for one in row]
        where.append(torch.cat([some.new_zeros(0, dtype=torch.bool), *flags]))
    return _pad(tables), _pad(where)
