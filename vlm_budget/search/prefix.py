"""Schedules judged from where a search has settled the first layers on, so that only the layers behind run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..decoder import DecoderPruner
from ..engine.layers import LayerDropper
from ..engine.prefix import Prefix, advance_prefix, capture_prefix, head_logits, run_suffix
from ..layout import VisualLayout
from ..patching import patch
from ..plan import Plan
from ..planning import Methods, make_plan
from ..registry import PRUNERS
from .data import Example
from .greedy import Rates
from .judge import Judge, Score

ROOM = 4 * 2**30
"""Bytes that prefixes may hold. Prompts that do not fit run all their layers."""


class PrefixJudge:
    """Judges schedules of keep rates that share their first layers.

    Args:
        judge: Judges the model; by first answer tokens.
        queries: Whose attention ranks, see the method ``"gsearch"``.
        first: First layer that may drop.
        room: Bytes that prefixes may hold.
    """

    def __init__(self, judge: Judge, queries: str, first: int, room: int = ROOM) -> None:
        self.judge = judge
        self.queries = queries
        self.first = first
        self.room = room
        self._fixed: Rates = (1.0,) * first
        self._reached: Rates = ()
        self._start: list[Prefix | None] = []
        self._prefixes: list[Prefix | None] = []

    def fix(self, rates: Rates) -> None:
        """All schedules that follow begin with these rates."""
        self._fixed = rates

    def score(self, rates: Rates) -> Score:
        """Judge a schedule.

        Args:
            rates: One per decoder layer, the fixed ones first.
        """
        assert rates[: len(self._fixed)] == self._fixed, "the schedule does not begin with the fixed rates"
        judge = self.judge
        with judge.judging():
            self._settle()
            logits: dict[int, torch.Tensor] = {}
            ends: dict[int, torch.Tensor] = {}
            with patch(judge.model, self._method(rates)) as handle:
                for index, (batch, prefix) in enumerate(zip(judge.batches, self._prefixes, strict=True)):
                    if prefix is None:
                        logits[index] = judge.first_logits(batch)
                    else:
                        ends[index] = run_suffix(prefix, dropper_of(handle), self._plan(batch, rates))
            for index, end in ends.items():
                inputs = judge.inputs_of(judge.batches[index])
                logits[index] = head_logits(judge.model, judge.base, inputs, end)
            return judge.score_logits([logits[index] for index in range(len(judge.batches))])

    def _settle(self) -> None:
        """Bring every prefix to the layer behind the fixed rates."""
        drop_all = self._method((1.0,) * self.first + (0.0,) * (self.judge.layers - self.first))
        if self._reached != self._fixed[: len(self._reached)] or not self._start:
            self._prefixes, self._reached = list(self._start), (1.0,) * self.first
        if self._start and self._reached == self._fixed:
            return
        with patch(self.judge.model, drop_all) as handle:
            if not self._start:
                self._start = self._captured(dropper_of(handle))
                self._prefixes = list(self._start)
            while len(self._reached) < len(self._fixed):
                layer = len(self._reached)
                rates = self._fixed[: layer + 1]
                rates += (rates[-1],) * (self.judge.layers - len(rates))
                for index, (batch, prefix) in enumerate(zip(self.judge.batches, self._prefixes, strict=True)):
                    if prefix is not None:
                        plan = self._plan(batch, rates)
                        self._prefixes[index] = advance_prefix(prefix, dropper_of(handle), plan)
                self._reached = self._fixed[: layer + 1]

    def _captured(self, dropper: LayerDropper) -> list[Prefix | None]:
        found: list[Prefix | None] = []
        left = self.room // 2  # the prefixes at the first layer and those at the layer at hand
        for batch in self.judge.batches:
            if left > 0:
                prefix = capture_prefix(self.judge.model, self.judge.inputs_of(batch), dropper, self.first)
                left -= prefix.nbytes
            found.append(prefix if left > 0 else None)
        return found

    def _method(self, rates: Rates) -> DecoderPruner:
        method: DecoderPruner = PRUNERS.get("gsearch")(rates=rates, queries=self.queries)
        return method

    def _plan(self, batch: Sequence[Example], rates: Rates) -> Plan:
        layout = VisualLayout(tuple(example.layout.rows[0] for example in batch))
        return make_plan(Methods(None, self._method(rates)), None, layout, self.judge.facts(batch))


def dropper_of(handle: Any) -> LayerDropper:
    """What drops inside the language model of a patched model."""
    dropper: LayerDropper | None = handle._boundary.dropper
    assert dropper is not None, "the method acts inside the language model"
    return dropper
