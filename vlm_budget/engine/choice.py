"""From what was encoded and what the prompts hold to a choice: which counts, and which tokens, for all of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..budget import Budget
from ..cost import CostModel
from ..errors import LayoutError, PlanError
from ..families.base import Family
from ..latency import SavedLatency
from ..layout import Modality, VisualLayout
from ..plan import Plan
from ..planning import Cost, Facts, make_plan
from ..request import Request
from .beside import Beside
from .layers import LayerDropper
from .observe import Observer
from .prompts import Prompts
from .selection import Observation, PromptSelection, PromptText, Seen, seen_rows, select

Counts = dict[Modality, list[int]]

_WITHOUT = {
    "views": "no views lie beside the prompt's pictures (the frames of a video have none), so distances in space count "
    "for nothing. Call handle.views(...) first.",
    "frames": "no scores lie beside the prompt's frames, so every frame counts the same. Call handle.frames(...) "
    "first, with of='image' where the frames are pictures and the model knows videos, too.",
}


@dataclass(frozen=True, eq=False)
class Choice:
    """A selection and what it was made for.

    Attributes:
        observations: What was encoded.
        counts: Per modality, the visual tokens of every row of features.
        selection: Which tokens enter the language model.
        plan: The promised counts, one row per prompt.
        layout: The items they are for.
        keep: Per modality, [prompts, V] bool over a prompt's visual tokens in order.
        text: Counts the text tokens per prompt, for the report; None for a further turn on a filled cache.
    """

    observations: list[Observation]
    counts: Counts
    selection: PromptSelection
    plan: Plan
    layout: VisualLayout
    keep: dict[Modality, torch.Tensor]
    text: Callable[[], list[int]] | None

    def fits(self, observations: list[Observation], counts: Counts) -> bool:
        """It was made for these features and prompts."""
        same = all(any(o is mine for mine in self.observations) for o in observations)
        return same and counts == self.counts

    @property
    def drops_inside(self) -> bool:
        """Tokens are dropped at some decoder layer."""
        return bool(self.plan.drop_layers)

    @property
    def keeps_all(self) -> bool:
        """Nothing is dropped anywhere, so the original call can run untouched."""
        return self.selection.keeps_all and not self.drops_inside


class Chooser:
    """Plans and selects for one model.

    Args:
        base: The model that holds vision tower and language model.
        family: What is known about its class.
        request: Methods, and what a prompt may spend.
        observer: What is recorded of the vision side.
        dropper: What drops inside the language model, if anything does.

    Raises:
        PlanError: A plan to be replayed drops inside the language model, where no method acts.
        LatencyError: The budget is in milliseconds, and this model was not calibrated on this machine.
    """

    def __init__(
        self, base: nn.Module, family: Family, request: Request, observer: Observer, dropper: LayerDropper | None
    ) -> None:
        self.base = base
        self.family = family
        self.request = request
        self.observer = observer
        self.dropper = dropper
        self.latency = SavedLatency(base, family)
        self._told: set[str] = set()
        if isinstance(request.spend, Budget) and request.spend.unit == "ms":
            self.latency()
        if dropper is None and isinstance(request.spend, Plan) and request.spend.drop_layers:
            raise PlanError(
                f"the plan drops tokens at decoder layers {request.spend.drop_layers}, and {request.methods} does not "
                f"act inside the language model. Name the method it was made for ({request.spend.method})."
            )

    def plan_for(self, layout: VisualLayout, text: Sequence[int]) -> Plan:
        """The counts for a batch.

        Args:
            layout: Its items.
            text: Its text tokens per prompt; any numbers where ``needs_text`` is False.

        Raises:
            BudgetError: The budget cannot be met by some prompt.
            PatchError: It means to drop at layers that cannot.
        """
        spend = self.request.spend
        if isinstance(spend, Plan):
            spend.row_counts(layout.row_sizes())
            # Whether counts are promised per item or per prompt is the method's to say, not that of whom they are of.
            vision = self.request.methods.vision
            return replace(spend, joint=vision is not None and vision.joint)
        if self.request.recipe is not None:
            for row in layout.rows:
                self.request.recipe.warn_if_far(sum(item.size for item in row))
        decoder: Any = self.family.language_model(self.base)
        cost: Cost = self.cost() if self.needs_text else _UNPRICED
        first = max(1, self.family.deepstack_levels(self.base))
        plan = make_plan(self.request.methods, spend, layout, Facts(len(decoder.layers), text, cost, first))
        if self.dropper is not None:
            self.dropper.check(plan)
        return plan

    def cost(self) -> CostModel:
        """The model's prices as it is now: number format, adapters and device may change under a patch."""
        return CostModel.of(self.base, self.family, self.latency)

    @property
    def needs_text(self) -> bool:
        """The budget is one that text takes a part of."""
        return isinstance(self.request.spend, Budget) and self.request.spend.unit in ("flops", "ms", "bytes")

    def choose(
        self,
        observations: list[Observation],
        counts: Counts,
        prompts: Prompts,
        visual: Mapping[Modality, torch.Tensor],
        device: torch.device,
    ) -> Choice:
        """Plan, and ask the method before the language model.

        Args:
            observations: What was encoded.
            counts: Per modality, the visual tokens of every row of features.
            prompts: The text beside them.
            visual: Per modality, [B, L] bool, placeholders of this call.
            device: Where the language model's embeddings live.
        """
        rows = seen_rows(observations, counts, self.observer.needs, self.observer.project, self.family.mrope)
        # Up to 4.x ``generate`` repeats a prompt with its pixels, so that copies are encoded.
        copies = len(rows) // prompts.rows if prompts.rows and len(rows) % prompts.rows == 0 else 1
        layout = VisualLayout(tuple(tuple(seen.item for seen in row) for row in rows[::copies]))
        text = partial(self._text_counts, prompts, visual, len(layout.rows))
        plan = self.plan_for(layout, text() if self.needs_text else [0] * len(layout.rows))
        if plan.keep < plan.total:
            self._tell_what_is_missing(rows)
        selection = select(
            self.request.methods.vision, plan.repeated(copies), rows, device, self._texts(prompts, copies)
        )
        keep = {modality: table[::copies] for modality, table in selection.keep.items()}
        return Choice(observations, counts, selection, plan, layout, keep, None if prompts.cached else text)

    def _tell_what_is_missing(self, rows: Sequence[Sequence[Seen]]) -> None:
        """Warn, once each, that a method does without what it could look at."""
        vision = self.request.methods.vision
        seen = [one for row in rows for one in row]
        several = any(sum(one.item.frames for one in row) > 1 for row in rows)
        unlaid = {
            "views": vision is not None and vision.reads_views and all(one.xyz is None for one in seen),
            "frames": vision is not None
            and vision.reads_frames
            and several
            and all(one.scores is None for one in seen),
        }
        for name, missing in unlaid.items():
            if missing and name not in self._told:
                self._told.add(name)
                warnings.warn(f"{vision}: {_WITHOUT[name]}", stacklevel=2)

    def observation(self, latest: Mapping[Modality, Observation], modality: Modality, beside: Beside) -> Observation:
        """What was encoded last.

        Args:
            latest: Per modality.
            modality: Which is asked for.
            beside: What lies beside the prompts now; features may have been encoded before it was laid there.

        Raises:
            LayoutError: Nothing, or not with this patch; or what was laid beside belongs to other items.
        """
        seen = latest.get(modality)
        if seen is None:
            raise LayoutError(
                f"the {modality} features of this call were not encoded by this patched model, so no scores belong to "
                "them. Encode them with the patched model, or pass pixel inputs."
            )
        if seen.lacks(self.observer.needs, self.observer.hidden, self.observer.unpooled):
            raise LayoutError(
                f"the {modality} features of this call were encoded under another patch, and lack the scores or rows "
                f"that {self.request.methods.vision} needs. Encode them anew, or pass pixel inputs."
            )
        if seen.laid.source is beside:
            return seen
        return replace(seen, laid=beside.laid(self.base, self.family, modality, seen.items))

    def row_counts(
        self, observations: list[Observation], visual: Mapping[Modality, torch.Tensor], prompts: Prompts, chunks: bool
    ) -> Counts:
        """Visual tokens of every row of features.

        Args:
            observations: What was encoded.
            visual: Per modality, [B, L] bool, placeholders of this call.
            prompts: What is known of the prompts.
            chunks: The call may be a part of them: they count where they fit the features, else this call does.
        """
        known = prompts.counts
        totals = {o.modality: sum(item.size for item in o.items) for o in observations}
        fits = known is not None and all(sum(known.visual.get(m, ())) == total for m, total in totals.items())
        if known is None or (chunks and not fits):
            counts: Counts = {m: mask.sum(1).tolist() for m, mask in visual.items()}
        else:
            counts = dict(known.visual)
        result: Counts = {}
        for modality, total in totals.items():
            rows = counts.get(modality) or [0] * len(next(iter(counts.values())))
            # Features encoded once serve k equal rows when generate repeats a prompt for beams or return sequences.
            copies = sum(rows) // total if total and sum(rows) % total == 0 else 1
            result[modality] = rows[:: max(copies, 1)]
        return result

    @property
    def _tokens(self) -> dict[Modality, int]:
        return self.family.token_ids(self.base.config)

    def _texts(self, prompts: Prompts, copies: int) -> list[PromptText] | None:
        vision = self.request.methods.vision
        if vision is None or not vision.reads_text:
            return None
        texts = prompts.texts(self._tokens, self.base.get_input_embeddings())  # type: ignore[operator]
        return None if texts is None else [text for text in texts for _ in range(copies)]

    def _text_counts(self, prompts: Prompts, visual: Mapping[Modality, torch.Tensor], rows: int) -> list[int]:
        if prompts.counts is not None:
            return prompts.counts.text
        counts: list[int] = (~torch.stack(list(visual.values())).any(0)).sum(1).tolist()
        return counts[:: len(counts) // rows]


class _Unpriced:
    """The cost where none is asked for."""

    def amount(self, unit: str, text: int, visual: Sequence[int]) -> float:
        raise AssertionError("a budget in tokens asks for no cost")


_UNPRICED = _Unpriced()
