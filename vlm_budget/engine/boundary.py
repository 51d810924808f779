"""The cut at the language-model boundary.

The outer model runs as released, in the caller's coordinates: placeholders, scattered features, M-RoPE positions, 2-D
masks, logits, labels. A pre-hook of the inner language model gathers the kept columns (``shorten``); its layers may
drop more (``layers``); a hook maps the output back; the cache answers in the caller's coordinates outside (``cache``).
Everything a call has to remember is thread-local, so one patched model serves concurrent calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..budget import Budget
from ..errors import PatchError
from ..families.base import Family
from ..layout import Modality, VisualLayout
from ..plan import Plan
from ..pruner import moved
from ..request import PositionModes, Request
from .account import Account, Accounts
from .arguments import grow_output
from .beside import NOTHING, Repeated
from .cache import CacheState, cache_state, set_cache_state
from .candidates import PromptTokens
from .choice import Choice, Chooser
from .clock import Interval
from .compact import Compaction
from .layers import Hook, LayerDropper
from .local import CallLocal, RunningThreads
from .masks import is_square
from .nested import clear, is_own, put_back, set_aside
from .observe import AttachedInput, Observer, bound_arguments
from .probes import AttachedProbe
from .prompts import CallShape, Prompts, Rows, placeholders, prompt_tokens
from .reading import read_call
from .run import DropRun, Entered
from .selection import tie_observation, tied_observations
from .shorten import LanguageCall, Pending, kept_columns


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
        self.observer = Observer.for_method(base, family, vision if watch else None)
        self.beside = NOTHING
        self.dropper: LayerDropper | None = None
        if decoder is not None:
            plan = spend if isinstance(spend, Plan) else None
            self.dropper = LayerDropper(base, family, decoder, modes.decoder, watch, plan)
        self.chooser = Chooser(base, family, request, self.observer, self.dropper)
        self.accounts = Accounts()
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
        self._resume()
        outer = set_aside(local, self.accounts) if self._generating is not None else None
        clear(local)  # an interrupted call did not
        try:
            prompts = Prompts.of_generate(args, kwargs, _length(kwargs.get("past_key_values")))
            local.generating = self._read(prompts, kwargs)
            # Features given here lose their ties when generate cuts them into chunks.
            local.latest = tied_observations(kwargs)
            self.accounts.open()
            output = call(*args, **kwargs)
            self.accounts.promises.settle()
            return output
        finally:
            local.aside = None
            clear(local)
            if outer is not None:
                put_back(local, self.accounts, outer)

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
        generating, given = self._generating, getattr(local, "given", None)
        known = () if generating is None and given is None else getattr(local, "known", ())
        repeated = Repeated.of(generating, given, modality)
        local.encoding = True
        try:
            output, seen = self.observer.observe(modality, call, args, kwargs, known, self.beside, repeated)
        finally:
            local.encoding = False
        local.latest = {**getattr(local, "latest", {}), modality: seen}
        tie_observation(output, seen)
        stages = self.accounts.current().stages
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
        self._resume()
        local.visual, local.outer_mask = {}, kwargs.get("attention_mask")
        cache, tied = kwargs.get("past_key_values"), tied_observations(kwargs)
        cached, given = _length(cache), self.family.given_modalities(kwargs)
        local.counted = (cache, cached)
        local.given = Prompts.of_forward(kwargs, cached)
        if self._generating is not None and not is_own(local, cache, cached, local.given.length, bool(given)):
            local.aside = set_aside(local, self.accounts)
        if self._generating is None:
            clear(local)  # an interrupted call did not
            if cached == 0:
                self.accounts.open()
        local.latest = {**local.latest, **tied}
        if self._generating is None:
            local.given = self._read(local.given, kwargs)
        elif self._generating.counts is None and self._generating.ids is not None:
            local.generating = self._read(self._generating, kwargs)
        tokens = self.family.token_ids(self.base.config)
        for modality in given:
            local.visual[modality] = placeholders(tokens[modality], kwargs, self.base)

    @torch.compiler.disable
    def after_base(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forget this call, also after an exception."""
        local = self._local
        local.visual, local.outer_mask, local.given, local.counted = {}, None, None, None
        if self._generating is None:
            clear(local)
        self._resume()

    # --- language model --------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def before_language_model(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Shorten the sequence. Returns None, the untouched call, when nothing is or was dropped."""
        local = self._local
        local.pending = None
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        if embeds is None:
            return None
        self.accounts.promises.settle()
        self.running.enter()
        earlier, past = cache_state(cache), self._cached(cache)
        visual = {m: moved(mask, embeds.device) for m, mask in getattr(local, "visual", {}).items()}
        known = self._selection(visual, past, embeds) if visual else None
        prompt, length = self._is_prompt(past, visual), past + embeds.shape[1]
        if (known is None or known.keeps_all) and earlier is None:
            local.pending = Pending(Interval(embeds.device), prompt, length)
            return None
        interval = Interval(embeds.device)
        call = LanguageCall.read(kwargs, getattr(local, "outer_mask", None), past, earlier)
        state, compaction, rows = None, None, None
        if known is None:
            new = call.continued(self.packed)
        else:
            new, state, compaction, rows = self._shorten(call, known, visual)
        self._enter_layers(call, new, known, visual, compaction, rows)
        self.accounts.current().stages["compact" if prompt else "translate"].append(interval.stop())
        local.pending = Pending(Interval(embeds.device), prompt, length, state, compaction, earlier)
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
        account = self.accounts.current()
        account.stages["prefill" if pending.prompt else "decode"].append(pending.interval.stop())
        interval = Interval(output.last_hidden_state.device)
        state, compaction = pending.state, pending.compaction
        if run is not None:
            run.finish(output, account.promises)
            account.note_drops(run)
            state = run.state(state, compaction) if state is not None and compaction is not None else None
        cache = getattr(output, "past_key_values", None)
        if cache is not None and state is not None:
            set_cache_state(cache, state)
        if cache is not None and pending.prompt:
            account.note_cache(cache, pending.length)
        if compaction is not None:
            grow_output(output, compaction)
            account.stages["compact" if pending.prompt else "translate"].append(interval.stop())
        return output

    def _shorten(
        self, call: LanguageCall, known: Choice, visual: dict[Modality, torch.Tensor]
    ) -> tuple[dict[str, Any], CacheState, Compaction, Rows]:
        """The language model's arguments in physical columns, what its cache will hold, and how it was done."""
        prompts, (batch, length) = self._prompts, call.embeds.shape[:2]
        if known.drops_inside:
            assert self.dropper is not None, "the plan was checked"
            self.dropper.require_droppable(call.cache)
            prompts.require_whole(call.past, length)
        keep, embeds = kept_columns(known.selection, visual, call.embeds)
        shape = CallShape(batch, call.past, length, frozenset(visual))
        worked_out = prompts.lengths(shape, *known.selection.row_tokens())
        columns = torch.stack(list(visual.values())).any(0)
        compaction, tail, rows = call.compaction(keep, columns, prompts.extra(call.past, length), worked_out)
        if worked_out is not None:  # and not read: too few slots would cut tokens off
            kept, claim = compaction.keep.sum(1), "the rows of the language model's call were taken to hold"
            self.accounts.promises.expect(kept, rows.lengths, claim)
        decoder: Any = self.family.language_model(self.base)
        if "flash" in str(decoder.config._attn_implementation) and not self.packed:
            call.require_no_gaps(compaction)
        return *call.shortened(embeds, compaction, tail, self.packed, rows), compaction, rows

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
    def account(self) -> Account | None:
        """The account to report; None before the first prompt."""
        return self.accounts.last

    @property
    def _device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def _generating(self) -> Prompts | None:
        """What the ``generate`` in progress was given."""
        generating: Prompts | None = getattr(self._local, "generating", None)
        return generating

    def _resume(self) -> None:
        """Go on with the ``generate`` that a forward of other prompts interrupted."""
        if (aside := getattr(self._local, "aside", None)) is not None:
            self._local.aside = None
            put_back(self._local, self.accounts, aside)

    @property
    def _prompts(self) -> Prompts:
        """What ``generate`` was given, or the forward in progress."""
        return self._generating or self._local.given

    def _read(self, prompts: Prompts, inputs: Any) -> Prompts:
        """Read all that the host must know of a call that brings features; what was read of its pixels is kept, too.

        Args:
            prompts: Its text side.
            inputs: Its arguments by name.
        """
        given = self.family.given_modalities(inputs)
        if given:
            tokens = self.family.token_ids(self.base.config)
            counts, self._local.known = read_call(prompts.to_read(tokens, given), self.family, given, inputs)
            prompts = prompts.counted(tokens, given, counts)
        return prompts

    def _selection(self, visual: dict[Modality, torch.Tensor], past: int, embeds: torch.Tensor) -> Choice:
        """The choice for the prompts at hand, made when their first columns arrive."""
        local = self._local
        # A chunk of a chunked prefill may show one modality only; the selection covers all that were encoded.
        shown = {modality: self.chooser.observation(local.latest, modality, self.beside) for modality in visual}
        local.latest = {**local.latest, **shown}
        observations = list(local.latest.values())
        counts = self.chooser.row_counts(observations, visual, self._prompts, self._generating is not None)
        known: Choice | None = getattr(local, "selection", None)
        if known is not None and known.fits(observations, counts):
            if past == 0:
                known.selection.rewind()
            return known
        interval = Interval(embeds.device)
        choice = self.chooser.choose(observations, counts, self._prompts, visual, embeds.device)
        account = self.accounts.current()
        account.plan, account.layout, account.keep = choice.plan, choice.layout, choice.keep
        account.text, account.rows = choice.text, len(embeds)
        account.stages["select"].append(interval.stop())
        local.selection = choice
        account.promises.expect(*choice.selection.promise(), f"{self.request.methods.vision} promised")
        return choice

    def _cached(self, cache: Any) -> int:
        """Columns in a cache, which a static one keeps on the device: asked for once per call of the model."""
        counted, self._local.counted = getattr(self._local, "counted", None), None
        return counted[1] if counted is not None and counted[0] is cache else _length(cache)

    def _is_prompt(self, past: int, visual: Any) -> bool:
        generating = self._generating
        return past == 0 or bool(visual) or (generating is not None and past < generating.length)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
