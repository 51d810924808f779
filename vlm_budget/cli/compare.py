"""The unpruned model against the budget: same prompt, same backend, same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..budget import Budget
from .loading import Loaded
from .progress import Runs, TokenClock

if TYPE_CHECKING:
    from ..patching import PatchHandle
    from ..payoff import Promise
    from ..pruner import Pruner
    from ..report import KeptItem

FULL = "100%"


@dataclass(frozen=True)
class Side:
    """One column: an answer and what it took. Times are medians over the repeats.

    Attributes:
        answer: The generated text.
        visual_tokens: Visual tokens the language model saw.
        new_tokens: Generated tokens.
        first_token_ms: Wall clock from the call of ``generate`` to the first token: all of the below and all else.
        encode_ms: Vision tower and projector, the method's probes included.
        selection_ms: Choosing the tokens, the probes that give the scores included.
        compact_ms: Gathering what stays of the prompt and mapping its outputs back.
        prefill_ms: Language model over the prompt.
        decode_ms_per_token: Language model per further token; None when one token was the answer.
        kv_bytes: Cache of the prompt.
    """

    answer: str
    visual_tokens: int
    new_tokens: int
    first_token_ms: float
    encode_ms: float
    selection_ms: float
    compact_ms: float
    prefill_ms: float
    decode_ms_per_token: float | None
    kv_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Both columns, and which tokens the budget kept.

    Attributes:
        full: The unpruned model.
        pruned: The budget.
        kept: Per image, the kept positions.
        positions: ``"packed"`` or ``"original"``, as used.
        text_only: There was nothing to prune.
        promise: Of a budget in real units, what it allowed and what the last run took; else None.
        warnings: Why pruning is predicted not to pay, by the last run.
    """

    full: Side
    pruned: Side
    kept: tuple[KeptItem, ...]
    positions: str
    text_only: bool
    promise: Promise | None = None
    warnings: tuple[str, ...] = ()

    def ratios(self) -> dict[str, float | None]:
        """Full over pruned; above 1 the budget is the smaller."""
        names = ("visual_tokens", "first_token_ms", "prefill_ms", "decode_ms_per_token", "kv_bytes")
        return {name: ratio(getattr(self.full, name), getattr(self.pruned, name)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "full": asdict(self.full),
            "pruned": asdict(self.pruned),
            "ratio": self.ratios(),
            "positions": self.positions,
            "text_only": self.text_only,
            "promise": None if self.promise is None else asdict(self.promise),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Setting:
    """What to compare.

    Attributes:
        pruner: The method.
        budget: What it may spend.
        positions: Override of its position ids.
        max_new_tokens: Longest answer.
        repeats: Measured rounds; two short runs warm up before them.
    """

    pruner: Pruner
    budget: Budget
    positions: str | None
    max_new_tokens: int
    repeats: int

    @property
    def runs(self) -> int:
        """Calls of ``generate`` that :func:`compare` makes."""
        return 2 + 3 * self.repeats

    def patch(self, model: Any, budget: Budget) -> PatchHandle:
        """Patch a model with the method at a budget."""
        from ..patching import patch

        return patch(model, self.pruner, budget, positions=self.positions)


def ratio(full: float | None, pruned: float | None) -> float | None:
    """How many times more the unpruned model takes; None where that means nothing."""
    return None if full is None or not pruned else full / pruned


def compare(loaded: Loaded, inputs: Any, setting: Setting, runs: Runs) -> Comparison:
    """Answer one prompt both ways, in turns, so that a slow minute hits both.

    The unpruned answer and its time to the first token are the unpatched model's own; its stages are read off a second
    run that is patched with a budget of 100 %, which computes the same.

    Raises:
        BudgetError: The prompt cannot meet the budget; said before anything runs.
    """
    with setting.patch(loaded.model, setting.budget) as handle:
        handle.plan(**inputs)
        runs.begin("warming up")
        _answer(loaded, inputs, replace(setting, max_new_tokens=2), runs)
    _answer(loaded, inputs, replace(setting, max_new_tokens=2), runs)
    full: list[Side] = []
    pruned: list[Side] = []
    for _ in range(setting.repeats):
        runs.begin(f"answering at {FULL}")
        answer = _answer(loaded, inputs, setting, runs)
        with setting.patch(loaded.model, Budget(1.0)) as handle:
            whole = _side(_answer(loaded, inputs, setting, runs), handle)
        runs.begin(f"answering at {setting.budget}")
        with setting.patch(loaded.model, setting.budget) as handle:
            pruned.append(_side(_answer(loaded, inputs, setting, runs), handle))
        full.append(replace(whole, answer=answer.text, first_token_ms=answer.first_token_ms))
    report = handle.report()
    promise = report.forecast.promise if report.forecast is not None else None
    facts = (report.positions, report.text_only, promise, report.warnings)
    return Comparison(_median(full), _median(pruned), handle.kept(), *facts)


@dataclass(frozen=True)
class _Answer:
    """What one ``generate`` gave."""

    text: str
    tokens: int
    first_token_ms: float


def _answer(loaded: Loaded, inputs: Any, setting: Setting, runs: Runs) -> _Answer:
    import torch

    clock = TokenClock(runs.token)
    with torch.inference_mode():
        ids = loaded.model.generate(
            **inputs, max_new_tokens=setting.max_new_tokens, do_sample=False, num_beams=1, streamer=clock
        )
    runs.end()
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = loaded.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    return _Answer(text, len(new), clock.first_token_ms)


def _side(answer: _Answer, handle: PatchHandle) -> Side:
    report = handle.report()
    return Side(
        answer=answer.text,
        visual_tokens=report.kept_tokens,
        new_tokens=answer.tokens,
        first_token_ms=answer.first_token_ms,
        encode_ms=report.encode_ms,
        selection_ms=report.probe_ms + report.select_ms,
        compact_ms=report.compact_ms,
        prefill_ms=report.prefill_ms,
        decode_ms_per_token=report.decode_ms_per_token,
        kv_bytes=report.kv_bytes,
    )


def _median(sides: Sequence[Side]) -> Side:
    """The last side with the medians of all times."""
    times: dict[str, Any] = {
        name: statistics.median(getattr(side, name) for side in sides)
        for name in ("first_token_ms", "encode_ms", "selection_ms", "compact_ms", "prefill_ms")
    }
    decode = [side.decode_ms_per_token for side in sides if side.decode_ms_per_token is not None]
    times["decode_ms_per_token"] = statistics.median(decode) if decode else None
    return Side(**(asdict(sides[-1]) | times))
