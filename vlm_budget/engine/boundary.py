"""The cut at the language-model boundary.

The outer model runs as released, in the caller's coordinates: placeholders, scattered features, M-RoPE positions, 2-D
masks, logits, labels. A pre-hook of the inner language model gathers the kept columns; a hook maps the output back; the
cache answers in the caller's coordinates outside (see ``cache``). Everything a call has to remember is thread-local, so
one patched model serves concurrent calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..budget import Budget
from ..errors import LayoutError, PatchError, SelectionError
from ..families.base import Family
from ..layout import Modality, VisualLayout
from ..plan import Plan
from ..pruner import Pruner
from .account import Account
from .arguments import full_positions, grow_output, past_columns, renumber_cache_position, shorten_deepstack
from .cache import CacheState, cache_state, set_cache_state, static_widths
from .clock import Interval
from .compact import Compaction, compact, packed_positions
from .local import CallLocal, RunningThreads
from .masks import compact_square, is_square, new_columns_valid, padding_mask
from .observe import Observer, bound_arguments
from .selection import Observation, PromptSelection, make_plan, seen_rows, select, tie_observation, tied_observations


@dataclass(frozen=True, eq=False)
class Pending:
    """What the language model's post-hook needs from its pre-hook."""

    interval: Interval
    prompt: bool
    state: CacheState | None = None
    compaction: Compaction | None = None
    earlier: CacheState | None = None


@dataclass(frozen=True, eq=False)
class _Known:
    """A selection and what it was made for."""

    observations: list[Observation]
    counts: dict[Modality, list[int]]
    selection: PromptSelection

    def fits(self, observations: list[Observation], counts: dict[Modality, list[int]]) -> bool:
        same = all(any(o is mine for mine in self.observations) for o in observations)
        return same and counts == self.counts


