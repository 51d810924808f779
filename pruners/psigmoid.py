"""P-Sigmoid: a keep rate that falls over the layers of the language model like a sigmoid.

Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction, arXiv 2412.00556 (CVPR 2025).
Only the abstract and summaries of the paper were at hand; its text and code were not. The idea is theirs: the attention
ranking of visual tokens hardly changes behind the first layer, so a layer's tokens are a subset of the layer above, and
the rate falls in an S over depth. The formula, which attention ranks (A1), the first layer that may drop (A2), and all
defaults are ours.

``t = l / (L - 1)``, ``rate(t) = low + (high - low) * sigmoid(-beta * (t - t0))``, clipped to at least one token and at
most all. A budget fixes ``t0``; ``vlm_budget.psigmoid`` searches ``beta`` and ``low`` on calibration data.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any, Literal

import torch

from vlm_budget.decoder import DecoderContext, DecoderPruner, Step, most_attended
from vlm_budget.errors import OptionError
from vlm_budget.schedules import out_of_reach

_ROUNDING = 1e-9  # tokens: a rate of 0.3 of 10 tokens is 3 tokens, not the 4 of ceil(3.0000000000000004)
_SATURATED = 50.0  # a sigmoid this far out is 0 or 1 in float64
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class PSigmoid(DecoderPruner):
    """Drop along a sigmoid over depth, by the attention of the instruction in the layer before.

    Attributes:
        beta: Steepness, above 0; large values make a step.
        t0: Depth of the middle, 0 at the first and 1 at the last layer; None solves it for the budget.
        high: Rate that the curve comes from, in (0, 1].
        low: Rate that it falls to, in [0, high]; at least one token stays in any case.
        first: First layer that may drop; the layers before it see every token. Later in models whose first layers have
            visual features added (Qwen3-VL).
        queries: Whose attention ranks: all text behind the picture, or the prompt's last token as in FastV.
    """

    beta: float = 10.0
    t0: float | None = None
    high: float = 1.0
    low: float = 0.0
    first: int = 2
    queries: Literal["instruction", "last"] = "instruction"

    paper = "arXiv 2412.00556"

    def __post_init__(self) -> None:
        """Check the curve."""
        super().__post_init__()
        check_queries(self.queries)
        if not (is_number(self.beta) and self.beta > 0):
            raise OptionError(f"beta must be a finite number above 0, got {self.beta!r}")
        if self.t0 is not None and not is_number(self.t0):
            raise OptionError(f"t0 must be finite, or None to solve it for a budget, got {self.t0!r}")
        numbers = is_number(self.low) and is_number(self.high)
        if not numbers or not 0 < self.high <= 1 or not 0 <= self.low <= self.high:
            raise OptionError(f"need 0 <= low <= high <= 1 and high > 0, got low={self.low!r}, high={self.high!r}")
        if isinstance(self.first, bool) or not isinstance(self.first, int) or self.first < 1:
            raise OptionError(f"first must be a layer from 1 on, got {self.first!r}")

    @property
    def fixed(self) -> bool:
        """A given ``t0`` leaves nothing for a budget to say."""
        return self.t0 is not None

    def rates(self, layers: int, t0: float) -> list[float]:
        """Keep rate per layer; 1 before the first layer that may drop."""
        depth = max(layers - 1, 1)
        curve = [
            self.low + (self.high - self.low) * _sigmoid(self.beta * (t0 - layer / depth)) for layer in range(layers)
        ]
        return [1.0] * min(self.first, layers) + curve[self.first :]

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """Steps along the curve; ``t0`` is the largest whose layers together stay within ``spend``.

        Raises:
            BudgetError: The first layers alone, which see everything, take more than that.
        """
        return self.schedule_behind(1, tokens, spend, layers)

    def schedule_behind(self, first: int, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """The same, where no layer before ``first`` may drop."""
        return curve_steps(self, replace(self, first=max(self.first, first)), tokens, spend, layers)

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor:  # type: ignore[override]
        """The ``k`` that the instruction looks at most."""
        return most_attended(ctx, asking_rows(ctx, self.queries), k)


def curve_steps(who: object, curve: PSigmoid, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
    """Steps along a curve, for the method ``who`` that a message names."""
    if curve.t0 is not None:
        return steps_of(_counts(curve, tokens, layers, curve.t0))
    assert spend is not None, "a method that is not fixed is given a budget"
    return _solved(who, curve, tokens, spend, layers)


def is_number(value: Any) -> bool:
    """A finite real number; text and flags are none."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def counts_of(rates: Sequence[float], tokens: int) -> list[int]:
    """``ceil(rate * tokens)`` per layer."""
    return [min(tokens, max(0, math.ceil(rate * tokens - _ROUNDING))) for rate in rates]


def steps_of(counts: Sequence[int]) -> tuple[Step, ...]:
    """The layers at whose input the count falls."""
    pairs = zip(counts, counts[1:], strict=False)
    return tuple(Step(layer, after) for layer, (before, after) in enumerate(pairs, 1) if after < before)


def asking_rows(ctx: DecoderContext, queries: str) -> torch.Tensor:
    """[r] int64 columns whose attention ranks; the last column where no text stands behind the picture."""
    return ctx.readers if queries == "instruction" else ctx.last


def check_queries(queries: str) -> None:
    """Refuse unknown queries.

    Raises:
        OptionError: Neither ``"instruction"`` nor ``"last"``.
    """
    if queries not in ("instruction", "last"):
        raise OptionError(f"queries must be 'instruction' or 'last', got {queries!r}")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(max(x, -700)) / (1 + math.exp(max(x, -700)))


def _counts(method: PSigmoid, tokens: int, layers: int, t0: float) -> list[int]:
    return [max(1, count) for count in counts_of(method.rates(layers, t0), tokens)]


@lru_cache(maxsize=4096)
def _solved(who: object, method: PSigmoid, tokens: int, spend: int, layers: int) -> tuple[Step, ...]:
    reach = _SATURATED / method.beta
    low, high = -reach, 1 + reach
    least = sum(_counts(method, tokens, layers, low))
    if least > spend:
        raise out_of_reach(who, spend, least, tokens, layers)
    if sum(_counts(method, tokens, layers, high)) <= spend:
        return steps_of(_counts(method, tokens, layers, high))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_counts(method, tokens, layers, middle)) <= spend else (low, middle)
    return steps_of(_counts(method, tokens, layers, low))
