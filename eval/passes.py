"""Prompt passes and generation of one large model, timed: unpatched, patched, and natively fed as many tokens.

All run in turn, round after round. Nothing is timed before the patched model gives what the language model alone gives
for the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import vlm_budget
from vlm_budget.engine.clock import Interval

from .device import Deadline, Stopwatch, count_waits, spread
from .large import Large

NATIVE_BUDGET = 0.2
SECONDS = 12
"""What the timed rounds of a case may take beyond the fewest."""
LAUNCHED = 40_000_000
"""Clock cycles (about 20 ms) in which the host issues a whole language model."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        method: A method's name; ``"full"``, the unpatched model; ``"native"``, the language model alone, fed what HiRED
            leaves.
        budget: Share of the visual tokens.
    """

    method: str
    budget: float = 1.0

    @property
    def patched(self) -> bool:
        """Some method is at work."""
        return self.method not in ("full", "native")

    def __str__(self) -> str:
        return self.method if self.method == "full" else f"{self.method} at {self.budget:.0%}"


FULL, NATIVE, HIRED = Variant("full"), Variant("native", NATIVE_BUDGET), Variant("hired", NATIVE_BUDGET)
CORE = (FULL, NATIVE, HIRED)
METHODS = ("hired", "divprune", "fastv")
FIRST = (FULL, NATIVE, *(Variant(method, NATIVE_BUDGET) for method in METHODS))
VARIANTS = (*FIRST, *(Variant(method, budget) for budget in (0.1, 0.4) for method in METHODS))
"""The most important first: what time does not allow is left out from the end."""


@dataclass
class Row:
    """What was found out about one variant.

    Attributes:
        variant: Which.
        facts: Token counts, peak memory, waits, decoding.
        times: Milliseconds per stage and round.
    """

    variant: Variant
    facts: dict[str, Any] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)


class WrongOutputError(RuntimeError):
    """A patched model does not give what it should: nothing may be timed."""


class Case:
    """One model, one number of tiles, one batch size.

    Args:
        large: The model.
        tiles: Of every image.
        batch: Rows.
        watch: The device's clock.
        rounds: Fewest and most timed rounds.

    Raises:
        WrongOutputError: The patched output is not that of the tokens that were kept.
    """

    def __init__(
        self, large: Large, tiles: int, batch: int, watch: Stopwatch, rounds: tuple[int, int] = (3, 10)
    ) -> None:
        self.large, self.tiles, self.batch, self.watch = large, tiles, batch, watch
        self.fewest, self.most = rounds
        self.model = large.model
        self.inputs = large.inputs(tiles, batch)
        self.rows: dict[Variant, Row] = {}
        self.rounds = 0
        self.left_out: list[str] = []
        self.native = self._native()
        self.difference = self._check()

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.large.family}, {self.tiles} tiles, batch {self.batch}"

    # --- correctness -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _native(self) -> dict[str, Any]:
        """What the language model gets inside the patched model, as a plain call."""
        caught: dict[str, Any] = {}

        def catch(module: Any, args: Any, kwargs: Any) -> None:
            caught.update(kwargs)

        with vlm_budget.patch(self.model, "hired", NATIVE_BUDGET):
            # Registered after the patch's own hook, so it sees the shortened call.
            hook = self.large.decoder.register_forward_pre_hook(catch, with_kwargs=True)
            try:
                self.model(**self.inputs, logits_to_keep=1)
            finally:
                hook.remove()
        native = {"inputs_embeds": caught["inputs_embeds"].clone(), "use_cache": True}
        if self.large.family == "qwen2_5_vl":  # three axes; elsewhere the model counts by itself
            native["position_ids"] = caught["position_ids"].clone()
        return native

    @torch.no_grad()
    def _check(self) -> float:
        with vlm_budget.patch(self.model, "hired", NATIVE_BUDGET):
            patched = self.model(**self.inputs, logits_to_keep=1).logits[:, -1].float()
        hidden = self.large.decoder(**self.native).last_hidden_state[:, -1:]
        expected = self.model.lm_head(hidden)[:, -1].float()
        with self._fed_natively():
            inside = self.model(**self.inputs, logits_to_keep=1).logits[:, -1].float()
        limit = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        apart = [float((found - expected).abs().max() / expected.abs().max()) for found in (patched, inside)]
        for which, difference in zip(("patched and native outputs", "two native outputs"), apart, strict=True):
            if not difference <= limit:  # not-a-number, too
                raise WrongOutputError(f"{self.name}: {which} differ by {difference:.1e}")
        return apart[0]

    # --- prefill ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefills(self, variants: Sequence[Variant], deadline: Deadline) -> None:
        """Time to the first token and its stages, in place of earlier times of these variants.

        What does not fit into the time left goes to ``left_out``.
        """
        cost: dict[Variant, float] = {}
        for variant in variants:
            if deadline.left > (self.fewest + 2) * (sum(cost.values()) + max(cost.values(), default=0)):
                self._forward(variant)  # compiles and tunes
                cost[variant] = self.watch.wall(partial(self._forward, variant))[0] / 1000
        while cost and self.fewest * sum(cost.values()) > deadline.left:
            cost.popitem()
        self._leave_out(variants[len(cost) :], "prefill")
        if not cost:
            return
        affordable = math.floor(min(deadline.left, SECONDS) / sum(cost.values()))
        self.rounds = max(self.fewest, min(self.most, affordable))
        for variant in cost:
            self.rows.setdefault(variant, Row(variant)).times = {}
        for _ in range(self.rounds):
            for variant in cost:
                times, facts = self._forward(variant)
                row = self.rows[variant]
                row.facts |= facts
                for stage, ms in times.items():
                    row.times.setdefault(stage, []).append(ms)

    def _forward(self, variant: Variant) -> tuple[dict[str, float], dict[str, Any]]:
        """One pass: milliseconds per stage, and what is the same in every round."""
        if variant.method == "native":
            return self._native_forward()
        with self._patched(variant) as handle, clocked(self.large.tower) as tower, clocked(self.large.decoder) as whole:
            ms, out = self._measured(lambda: self.model(**self.inputs, logits_to_keep=1))
            if not bool(out.logits.isfinite().all()):
                raise WrongOutputError(f"{self.name}: {variant} gives logits that are not finite")
            times = {"ttft": ms, "vision_tower": tower[0].ms, "prefill": whole[0].ms}
            facts: dict[str, Any] = {"peak_bytes": self._peak()}
            if handle is not None:
                report = handle.report()
                stages = ("encode", "probe", "select", "compact", "drop", "prefill")
                times |= {stage: getattr(report, f"{stage}_ms") for stage in stages}
                times["selection"] = sum(times[stage] for stage in ("probe", "select", "compact", "drop"))
                # Drops happen inside the prefill.
                times["own_prefill"] = times["prefill"] + times["selection"] - times["drop"]
                facts |= {"visual_tokens": report.visual_tokens, "kept_tokens": report.kept_tokens}
                facts["mean_tokens_per_layer"] = report.plan.mean_tokens(len(self.large.decoder.layers))
        return times, facts

    def _native_forward(self) -> tuple[dict[str, float], dict[str, Any]]:
        """The language model natively fed, both ways.

        ``prefill``: within the unpatched model, right behind the vision tower. The host is then as far ahead of the
        device as it is where the patched model's language model begins, but for what our own work there costs.
        ``prefill_ahead``: alone, its launches issued ahead, so that the host does not slow it: the harder thing to be
        compared with.
        """
        with clocked(self.large.decoder) as ahead:
            self._measured(self._call_native)
        peak = self._peak()
        with self._fed_natively(), clocked(self.large.decoder) as inside:
            self._measured(lambda: self.model(**self.inputs, logits_to_keep=1))
        return {"prefill": inside[0].ms, "prefill_ahead": ahead[0].ms}, {"peak_bytes": peak}

    @contextmanager
    def _fed_natively(self) -> Iterator[None]:
        """The unpatched model hands the kept tokens to its language model meanwhile, in place of its own call."""

        def feed(module: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
            return (), dict(self.native)

        hook = self.large.decoder.register_forward_pre_hook(feed, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _call_native(self) -> Any:
        if self.watch.cuda:
            torch.cuda._sleep(LAUNCHED)
        return self.large.decoder(**self.native)

    def _measured(self, call: Any) -> tuple[float, Any]:
        if self.watch.cuda:
            torch.cuda.reset_peak_memory_stats(self.watch.device)
        return self.watch.wall(call)

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.watch.device) - self.watch.own_bytes if self.watch.cuda else None

    def _patched(self, variant: Variant) -> Any:
        return vlm_budget.patch(self.model, variant.method, variant.budget) if variant.patched else nullcontext()

    # --- waits and generation --------------------------------------------------------------------------------------

    @torch.no_grad()
    def waits(self, variants: Sequence[Variant]) -> None:
        """How often the host waits for the device in a prompt pass; unknown without CUDA."""
        if not self.watch.cuda:
            return
        for variant in variants:
            if variant.method != "native":
                with self._patched(variant):
                    self.model(**self.inputs, logits_to_keep=1)
                    torch.cuda.synchronize(self.watch.device)
                    found = count_waits(lambda: self.model(**self.inputs, logits_to_keep=1))
                self.rows.setdefault(variant, Row(variant)).facts["waits"] = found

    @torch.no_grad()
    def generations(self, variants: Sequence[Variant], tokens: int, deadline: Deadline, throughput: bool) -> None:
        """Time per decoded token, and where asked for tokens per second from the prompt to the last token.

        Args:
            variants: The native run has no generation of its own and is passed over.
            tokens: New tokens per row.
            deadline: What does not fit goes to ``left_out``.
            throughput: The run is long enough to tell.
        """
        cost = 0.0
        chosen = [variant for variant in variants if variant.method != "native"]
        for place, variant in enumerate(chosen):
            if deadline.left <= cost:
                self._leave_out(chosen[place:], "decode")
                return
            spent = deadline.left
            self._generate(variant, 3)
            wall, steps, peak = self._generate(variant, tokens)
            found = {"tokens": tokens, "ms_per_token": spread(steps), "peak_bytes": peak}
            if throughput:
                found |= {"wall_ms": wall, "tokens_per_second": self.batch * tokens / wall * 1000}
            self.rows.setdefault(variant, Row(variant)).facts["decode"] = found
            cost = spent - deadline.left

    def _generate(self, variant: Variant, tokens: int) -> tuple[float, list[float], int | None]:
        """Milliseconds in all, those between tokens, and the peak of the memory."""
        ends: list[Interval] = []

        def note(*_: Any) -> None:
            if ends:
                ends[-1].stop()
            ends.append(Interval(self.watch.device))

        with self._patched(variant):
            hook = self.model.register_forward_hook(note)
            try:
                wall, ids = self._measured(
                    lambda: self.model.generate(**self.inputs, max_new_tokens=tokens, do_sample=False)
                )
            finally:
                hook.remove()
        made = ids.shape[1] - self.inputs["input_ids"].shape[1]
        if made != tokens or len(ends) != tokens:
            raise WrongOutputError(f"{self.name}: {variant} made {made} tokens in {len(ends)} steps, not {tokens}")
        return wall, [step.ms for step in ends[:-1]], self._peak()

    def _leave_out(self, variants: Sequence[Variant], what: str) -> None:
        self.left_out += [f"{variant} ({what})" for variant in variants]

    # --- the record ------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Everything so far, as plain data."""
        medians = {
            variant: {stage: spread(values)["median"] for stage, values in row.times.items()}
            for variant, row in self.rows.items()
        }
        return {
            "family": self.large.family,
            "tiles": self.tiles,
            "batch": self.batch,
            "prompt_tokens": self.inputs["input_ids"].shape[1],
            "native_tokens": self.native["inputs_embeds"].shape[1],
            "rounds": self.rounds,
            "output_difference": self.difference,
            "variants": [
                {
                    "method": variant.method,
                    "budget": variant.budget,
                    **row.facts,
                    "ms": {stage: spread(values) for stage, values in row.times.items()},
                    "ratios": ratios(variant, medians),
                }
                for variant, row in self.rows.items()
            ],
        }


