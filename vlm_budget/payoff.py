"""What a pass cost and saved, what its budget promised, and warnings when pruning is predicted not to pay.

Everything is judged on the pass itself: its measured times, its exact counts, and how much less the language model had
to do. How long the unpruned prefill would have taken is predicted, from the measured one times a ratio: that of the
calibrated times where this model was calibrated on this machine, else that of FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .budget import Budget, Unit, in_words
from .cost import CostModel
from .errors import LatencyError
from .layout import VisualLayout
from .plan import Plan

MIN_GAIN = 0.05
"""Below this share of the whole call, pruning is said not to pay."""
MOST = 0.5
"""What takes more than this share of the call is named as its bottleneck."""
MISSED = 0.1
"""A prefill that takes more than this share over what the budget allows is said to miss it."""
FEW = 0.2
"""Visual tokens with less than this share of the prefill's FLOPs are named as few."""


@dataclass(frozen=True)
class Measured:
    """What a pass took.

    Attributes:
        encode_ms: Vision tower and projector, score probes included.
        probe_ms: The probes' part of it.
        select_ms: Choosing tokens before the language model.
        compact_ms: Gathering what is kept, and growing the output back.
        prefill_ms: Language model over the prompt, drops inside it included.
        drop_ms: Their part of it.
        decode_ms: All calls after the prompt.
        decode_steps: How many.
        rows: Batch rows of the language model's call, copies of a prompt included.
        kv_bytes: Cache that the rows hold after the prompt; 0 without a cache.
    """

    encode_ms: float
    probe_ms: float
    select_ms: float
    compact_ms: float
    prefill_ms: float
    drop_ms: float
    decode_ms: float
    decode_steps: int
    rows: int
    kv_bytes: int

    @property
    def overhead_ms(self) -> float:
        """What pruning adds: probes, selection, compaction and drops."""
        return self.probe_ms + self.select_ms + self.compact_ms + self.drop_ms

    @property
    def bare_prefill_ms(self) -> float:
        """The language model over the prompt without the choosing inside it."""
        return self.prefill_ms - self.drop_ms


@dataclass(frozen=True)
class Promise:
    """A budget in real units and what came of it, for the dearest prompt of the batch.

    Attributes:
        unit: ``"flops"``, ``"ms"`` or ``"bytes"``.
        allowed: What the budget gives the prompt.
        planned: What its plan was predicted to take, at most that.
        achieved: What it took. Bytes and milliseconds are measured, the latter without what choosing takes, which the
            budget does not price. FLOPs are counted by the formula from the tokens that were kept, so that they equal
            ``planned``. None for milliseconds of several prompts at once, and for bytes without a cache.
    """

    unit: Unit
    allowed: float
    planned: float
    achieved: float | None

    def __str__(self) -> str:
        """The three amounts."""
        took = "not measurable here" if self.achieved is None else f"took {in_words(self.achieved, self.unit)}"
        if self.unit == "flops" and self.achieved is not None:
            took = f"{in_words(self.achieved, self.unit)} by the tokens kept"
        return f"{in_words(self.allowed, self.unit)} allowed, {in_words(self.planned, self.unit)} planned, {took}"


@dataclass(frozen=True)
class Forecast:
    """What was computed, and what pruning is predicted to have saved. Sums over the prompts of the batch.

    Attributes:
        prefill_flops: FLOPs of the language model over the prompt, with the tokens that were kept.
        prefill_flops_unpruned: With all tokens.
        encoder_flops: FLOPs of vision tower and projector, which run in full.
        prefill_ms_unpruned: Predicted time of the unpruned prefill.
        overhead_ms: Measured time of probes, selection, compaction and drops.
        saved_ms: Predicted saving of the whole call, overhead taken off; negative where pruning costs more.
        saved_share: Of the unpruned call.
        calibrated: Predicted with a calibration, not by FLOPs.
        promise: What a budget in FLOPs, milliseconds or bytes promised; None for other budgets.
    """

    prefill_flops: int
    prefill_flops_unpruned: int
    encoder_flops: int
    prefill_ms_unpruned: float
    overhead_ms: float
    saved_ms: float
    saved_share: float
    calibrated: bool
    promise: Promise | None


