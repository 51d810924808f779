"""The unpruned model against the budget: same prompt, same backend, same run."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..budget import Budget
from ..errors import PlanMismatchWarning
from .loading import Loaded
from .progress import Runs, TokenClock

if TYPE_CHECKING:
    from ..patching import PatchHandle
    from ..payoff import Promise
    from ..planning import Methods
    from ..pruner import Pruner
    from ..recipe import Recipe
    from ..report import KeptItem, Report

FULL = "100%"
_LONG = 60  # a method's configuration above this length is not spelled out in titles


@dataclass(frozen=True)
class Side:
    """One column: an answer and what it took. Times are medians over the repeats.

    Attributes:
        answer: The generated text.
        visual_tokens: Visual tokens that entered the language model.
        mean_tokens: Mean over its decoder layers, fewer where tokens are dropped inside.
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
    mean_tokens: float
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
        promise: Of a budget in real units, what it allowed and what it took; else None.
        warnings: Why pruning is predicted not to pay, and what else the report warns of. Both are of the repeat whose
            prefill took the median time, so that no outlier speaks for the medians beside them.
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
        names = ("visual_tokens", "mean_tokens", "first_token_ms", "prefill_ms", "decode_ms_per_token", "kv_bytes")
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
        methods: What prunes.
        budget: What it may spend; None where the methods' fields say what stays.
        positions: Override of its position ids.
        max_new_tokens: Longest answer.
        repeats: Measured rounds; two short runs warm up before them.
        recipe: Where methods and budget came from, if from one.
    """

    methods: Methods
    budget: Budget | None
    positions: str | None
    max_new_tokens: int
    repeats: int
    recipe: Recipe | None = None

    @property
    def runs(self) -> int:
        """Calls of ``generate`` that :func:`compare` makes."""
        return 2 + 3 * self.repeats

    @property
    def name(self) -> str:
        """The pruned column's heading."""
        return "pruned" if self.budget is None else str(self.budget)

    @property
    def title(self) -> str:
        """Methods and budget."""
        members = (self.methods.vision, self.methods.decoder)
        method = " + ".join(short(one) for one in members if one is not None)
        what = f"{method}, a fixed schedule" if self.budget is None else f"{method} at {self.budget}"
        return what if self.recipe is None else f"{what}, by the plan"

    def patch(self, model: Any) -> PatchHandle:
        """Patch a model with the methods within the budget."""
        from ..patching import patch

        if self.recipe is not None:
            return patch(model, plan=self.recipe, positions=self.positions)
        members = [one for one in (self.methods.vision, self.methods.decoder) if one is not None]
        return patch(model, members, self.budget, positions=self.positions)

    def patch_full(self, model: Any) -> PatchHandle:
        """Patch a model so that it keeps all and computes the same: with a method that reads nothing."""
        from ..patching import patch

        return patch(model, "uniform", Budget(1.0))


def short(pruner: Pruner) -> str:
    """A method for a title: without the brackets of an empty configuration, and without a long one."""
    told = str(pruner)
    return f"{type(pruner).__name__}(...)" if len(told) > _LONG else told.removesuffix("()")


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
    with setting.patch(loaded.model) as handle:
        far = _plan(handle, inputs)
        runs.begin("warming up")
        _answer(loaded, inputs, replace(setting, max_new_tokens=2), runs)
    _answer(loaded, inputs, replace(setting, max_new_tokens=2), runs)
    full: list[Side] = []
    pruned: list[Side] = []
    reports: list[Report] = []
    for _ in range(setting.repeats):
        runs.begin(f"answering at {FULL}")
        answer = _answer(loaded, inputs, setting, runs)
        with setting.patch_full(loaded.model) as handle:
            whole = _side(loaded, _answer(loaded, inputs, setting, runs), handle.report())
        runs.begin(f"answering, {setting.name}")
        with setting.patch(loaded.model) as handle:
            answered = _answer(loaded, inputs, setting, runs)
            reports.append(handle.report())
        pruned.append(_side(loaded, answered, reports[-1]))
        full.append(replace(whole, answer=answer.text, first_token_ms=answer.first_token_ms))
    report = middle(reports)
    promise = report.forecast.promise if report.forecast is not None else None
    facts = (report.positions, report.text_only, promise, (*far, *report.warnings))
    return Comparison(_median(full), _median(pruned), handle.kept(), *facts)


def middle(reports: Sequence[Report]) -> Report:
    """The report whose prefill took the median time, the lower one of two."""
    return sorted(reports, key=lambda report: report.prefill_ms)[(len(reports) - 1) // 2]


def _plan(handle: PatchHandle, inputs: Any) -> tuple[str, ...]:
    """Plan the prompt, and give what a recipe says of a prompt far from those it was made on."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", PlanMismatchWarning)
        handle.plan(**inputs)
    return tuple(str(one.message) for one in told if issubclass(one.category, PlanMismatchWarning))


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


def _side(loaded: Loaded, answer: _Answer, report: Report) -> Side:
    from ..models import find_family

    _, base, family = find_family(loaded.model)
    decoder: Any = family.language_model(base)
    return Side(
        answer=answer.text,
        visual_tokens=report.kept_tokens,
        mean_tokens=report.plan.mean_tokens(len(decoder.layers)),
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
