"""How good a pruned model is on calibration prompts; higher is better for every metric.

A model is judged by its first ``tokens`` answer tokens. The tokens of the label (or of the full model's answer) are
forced, and each counts as found where the model would have chosen it: exactly what greedy decoding would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch

from ..errors import OptionError
from .checks import whole

MetricName = Literal["accuracy", "agreement", "kl"]
_TOLERANCES = {"accuracy": 0.01, "agreement": 0.01, "kl": 0.02}


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: ``"accuracy"``: the label is the greedy answer. ``"agreement"``: the full model's greedy answer is the
            greedy answer. ``"kl"``: minus the Kullback-Leibler divergence, in nats, of the first token's distribution
            from the full model's.
        tokens: Answer tokens that must all agree; a label may have fewer. 1 is cheapest: the prompt pass decides.
    """

    name: MetricName
    tokens: int = 1

    def __post_init__(self) -> None:
        """Check name and tokens."""
        if self.name not in get_args(MetricName):
            raise OptionError(f"metric must be one of {', '.join(get_args(MetricName))}, got {self.name!r}")
        whole("answer_tokens", self.tokens)
        if self.name == "kl" and self.tokens != 1:
            raise OptionError("metric 'kl' looks at the first answer token only; use answer_tokens=1")

    @property
    def labelled(self) -> bool:
        """Every prompt needs an answer."""
        return self.name == "accuracy"

    @property
    def default_tolerance(self) -> float:
        """1 % of the full model's quality, or 0.02 nats (assumption A4, ours)."""
        return _TOLERANCES[self.name]

    def allowed(self, tolerance: Any) -> float:
        """The tolerance that was asked for; None is the default.

        Raises:
            OptionError: No number above 0; or, but for ``"kl"``, the whole quality, at which every schedule would do.
        """
        if tolerance is None:
            return self.default_tolerance
        number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
        if not number or not math.isfinite(tolerance) or not tolerance > 0:
            raise OptionError(f"tolerance must be a number above 0, such as 0.01, got {tolerance!r}")
        if self.name != "kl" and tolerance >= 1:
            raise OptionError(
                f"tolerance is the share of the full model's {self.name} that may be lost, below 1 (0.01 is 1 %), got "
                f"{tolerance!r}"
            )
        return float(tolerance)

    def floor(self, full: float, tolerance: float) -> float:
        """The least quality that is still good enough.

        Args:
            full: Quality of the full model.
            tolerance: Share of it that may be lost; nats for ``"kl"``.
        """
        return full - tolerance if self.name == "kl" else full * (1 - tolerance)

    def value(self, logits: torch.Tensor, reference: torch.Tensor) -> float:
        """The metric on one prompt.

        Args:
            logits: [t, V] at the answer tokens.
            reference: [t] int64 tokens that should come; for ``"kl"`` [1, V] logits of the full model.
        """
        if self.name == "kl":
            expected, found = (x.double().log_softmax(-1) for x in (reference, logits))
            return -float(torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum"))
        return float((logits.argmax(-1) == reference).all())

    def __str__(self) -> str:
        """Name and tokens."""
        return self.name if self.tokens == 1 else f"{self.name} over {self.tokens} tokens"