@dataclass(frozen=True)
class Batch:
    """The prompts of a pass and their prices.

    Attributes:
        cost: Prices.
        plan: Counts, checked against what was kept.
        layout: Items.
        text: Text tokens per prompt.
    """

    cost: CostModel
    plan: Plan
    layout: VisualLayout
    text: Sequence[int]

    @property
    def pruned(self) -> list[list[int]]:
        """Per prompt with visual tokens, and layer, the visual tokens that were kept."""
        return [self.plan.row_tokens(row, len(self.cost.layers)) for row in self._rows]

    @property
    def unpruned(self) -> list[list[int]]:
        """Per prompt with visual tokens, and layer, all of them."""
        return [[sum(item.size for item in self.layout.rows[row])] * len(self.cost.layers) for row in self._rows]

    @property
    def texts(self) -> list[int]:
        """Text tokens per prompt with visual tokens."""
        return [self.text[row] for row in self._rows]

    @property
    def _rows(self) -> list[int]:
        return [row for row, items in enumerate(self.layout.rows) if items]

    def total(self, unit: Unit, visual: Sequence[Sequence[int]]) -> float:
        """Sum over the prompts."""
        return sum(self.cost.amount(unit, text, counts) for text, counts in zip(self.texts, visual, strict=True))


def forecast(batch: Batch, budget: Budget | None, seen: Measured) -> Forecast:
    """The account of a pass that brought visual tokens.

    Args:
        batch: Prompts and prices.
        budget: What each prompt could spend; None where a plan was replayed or the method's fields decide.
        seen: What the pass took.
    """
    pruned, unpruned = batch.total("flops", batch.pruned), batch.total("flops", batch.unpruned)
    try:
        ratio = batch.total("ms", batch.unpruned) / batch.total("ms", batch.pruned)
        shorter_ms = _decode_saving(batch, seen.decode_steps)
        calibrated = True
    except LatencyError:
        ratio, shorter_ms, calibrated = unpruned / pruned, 0.0, False
    full_ms = seen.bare_prefill_ms * ratio
    saved = full_ms - seen.bare_prefill_ms + shorter_ms - seen.overhead_ms
    call = seen.encode_ms - seen.probe_ms + full_ms + seen.decode_ms + shorter_ms
    return Forecast(
        prefill_flops=int(pruned),
        prefill_flops_unpruned=int(unpruned),
        encoder_flops=batch.cost.encoder(item for row in batch.layout.rows for item in row),
        prefill_ms_unpruned=full_ms,
        overhead_ms=seen.overhead_ms,
        saved_ms=saved,
        saved_share=saved / call if call else 0.0,
        calibrated=calibrated,
        promise=_promise(batch, budget, seen),
    )


def _decode_saving(batch: Batch, steps: int) -> float:
    """Milliseconds that decoding saves by a shorter cache: by the longest row, as a batch steps together."""
    latency, layers = batch.cost.latency(), len(batch.cost.layers)
    longest = [max(sum(counts) / layers for counts in visual) for visual in (batch.unpruned, batch.pruned)]
    return steps * (latency.decode_ms(longest[0]) - latency.decode_ms(longest[1]))


def _promise(batch: Batch, budget: Budget | None, seen: Measured) -> Promise | None:
    if budget is None or budget.unit in ("ratio", "tokens"):
        return None
    unit, cost = budget.unit, batch.cost
    found = []
    for text, pruned, unpruned in zip(batch.texts, batch.pruned, batch.unpruned, strict=True):
        allowed = budget.amount * (cost.amount(unit, text, unpruned) if budget.relative else 1)
        found.append((cost.amount(unit, text, pruned), allowed))
    planned, allowed = max(found)
    measured = {
        "flops": planned,
        "ms": seen.bare_prefill_ms if seen.rows == 1 else None,
        # Rows are padded to the longest, so the bytes of any are those of the dearest prompt.
        "bytes": seen.kv_bytes / seen.rows if seen.kv_bytes else None,
    }
    return Promise(unit, allowed, planned, measured[unit])


