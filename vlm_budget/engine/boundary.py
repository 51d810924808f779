"""The cut at the language-model boundary.

The outer model runs as released, in the caller's coordinates: placeholders, scattered features, M-RoPE positions, 2-D
masks, logits, labels. A pre-hook of the inner language model gathers the kept columns (``shorten``); its layers may
drop more (``layers``); a hook maps the output back; the cache answers in the caller's coordinates outside (``cache``).
Everything a call has to remember is thread-local, so one patched model serves concurrent calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..budget import Budget
from ..errors import PatchError
from ..families.base import Family
from ..layout import Modality, VisualLayout
from ..plan import Plan
from ..request import PositionModes, Request
from .account import Account
from .arguments import grow_output
from .cache import CacheState, cache_state, set_cache_state
from .candidates import PromptTokens
from .choice import Choice, Chooser
from .clock import Interval
from .compact import Compaction
from .layers import Hook, LayerDropper
from .local import CallLocal, RunningThreads
from .masks import is_square
from .observe import AttachedInput, Observer, bound_arguments
from .probes import AttachedProbe
from .prompts import Prompts, Rows, prompt_tokens
from .run import DropRun, Entered
from .selection import tie_observation, tied_observations
from .shorten import LanguageCall, kept_columns


@dataclass(frozen=True, eq=False)
class Pending:
    """What the language model's post-hook needs from its pre-hook."""

    interval: Interval
    prompt: bool
    state: CacheState | None = None
    compaction: Compaction | None = None
    earlier: CacheState | None = None