def ratios(variant: Variant, medians: dict[Variant, dict[str, float]]) -> dict[str, float]:
    """Of medians; only those whose both sides were measured.

    ``ttft_speedup``: the unpatched time to the first token over this one. ``overhead``: probes, selection, compaction
    and drops over the unpatched prefill. ``against_native``: prefill with all of these over that of the language model
    natively fed as many tokens within the unpatched model; ``against_native_ahead``: over the same alone, its launches
    issued ahead.
    """
    own, full, native = (medians.get(each, {}) for each in (variant, FULL, NATIVE))
    found = {}
    if variant.patched and own and full:
        found["ttft_speedup"] = full["ttft"] / own["ttft"]
        found["overhead"] = own["selection"] / full["prefill"]
        found["prefill_speedup"] = full["prefill"] / own["own_prefill"]
    if variant.patched and variant.method != "fastv" and variant.budget == NATIVE_BUDGET and own and native:
        found["against_native"] = own["own_prefill"] / native["prefill"]
        found["against_native_ahead"] = own["own_prefill"] / native["prefill_ahead"]
    return found


@contextmanager
def clocked(module: Any) -> Iterator[list[Interval]]:
    """Times every call of a module meanwhile, on the device's clock."""
    calls: list[Interval] = []

    def begin(module: Any, args: Any) -> None:
        calls.append(Interval(next(module.parameters()).device))

    def end(module: Any, args: Any, output: Any) -> None:
        calls[-1].stop()

    hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