def warnings_for(batch: Batch, found: Forecast, seen: Measured) -> tuple[str, ...]:
    """Why pruning is predicted not to pay, or a promise was missed; empty where neither is so.

    Pruning does not pay where the predicted saving, overhead taken off, is below ``MIN_GAIN`` of the unpruned call. The
    first sentence says so with the numbers, the others name every cause that applies. A promise in milliseconds is
    missed where the prefill took over ``MISSED`` more than the budget allows.
    """
    return (*_missed(found.promise), *_not_paying(batch, found, seen))


def _missed(promise: Promise | None) -> tuple[str, ...]:
    if promise is None or promise.unit != "ms" or promise.achieved is None:
        return ()
    over = promise.achieved / promise.allowed - 1
    if over <= MISSED:
        return ()
    return (
        f"missed budget: the prefill took {in_words(promise.achieved, 'ms')}, {over:.0%} more than the "
        f"{in_words(promise.allowed, 'ms')} allowed. The machine was busy or still warming up, or is no longer what "
        "was calibrated: run again, and if it stays, vlm_budget.calibrate(model) anew while nothing else runs",
    )


def _not_paying(batch: Batch, found: Forecast, seen: Measured) -> tuple[str, ...]:
    if batch.pruned == batch.unpruned:
        return (f"nothing is dropped: all {batch.plan.total} visual tokens stay, so that nothing is saved",)
    if found.saved_share >= MIN_GAIN:
        return ()
    full_ms = found.prefill_ms_unpruned
    call = seen.encode_ms - seen.probe_ms + full_ms + seen.decode_ms
    gross = full_ms - seen.bare_prefill_ms
    by = "calibrated times" if found.calibrated else "FLOPs"
    change = f"{-found.saved_ms:.3g} ms slower" if found.saved_ms < 0 else f"only {found.saved_ms:.3g} ms faster"
    told = [
        f"pruning is predicted not to pay: it makes a call of {call:.3g} ms {change} "
        f"({abs(found.saved_share):.1%}, by {by})"
    ]
    if found.overhead_ms >= gross:
        told.append(
            f"probes, selection, compaction and drops took {found.overhead_ms:.3g} ms, the shorter prefill saves "
            f"{max(gross, 0):.3g} ms"
        )
    text_only = batch.total("flops", [[0] * len(batch.cost.layers) for _ in batch.texts])
    visual = 1 - text_only / found.prefill_flops_unpruned
    if visual < FEW:
        told.append(
            f"few visual tokens: the {batch.plan.total} of this prompt make {visual:.0%} of the prefill's FLOPs, text "
            "makes the rest"
        )
    less = 1 - found.prefill_flops / found.prefill_flops_unpruned
    if found.calibrated and gross < less / 2 * full_ms:
        told.append(
            f"short prompt: {less:.0%} fewer FLOPs make only {gross / full_ms:.0%} less time, since this device is "
            "bound by other costs at such lengths"
        )
    if seen.decode_ms > MOST * call:
        told.append(
            f"decode-bound: {seen.decode_steps} decoding steps take {seen.decode_ms / call:.0%} of the call; a shorter "
            f"prefill can save {full_ms / call:.0%} at most"
        )
    encode_ms = seen.encode_ms - seen.probe_ms
    if encode_ms > MOST * call:
        told.append(f"encoder-bound: the vision encoder takes {encode_ms / call:.0%} of the call and runs in full")
    if less < MIN_GAIN:
        told.append(f"little is dropped: the prefill has {less:.1%} fewer FLOPs")
    return tuple(told)
