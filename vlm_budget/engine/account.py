"""Collects what one prompt pass does, for the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..budget import Budget
from ..cost import CostModel
from ..layout import Modality, VisualLayout
from ..payoff import Batch, Measured, forecast, warnings_for
from ..plan import Plan
from ..report import KeptItem, Report
from .cache import cache_state
from .clock import Interval, total_ms
from .local import CallLocal
from .promises import Promises
from .run import DropRun

STAGES = ("encode", "probe", "select", "compact", "prefill", "drop", "decode", "translate")


@dataclass(eq=False)
class Account:
    """Running account of one pass.

    Attributes:
        plan: Set once counts are known.
        layout: Set with it: the items the counts are for.
        keep: Set with it: per modality, [R, V] bool over a prompt's visual tokens of that modality in order.
        text: Set with it: counts the text tokens per prompt, None for a further turn on a filled cache.
        rows: Batch rows of the language model's call.
        steps: Per decoder layer at which tokens were dropped, per prompt, per item, the positions left.
        stages: Measured intervals per stage.
        kv: Bytes that the prompt takes in the cache, and those it would take unpruned.
        promises: What the methods are held to, in this pass and all others of the patch.
    """

    plan: Plan | None = None
    layout: VisualLayout | None = None
    keep: dict[Modality, torch.Tensor] = field(default_factory=dict)
    text: Callable[[], list[int]] | None = None
    rows: int = 1
    steps: dict[int, list[list[torch.Tensor]]] = field(default_factory=dict)
    stages: dict[str, list[Interval]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    kv: tuple[int, int] = (0, 0)
    promises: Promises = field(default_factory=Promises)

    def note_cache(self, cache: Any, virtual: int) -> None:
        """Remember the cache's size after the prompt, ``virtual`` columns long in the caller's eyes."""
        state, column = cache_state(cache), column_bytes(cache)
        physical = [virtual - (state.delta + state.missing(layer) if state else 0) for layer in range(len(column))]
        self.kv = (sum(a * b for a, b in zip(column, physical, strict=True)), sum(column) * virtual)

    def note_drops(self, run: DropRun) -> None:
        """Remember what was dropped inside the language model, and the time it took."""
        self.stages["drop"] += run.intervals
        for layer, prompts in run.kept:
            self.steps[layer] = [[item.alive for item in prompt.items] for prompt in prompts]

    def kept(self) -> tuple[KeptItem, ...]:
        """Kept positions per item, in plan order. Reads the selection off the device.

        Raises:
            SelectionError: A method broke its promise.
        """
        self.promises.settle(wait=True)
        found: list[KeptItem] = []
        flags = {modality: table.cpu() for modality, table in self.keep.items()}
        for row, items in enumerate(self.layout.rows if self.layout else ()):
            start: dict[Modality, int] = dict.fromkeys(flags, 0)
            for order, item in enumerate(items):
                begin = start[item.modality]
                start[item.modality] = stop = begin + item.size
                kept = flags[item.modality][row, begin:stop].nonzero().flatten()
                steps = tuple((layer, tuple(left[row][order].tolist())) for layer, left in sorted(self.steps.items()))
                found.append(KeptItem(row, item, tuple(kept.tolist()), steps))
        return tuple(found)

    def report(self, method: str, budget: Budget | str, positions: str, cost: CostModel) -> Report:
        """The account as a report. Waits for the device if it is still at work.

        Args:
            method: The methods.
            budget: What each prompt could spend, or in words what decided instead.
            positions: The position ids in use.
            cost: Prices of the model.

        Raises:
            SelectionError: A method broke its promise.
        """
        self.promises.settle(wait=True)
        bare = self._bare_report(method, str(budget), positions)
        if self.plan is None or self.layout is None or self.text is None or not self.plan.items:
            return bare
        seen = Measured(
            encode_ms=bare.encode_ms,
            probe_ms=bare.probe_ms,
            select_ms=bare.select_ms,
            compact_ms=bare.compact_ms,
            prefill_ms=bare.prefill_ms,
            drop_ms=bare.drop_ms,
            decode_ms=(bare.decode_ms_per_token or 0) * bare.decode_steps,
            decode_steps=bare.decode_steps,
            rows=self.rows,
            kv_bytes=bare.kv_bytes,
        )
        batch = Batch(cost, self.plan, self.layout, self.text())
        found = forecast(batch, budget if isinstance(budget, Budget) else None, seen)
        return replace(bare, forecast=found, warnings=warnings_for(batch, found, seen))

    def _bare_report(self, method: str, budget: str, positions: str) -> Report:
        ms = {stage: total_ms(intervals) for stage, intervals in self.stages.items()}
        steps = len(self.stages["decode"])
        return Report(
            method=method,
            budget=budget,
            positions=positions,
            plan=self.plan or Plan(method, budget, (), 0),
            encode_ms=ms["encode"],
            probe_ms=ms["probe"],
            select_ms=ms["select"],
            compact_ms=ms["compact"],
            prefill_ms=ms["prefill"],
            drop_ms=ms["drop"],
            decode_steps=steps,
            decode_ms_per_token=(ms["decode"] + ms["translate"]) / steps if steps else None,
            kv_bytes=self.kv[0],
            kv_bytes_unpruned=self.kv[1],
        )


class Accounts:
    """The accounts of a patch: calls are booked per thread, and the account opened last is the one to report.

    Attributes:
        promises: What the methods are held to.
        last: The account to report; None before the first prompt.
    """

    def __init__(self) -> None:
        self.promises = Promises()
        self.last: Account | None = None
        self._local = CallLocal()

    def open(self) -> Account:
        """A new account for this thread."""
        self.last = self._local.account = Account(promises=self.promises)
        return self.last

    def current(self) -> Account:
        """This thread's account."""
        return getattr(self._local, "account", None) or self.open()

    def reopen(self, account: Account) -> None:
        """Go on with an earlier account of this thread."""
        self.last = self._local.account = account


def column_bytes(cache: Any) -> list[int]:
    """Bytes one column takes per layer, over all batch rows, read off the tensors a cache holds."""
    sizes: list[int] = []
    for layer in getattr(cache, "layers", ()):
        tensors = [getattr(layer, name, None) for name in ("keys", "values")]
        held = [t for t in tensors if t is not None and t.ndim == 4]
        sizes.append(sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in held))
    return sizes