class Boundary:
    """Prunes at the language-model boundary of one model.

    Args:
        base: The model that holds vision tower and language model (``LlavaModel`` inside ``LlavaFor…``).
        family: What is known about its class.
        pruner: The method.
        budget: What a prompt may spend, or a plan to replay.
        positions: ``"packed"`` or ``"original"``.
    """

    def __init__(self, base: nn.Module, family: Family, pruner: Pruner, budget: Budget | Plan, positions: str) -> None:
        self.base = base
        self.family = family
        self.pruner = pruner
        self.budget = budget
        self.positions = positions
        whole = isinstance(budget, Budget) and budget.unit == "ratio" and budget.amount == 1
        needs = () if whole else pruner.needs(family.tower(base))
        self.observer = Observer(base, family, needs)
        self.account: Account | None = None
        self.running = RunningThreads()
        self._local = CallLocal()

    # --- watched methods -------------------------------------------------------------------------------------------

    def watch_generate(self, call: Any, args: Any, kwargs: Any) -> Any:
        """Around ``generate``: remember the prompts' placeholders, which chunked prefill never shows as a whole."""
        local = self._local
        earlier = [getattr(local, name, None) for name in ("counts", "prompts", "prompt_length")]
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        known = isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.numel() > 0
        past = _length(kwargs.get("past_key_values"))
        # A further turn may bring the whole conversation; what the cache holds is not read again.
        fresh = ids[:, past:] if known and past < ids.shape[1] else ids
        local.counts = self._count_placeholders(fresh) if known else None
        local.prompts, local.prompt_length = ids.shape if known else (0, 0)
        # Features given here lose their ties when generate cuts them into chunks.
        local.latest, local.selection = tied_observations(kwargs), None
        self._open_account()
        try:
            return call(*args, **kwargs)
        finally:
            local.counts, local.prompts, local.prompt_length = earlier
            local.latest, local.selection = {}, None

    def watch_image_encoder(self, call: Any, args: Any, kwargs: Any) -> Any:
        """Around ``get_image_features``."""
        return self._watch_encoder("image", call, args, kwargs)

    def watch_video_encoder(self, call: Any, args: Any, kwargs: Any) -> Any:
        """Around ``get_video_features``."""
        return self._watch_encoder("video", call, args, kwargs)

    def _watch_encoder(self, modality: Modality, call: Any, args: Any, kwargs: Any) -> Any:
        local = self._local
        if getattr(local, "encoding", False):
            return call(*args, **kwargs)  # Qwen3-VL encodes videos through its image encoder
        interval = Interval(self._device)
        local.encoding = True
        try:
            output, seen = self.observer.observe(modality, call, args, kwargs)
        finally:
            local.encoding = False
        local.latest = {**getattr(local, "latest", {}), modality: seen}
        tie_observation(output, seen)
        stages = self._account().stages
        stages["encode"].append(interval.stop())
        stages["probe"] += self.observer.probe_intervals()
        return output

    # --- outer model -----------------------------------------------------------------------------------------------

    # Every hook is kept from torch.compile: what a traced one writes to a thread-local is lost.

    @torch.compiler.disable
    def before_base(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Find this call's placeholders, if it brings pixels or encoded features."""
        local = self._local
        if args:
            kwargs = bound_arguments(module.forward, args, kwargs)
        local.visual, local.outer_mask = {}, kwargs.get("attention_mask")
        tied = tied_observations(kwargs)
        if not self._generating:
            local.latest = {}
            if _length(kwargs.get("past_key_values")) == 0:
                self._open_account()
        local.latest = {**local.latest, **tied}
        ids = kwargs.get("input_ids")
        for modality in self.family.given_modalities(kwargs):
            local.visual[modality] = self._placeholders(modality, ids, kwargs.get("inputs_embeds"))

    @torch.compiler.disable
    def after_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forget this call, also after an exception."""
        local = self._local
        local.visual, local.outer_mask = {}, None
        if not self._generating:
            local.latest, local.selection = {}, None

    # --- language model --------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def before_language_model(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Shorten the sequence. Returns None, the untouched call, when nothing is or was dropped."""
        local = self._local
        local.pending = None
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if embeds is None:
            return None
        self.running.enter()
        earlier = cache_state(cache)
        visual = getattr(local, "visual", {})
        selection = self._selection(visual, cache, embeds) if visual else None
        prompt = self._is_prompt(cache, visual)
        if (selection is None or selection.keeps_all) and earlier is None:
            local.pending = Pending(Interval(embeds.device), prompt)
            return None
        interval = Interval(embeds.device)
        new, state, compaction = self._shorten(kwargs, selection, visual, earlier)
        self._account().stages["compact" if prompt else "translate"].append(interval.stop())
        local.pending = Pending(Interval(embeds.device), prompt, state, compaction, earlier)
        if earlier is not None:
            set_cache_state(cache, replace(earlier, physical=True))
        return args, new

    @torch.compiler.disable
    def after_language_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Map the output back to the caller's columns and hand the cache its state."""
        local = self._local
        pending: Pending | None = getattr(local, "pending", None)
        local.pending = None
        self.running.leave()
        if pending is None:
            return None
        if pending.earlier is not None:
            set_cache_state(kwargs["past_key_values"], pending.earlier)
        if output is None:  # the language model raised
            return None
        account = self._account()
        account.stages["prefill" if pending.prompt else "decode"].append(pending.interval.stop())
        interval = Interval(output.last_hidden_state.device)
        cache = getattr(output, "past_key_values", None)
        if cache is not None and pending.state is not None:
            set_cache_state(cache, pending.state)
        if cache is not None and pending.prompt:
            account.note_cache(cache, _length(cache))
        if pending.compaction is not None:
            grow_output(output, pending.compaction)
            account.stages["compact" if pending.prompt else "translate"].append(interval.stop())
        return output

    # --- pieces ----------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.base.parameters()).device

    def _count_placeholders(self, ids: torch.Tensor) -> dict[Modality, list[int]]:
        return {m: (ids == token).sum(-1).tolist() for m, token in self.family.token_ids(self.base.config).items()}

    def _placeholders(self, modality: Modality, ids: Any, embeds: Any) -> torch.Tensor:
        token = self.family.token_ids(self.base.config)[modality]
        if ids is not None:
            return ids == token
        embedding: Any = self.base.get_input_embeddings()  # type: ignore[operator]
        vector = embedding(torch.tensor(token, device=embeds.device))
        return (embeds == vector).all(-1)

    def _selection(self, visual: dict[Modality, torch.Tensor], cache: Any, embeds: torch.Tensor) -> PromptSelection:
        local = self._local
        # A chunk of a chunked prefill may show one modality only; the selection covers all that were encoded.
        observations = [self._observation(modality) for modality in visual]
        observations = list({**getattr(local, "latest", {}), **{o.modality: o for o in observations}}.values())
        counts = self._row_counts(observations, visual)
        known: _Known | None = getattr(local, "selection", None)
        if known is not None and known.fits(observations, counts):
            if _length(cache) == 0:
                known.selection.rewind()
            return known.selection
        interval = Interval(embeds.device)
        rows = seen_rows(observations, counts, self.observer.needs)
        copies = self._copies(len(rows))
        layout = VisualLayout(tuple(tuple(seen.item for seen in row) for row in rows[::copies]))
        plan = self._plan(layout)
        selection = select(self.pruner, plan.repeated(copies), rows, embeds.device)
        account = self._account()
        account.plan, account.layout = plan, layout
        account.keep = {modality: table[::copies] for modality, table in selection.keep.items()}
        account.stages["select"].append(interval.stop())
        local.selection = _Known(observations, counts, selection)
        return selection

    def _observation(self, modality: Modality) -> Observation:
        local = self._local
        seen: Observation | None = local.latest.get(modality)
        if seen is None:
            raise LayoutError(
                f"the {modality} features of this call were not encoded by this patched model, so no scores belong to "
                "them. Encode them with the patched model, or pass pixel inputs."
            )
        if any(need not in seen.attention for need in self.observer.needs):
            raise LayoutError(
                f"the {modality} features of this call were encoded under another patch, and lack the scores that "
                f"{self.pruner} needs. Encode them anew, or pass pixel inputs."
            )
        return seen

    def _row_counts(
        self, observations: list[Observation], visual: dict[Modality, torch.Tensor]
    ) -> dict[Modality, list[int]]:
        counts: dict[Modality, list[int]] | None = getattr(self._local, "counts", None)
        totals = {o.modality: sum(item.size for item in o.items) for o in observations}
        if counts is None or any(sum(counts[m]) != total for m, total in totals.items()):
            counts = {m: mask.sum(1).tolist() for m, mask in visual.items()}
        result = {}
        for modality, total in totals.items():
            rows = counts.get(modality) or [0] * len(next(iter(counts.values())))
            # Features encoded once serve k equal rows when generate repeats a prompt for beams or return sequences.
            copies = sum(rows) // total if total and sum(rows) % total == 0 else 1
            result[modality] = rows[:: max(copies, 1)]
        return result

    def _copies(self, rows: int) -> int:
        """How often ``generate`` repeated every prompt, pixels included, as it does up to transformers 4.x."""
        prompts = getattr(self._local, "prompts", None)
        return rows // prompts if prompts and rows % prompts == 0 else 1

    def _plan(self, layout: VisualLayout) -> Plan:
        if isinstance(self.budget, Plan):
            self.budget.row_counts(layout.row_sizes())
            return self.budget
        return make_plan(self.pruner, self.budget, layout)

    @property
    def _generating(self) -> bool:
        return getattr(self._local, "prompt_length", None) is not None

    def _is_prompt(self, cache: Any, visual: Any) -> bool:
        done = _length(cache)
        return done == 0 or bool(visual) or done < (getattr(self._local, "prompt_length", None) or 0)

    def _open_account(self) -> Account:
        self.account = self._local.account = Account()
        return self.account

    def _account(self) -> Account:
        return getattr(self._local, "account", None) or self._open_account()

    def _shorten(
        self,
        kwargs: dict[str, Any],
        selection: PromptSelection | None,
        visual: dict[Modality, torch.Tensor],
        earlier: CacheState | None,
    ) -> tuple[dict[str, Any], CacheState | None, Compaction | None]:
        """The language model's keyword arguments in physical coordinates."""
        new = dict(kwargs)
        embeds, cache, mask = kwargs["inputs_embeds"], kwargs.get("past_key_values"), kwargs.get("attention_mask")
        batch, length = embeds.shape[:2]
        device = embeds.device
        past = _length(cache)
        outer = getattr(self._local, "outer_mask", None)
        valid = (
            new_columns_valid(mask, outer, batch, length, device)
            if past == 0
            else new_columns_valid(padding_mask(mask, outer), None, batch, length, device)
        )
        past_valid, columns = past_columns(earlier, padding_mask(mask, outer), past, length, batch, device)
        shift = earlier.shift.to(device) if earlier is not None else torch.zeros(batch, dtype=torch.long, device=device)
        positions = full_positions(kwargs.get("position_ids"), past, batch, length, device)

        if selection is None:
            lowered = positions - shift[:, None] if self.positions == "packed" else positions
            new["position_ids"] = lowered
            new["attention_mask"] = torch.cat([past_valid, valid], 1).long()
            renumber_cache_position(new, past_valid.shape[1], length, device)
            return new, None, None

        keep, embeds = self._kept_columns(selection, visual, embeds)
        since = past if earlier is None else earlier.tail.to(device) + past - earlier.virtual_length
        compaction, tail = self._compaction(selection, keep & valid, valid, since)
        # Padding slots keep a dropped token's embedding: StaticCache counts its non-zero keys up to transformers 4.x.
        new["inputs_embeds"] = compaction.take(embeds)
        new["position_ids"], shift = self._new_positions(positions, compaction, valid, shift)
        shorten_deepstack(new, compaction)
        whole = torch.cat([past_valid, compaction.valid], 1)
        # Never None: without a mask transformers reads gaps in position ids as packed sequences, and blocks attention.
        before = (past_valid, columns, past) if past else None
        new["attention_mask"] = (
            compact_square(mask, compaction, static_widths(cache), before) if is_square(mask) else whole.long()
        )
        renumber_cache_position(new, past_valid.shape[1], compaction.slots, device)
        columns = torch.cat([columns, past + compaction.index], 1)
        return new, CacheState(past + length - whole.shape[1], whole, columns, shift, tail), compaction

    def _kept_columns(
        self, selection: PromptSelection, visual: dict[Modality, torch.Tensor], embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keep = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for modality, mask in visual.items():
            mask = mask.to(embeds.device)
            index = selection.columns(modality, mask)
            keep &= ~mask | selection.keep[modality][index]
            if modality in selection.values:
                table, where = selection.values[modality]
                swap = (mask & where[index])[..., None]
                embeds = torch.where(swap, table[index].to(embeds.dtype), embeds)
        return keep, embeds

    def _compaction(
        self, selection: PromptSelection, keep: torch.Tensor, valid: torch.Tensor, since: int | torch.Tensor
    ) -> tuple[Compaction, torch.Tensor]:
        """The compaction, and the columns since the last dropped one; ``since`` are those before this call."""
        length = keep.shape[1]
        last = ((valid & ~keep) * torch.arange(1, length + 1, device=keep.device)).max()
        tail = torch.where(last > 0, length - last, length + since)
        right_padded = ~valid[:, -1].all()
        # The only host sync of a prefill: the compacted length, with all else the host must know.
        facts = torch.cat([keep.sum(1).max()[None], right_padded[None].long(), selection.kept.to(keep.device)]).tolist()
        promised = [item.keep for item in selection.plan.items]
        if facts[2:] != promised:
            raise SelectionError(f"{self.pruner} promised {promised} tokens and kept {facts[2:]}")
        # A chunk of a chunked prefill may lose all its tokens; one padding slot keeps shapes legal.
        return compact(keep, max(facts[0], 1), bool(facts[1])), tail

    def _new_positions(
        self, positions: torch.Tensor, compaction: Compaction, valid: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.positions == "original":
            return compaction.take_last(positions) * compaction.valid, shift
        if positions.ndim != 2:
            raise PatchError("packed positions need one-dimensional RoPE; use positions='original'")
        start = torch.where(valid, positions, positions.max() + 1).amin(1) - shift
        packed = packed_positions(compaction, start) * compaction.valid
        return packed, shift + (valid & ~compaction.keep).sum(1)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