class Boundary:
    """Prunes one model at the language-model boundary, and at its decoder layers.

    Args:
        base: The model that holds vision tower and language model (``LlavaModel`` inside ``LlavaFor…``).
        family: What is known about its class.
        request: Methods, and what a prompt may spend.
        modes: Position ids of kept tokens.

    Raises:
        PatchError: A method needs what the model does not have, or drops at layers that cannot be shortened.
    """

    def __init__(self, base: nn.Module, family: Family, request: Request, modes: PositionModes) -> None:
        self.base = base
        self.family = family
        self.request = request
        self.modes = modes
        vision, decoder, spend = request.methods.vision, request.methods.decoder, request.spend
        self.packed = vision is not None and modes.vision == "packed"
        watch = not (isinstance(spend, Budget) and spend.unit == "ratio" and spend.amount == 1)
        needs = vision.all_needs(family.tower(base)) if vision is not None and watch else ()
        self.observer = Observer(base, family, needs, hidden=vision is not None and watch and vision.wants_hidden)
        self.dropper: LayerDropper | None = None
        if decoder is not None:
            plan = spend if isinstance(spend, Plan) else None
            self.dropper = LayerDropper(base, family, decoder, modes.decoder, watch, plan)
        self.chooser = Chooser(base, family, request, self.observer, self.dropper)
        self.account: Account | None = None
        self.running = RunningThreads()
        self._local = CallLocal()

    def attach_probes(self) -> list[AttachedProbe | AttachedInput]:
        """Probe what the methods look at; the caller owns the undoing."""
        probes = self.observer.attach()
        try:
            return [*probes, *(self.dropper.attach() if self.dropper is not None else ())]
        except BaseException:
            for probe in reversed(probes):
                probe.detach()
            raise

    def plan_for(self, layout: VisualLayout, text: Sequence[int]) -> Plan:
        """The counts for a batch.

        Args:
            layout: Its items.
            text: Its text tokens per prompt.
        """
        return self.chooser.plan_for(layout, text)

    def hooks(self) -> list[Hook]:
        """Module, name of the registering method, hook and options of every hook, in the order of registration."""
        decoder = self.family.language_model(self.base)
        return [
            (self.base, "register_forward_pre_hook", self.before_base, {}),
            (self.base, "register_forward_hook", self.after_base, {"always_call": True}),
            (decoder, "register_forward_pre_hook", self.before_language_model, {}),
            (decoder, "register_forward_hook", self.after_language_model, {"always_call": True}),
            *(self.dropper.hooks() if self.dropper is not None else ()),
        ]

    # --- watched methods -------------------------------------------------------------------------------------------

    def watch_generate(self, call: Any, args: Any, kwargs: Any) -> Any:
        """Around ``generate``: remember the prompts, which chunked prefill never shows as a whole."""
        local = self._local
        earlier = getattr(local, "generating", None)
        local.generating = Prompts.of_generate(args, kwargs, _length(kwargs.get("past_key_values")))
        # Features given here lose their ties when generate cuts them into chunks.
        local.latest, local.selection = tied_observations(kwargs), None
        self._open_account()
        try:
            return call(*args, **kwargs)
        finally:
            local.generating = earlier
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
        cached, tied = _length(kwargs.get("past_key_values")), tied_observations(kwargs)
        if self._generating is None:
            local.latest = {}
            if cached == 0:
                self._open_account()
        local.latest = {**local.latest, **tied}
        local.given = Prompts.of_forward(kwargs, cached)
        ids = kwargs.get("input_ids")
        for modality in self.family.given_modalities(kwargs):
            local.visual[modality] = self._placeholders(modality, ids, kwargs.get("inputs_embeds"))

    @torch.compiler.disable
    def after_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forget this call, also after an exception."""
        local = self._local
        local.visual, local.outer_mask, local.given = {}, None, None
        if self._generating is None:
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
        visual = {modality: mask.to(embeds.device) for modality, mask in getattr(local, "visual", {}).items()}
        known = self._selection(visual, cache, embeds) if visual else None
        prompt = self._is_prompt(cache, visual)
        if (known is None or known.keeps_all) and earlier is None:
            local.pending = Pending(Interval(embeds.device), prompt)
            return None
        interval = Interval(embeds.device)
        call = LanguageCall.read(kwargs, getattr(local, "outer_mask", None), _length(cache), earlier)
        state, compaction, rows = None, None, None
        if known is None:
            new = call.continued(self.packed)
        else:
            new, state, compaction, rows = self._shorten(call, known, visual)
        self._enter_layers(call, new, known, visual, compaction, rows)
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
        run = self.dropper.leave() if self.dropper is not None else None
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
        state, compaction = pending.state, pending.compaction
        if run is not None:
            run.finish(output)
            account.note_drops(run)
            state = run.state(state, compaction) if state is not None and compaction is not None else None
        cache = getattr(output, "past_key_values", None)
        if cache is not None and state is not None:
            set_cache_state(cache, state)
        if cache is not None and pending.prompt:
            account.note_cache(cache, _length(cache))
        if compaction is not None:
            grow_output(output, compaction)
            account.stages["compact" if pending.prompt else "translate"].append(interval.stop())
        return output

    def _shorten(
        self, call: LanguageCall, known: Choice, visual: dict[Modality, torch.Tensor]
    ) -> tuple[dict[str, Any], CacheState, Compaction, Rows]:
        """The language model's arguments in physical columns, what its cache will hold, and how it was done."""
        extra, columns = 0, None
        if known.drops_inside:
            assert self.dropper is not None, "the plan was checked"
            self.dropper.require_droppable(call.cache)
            length = call.embeds.shape[1]
            self._prompts.require_whole(call.past, length)
            extra = self._prompts.extra(call.past, length)
            columns = torch.stack(list(visual.values())).any(0)
        selection = known.selection
        keep, embeds = kept_columns(selection, visual, call.embeds)
        promised = [item.keep for item in selection.plan.items]
        vision = self.request.methods.vision
        compaction, tail, rows = call.compaction(keep, selection.kept, promised, columns, extra, vision)
        self._require_no_gaps(call, compaction)
        return *call.shortened(embeds, compaction, tail, self.packed), compaction, rows

    def _require_no_gaps(self, call: LanguageCall, compaction: Compaction) -> None:
        """Refuse what flash attention would misread: behind a cache, gaps in a single row's position ids.

        Raises:
            PatchError: It takes them for several sequences packed into one, and reads the wrong keys.
        """
        decoder: Any = self.family.language_model(self.base)
        flash = "flash" in str(decoder.config._attn_implementation)
        alone = len(call.valid) == 1 and call.positions.ndim == 2
        if flash and alone and call.past and not self.packed and compaction.slots < compaction.length:
            raise PatchError(
                "with flash attention, tokens that join a cache cannot keep their original position ids: the gaps "
                "would be read as several sequences packed into one. Use positions='packed', or "
                "attn_implementation='sdpa'."
            )

    def _enter_layers(
        self,
        call: LanguageCall,
        new: dict[str, Any],
        known: Choice | None,
        visual: dict[Modality, torch.Tensor],
        compaction: Compaction | None,
        rows: Rows | None,
    ) -> None:
        """Make ready for the layers that drop tokens, or hold fewer since an earlier call."""
        groups = call.earlier.groups if call.earlier is not None else ()
        drops = known is not None and known.drops_inside
        if not groups and not drops:
            return
        if self.dropper is None:
            raise PatchError(
                "tokens of this cache were dropped inside the language model, under another patch. Patch the model "
                "with that method again, or start from a new cache."
            )
        prompts: list[PromptTokens] = []
        if drops:
            assert known is not None and compaction is not None and rows is not None
            slots = {m: compaction.take(mask) & compaction.valid for m, mask in visual.items()}
            prompts = prompt_tokens(known.plan, known.layout, known.selection, slots, rows)
        entered = Entered(
            embeds=new["inputs_embeds"],
            positions=new["position_ids"],
            valid=call.valid if compaction is None else compaction.valid,
            right_padded=rows is not None and rows.right_padded,
            square=is_square(call.kwargs.get("attention_mask")),
            past_valid=call.past_valid,
            added=call.added,
            groups=groups,
            prompts=prompts,
        )
        self.dropper.enter(DropRun(self.dropper, entered))

    # --- pieces ----------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def _generating(self) -> Prompts | None:
        """What the ``generate`` in progress was given."""
        generating: Prompts | None = getattr(self._local, "generating", None)
        return generating

    @property
    def _prompts(self) -> Prompts:
        """What ``generate`` was given, or the forward in progress."""
        return self._generating or self._local.given

    def _placeholders(self, modality: Modality, ids: Any, embeds: Any) -> torch.Tensor:
        token = self.family.token_ids(self.base.config)[modality]
        if ids is not None:
            return ids == token
        embedding: Any = self.base.get_input_embeddings()  # type: ignore[operator]
        vector = embedding(torch.tensor(token, device=embeds.device))
        return (embeds == vector).all(-1)

    def _selection(self, visual: dict[Modality, torch.Tensor], cache: Any, embeds: torch.Tensor) -> Choice:
        """The choice for the prompts at hand, made when their first columns arrive."""
        local = self._local
        # A chunk of a chunked prefill may show one modality only; the selection covers all that were encoded.
        observations = [self.chooser.observation(local.latest, modality) for modality in visual]
        observations = list({**local.latest, **{o.modality: o for o in observations}}.values())
        counts = self.chooser.row_counts(observations, visual, self._generating)
        known: Choice | None = getattr(local, "selection", None)
        if known is not None and known.fits(observations, counts):
            if _length(cache) == 0:
                known.selection.rewind()
            return known
        interval = Interval(embeds.device)
        choice = self.chooser.choose(observations, counts, self._prompts, visual, embeds.device)
        account = self._account()
        account.plan, account.layout, account.keep = choice.plan, choice.layout, choice.keep
        account.text, account.rows = choice.text, len(embeds)
        account.stages["select"].append(interval.stop())
        local.selection = choice
        return choice

    def _is_prompt(self, cache: Any, visual: Any) -> bool:
        done, generating = _length(cache), self._generating
        return done == 0 or bool(visual) or (generating is not None and done < generating.length)

    def _open_account(self) -> Account:
        self.account = self._local.account = Account()
        return self.account

    def _account(self) -> Account:
        return getattr(self._local, "account", None) or self._open_account()


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
