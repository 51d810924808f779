"""G-Search: a keep rate of its own for every layer of the language model, found by search.

Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction, arXiv 2412.00556 (CVPR 2025).
Only the abstract and summaries of the paper were at hand; its text and code were not. Theirs: tokens are ranked by the
attention of the previous layer, what a layer keeps is a subset of what the layer before kept, and the smallest rate is
searched from shallow to deep. Ours, where the paper could not be read: which queries rank (A1), that the first two
layers keep everything (A2), the rounding, and how the search tries a rate (``vlm_budget.gsearch``).

This file applies rates. Layer ``l`` keeps ``ceil(rates[l] * N)`` of a prompt's ``N`` visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch

from vlm_budget.decoder import DecoderContext, DecoderPruner, Step, most_attended, too_early
from vlm_budget.errors import OptionError

from .psigmoid import PSigmoid, asking_rows, check_queries, counts_of, curve_steps, steps_of


@dataclass(frozen=True, kw_only=True)
class GSearch(DecoderPruner):
    """Keep a given rate of the tokens at every layer, by the attention of the instruction in the layer before.

    Attributes:
        rates: Keep rate per decoder layer, never rising, 1 for the first two; empty follows P-Sigmoid's default curve
            within a budget, which nobody searched (ours, for a first look).
        queries: Whose attention ranks: all text behind the picture, or the prompt's last token as in FastV.
    """

    rates: tuple[float, ...] = ()
    queries: Literal["instruction", "last"] = "instruction"

    paper = "arXiv 2412.00556"

    def __post_init__(self) -> None:
        """Check the rates."""
        super().__post_init__()
        check_queries(self.queries)
        listed = isinstance(self.rates, Iterable) and not isinstance(self.rates, str | bytes)
        given: list[Any] = list(self.rates) if listed else [None]
        if any(isinstance(rate, bool) or not isinstance(rate, Real) for rate in given):
            raise OptionError(f"rates must be one number per decoder layer, got {self.rates!r}")
        if any(not 0 <= rate <= 1 for rate in given):
            raise OptionError(f"every rate must lie in [0, 1], got {self.rates!r}")
        rates = tuple(float(rate) for rate in given)
        object.__setattr__(self, "rates", rates)  # a list from JSON would make the method unhashable
        if any(rate != 1 for rate in rates[:2]):
            raise OptionError(f"the first two layers keep every token (their ranking means nothing yet), got {rates}")
        if any(deep > shallow for shallow, deep in zip(rates, rates[1:], strict=False)):
            raise OptionError(f"rates must never rise, since dropped tokens do not return; got {rates}")

    @property
    def fixed(self) -> bool:
        """Given rates leave nothing for a budget to say."""
        return bool(self.rates)

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """Steps where a rate falls.

        Raises:
            OptionError: The rates are for another number of layers.
            BudgetError: Without rates: the budget is below what the first layers take.
        """
        return self.schedule_behind(1, tokens, spend, layers)

    def schedule_behind(self, first: int, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """The same, where no layer before ``first`` may drop.

        Raises:
            PatchError: Given rates drop before it.
        """
        if not self.rates:
            return curve_steps(self, PSigmoid(first=max(PSigmoid.first, first)), tokens, spend, layers)
        if len(self.rates) != layers:
            raise OptionError(
                f"the rates are for {len(self.rates)} decoder layers, the model has {layers}. Search on this model."
            )
        steps = steps_of(counts_of(self.rates, tokens))
        if steps and steps[0].layer < first:
            raise too_early(self, steps[0].layer, first, f"Pass rates that are 1 for the first {first} layers.")
        return steps

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor:  # type: ignore[override]
        """The ``k`` that the instruction looks at most."""
        return most_attended(ctx, asking_rows(ctx, self.queries), k)
