"""What may be spent.

``Budget.parse`` accepts what users type: ``0.2`` and ``"20%"`` are ratios of the *unpruned visual tokens of a prompt*,
``128`` and ``"128 tokens"`` are tokens per prompt (one batch row, all its images together). FLOPs, milliseconds and
megabytes are understood by the grammar, and refused until a cost model can turn them into tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from numbers import Integral, Real
from typing import Literal, get_args

from .errors import BudgetError

Unit = Literal["ratio", "tokens", "flops", "ms", "bytes"]

_TEXT = re.compile(
    r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:nan|inf))\s*(%?)\s*([a-z ]*?)\s*$", re.IGNORECASE
)
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_FLOPS = {"flops": 1, "gflops": 10**9, "tflops": 10**12, "pflops": 10**15}
_TIME = {"ms": 1.0, "s": 1000.0}
_EXAMPLES = "0.2, '25%', 128, '128 tokens', '40% flops', '80 ms', '200 MB kv'"


@dataclass(frozen=True)
class Budget:
    """An amount in a unit.

    Attributes:
        amount: How much. A share in (0, 1] when ``relative``, else tokens, FLOPs, milliseconds or bytes.
        unit: ``"ratio"`` (share of visual tokens), ``"tokens"``, ``"flops"``, ``"ms"`` or ``"bytes"`` (KV cache).
        relative: The amount is a share of what the unpruned model would spend.
    """

    amount: float
    unit: Unit = "ratio"
    relative: bool = True

    def __post_init__(self) -> None:
        """Refuse what is no amount of its unit, and amounts that no input could ever meet."""
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)):
            raise BudgetError(f"amount must be a number, got {self.amount!r}. Budget.parse reads text.")
        if self.unit not in get_args(Unit):
            raise BudgetError(f"unit must be one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        if (self.unit == "ratio") > self.relative or (self.unit == "tokens") and self.relative:
            raise BudgetError(f"{self.unit!r} cannot be relative={self.relative}: a share of the tokens is a 'ratio'")
        if math.isnan(self.amount) or math.isinf(self.amount):
            raise BudgetError(f"budget must be a finite number, got {self.amount}. Try one of {_EXAMPLES}.")
        if self.amount <= 0:
            raise BudgetError(f"budget must be above 0, got {self.amount:g} {self.unit}. Try one of {_EXAMPLES}.")
        if self.relative and self.amount > 1:
            raise BudgetError(
                f"a relative budget is a share in (0, 1] or up to 100%, got {self.amount:g} (= {self.amount:.0%}). "
                f"For an absolute number of tokens pass an int, such as {max(1, round(self.amount))}, or '… tokens'."
            )
        if self.unit == "tokens" and not float(self.amount).is_integer():
            raise BudgetError(f"tokens are whole, got {self.amount:g}. Try one of {_EXAMPLES}.")

    @classmethod
    def parse(cls, value: Budget | str | float) -> Budget:
        """Read a budget the way users write it.

        Args:
            value: A :class:`Budget`, a float ratio in (0, 1], an int number of tokens, or text such as ``"25%"``,
                ``"128 tokens"``, ``"40% flops"``, ``"80 ms"``, ``"200 MB kv"``.

        Raises:
            BudgetError: Not a budget: zero, negative, NaN, above 100 %, fractional tokens, unknown unit.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, (str, Real)):
            raise BudgetError(f"cannot read a budget from {value!r} ({type(value).__name__}). Try one of {_EXAMPLES}.")
        if isinstance(value, Integral):
            return cls(_to_float(value), "tokens", relative=False)
        if isinstance(value, Real):
            return cls(_to_float(value))
        return cls._parse_text(value)

    @classmethod
    def _parse_text(cls, text: str) -> Budget:
        match = _TEXT.match(text)
        if match is None:
            raise BudgetError(f"cannot read a budget from {text!r}. Try one of {_EXAMPLES}.")
        number, percent, words = float(match[1]), match[2], match[3].lower().split()
        share = float(Decimal(match[1]) / 100) if percent else number
        unit = " ".join(words)
        for bytes_word in (" cache", " kv"):  # "200 MB kv cache", "30% kv cache"
            if unit.removesuffix(bytes_word) in (*_BYTES, *(f"{name} kv" for name in _BYTES), "kv"):
                unit = unit.removesuffix(bytes_word)
        if percent and unit in ("", "token", "tokens"):
            return cls(share)
        if not percent and unit == "":
            return cls(number) if re.search(r"[.e]", match[1], re.IGNORECASE) else cls(number, "tokens", relative=False)
        if unit in ("token", "tokens"):
            if not number.is_integer():
                raise BudgetError(
                    f"tokens are whole, got {text!r}. Did you mean '{number:g}' (a ratio) or a percentage?"
                )
            return cls(number, "tokens", relative=False)
        if percent and unit in ("flops", "kv", "cache", "time", "latency"):
            kinds: dict[str, Unit] = {"flops": "flops", "kv": "bytes", "cache": "bytes", "time": "ms", "latency": "ms"}
            return cls(share, kinds[unit], relative=True)
        if not percent and unit in _FLOPS:
            return cls(number * _FLOPS[unit], "flops", relative=False)
        if not percent and unit in _TIME:
            return cls(number * _TIME[unit], "ms", relative=False)
        if not percent and unit in _BYTES:
            return cls(number * _BYTES[unit], "bytes", relative=False)
        raise BudgetError(f"unknown unit in budget {text!r}. Try one of {_EXAMPLES}.")

    def require_token_unit(self) -> None:
        """Refuse the units that need a cost model.

        Raises:
            BudgetError: The unit is FLOPs, milliseconds or bytes.
        """
        if self.unit not in ("ratio", "tokens"):
            raise BudgetError(
                f"budget '{self}' is not yet supported: turning {self.unit} into tokens needs a cost model, which this "
                "version does not have. Use a ratio (0.2, '20%') or tokens (128, '128 tokens')."
            )

    def tokens(self, total: int, items: int = 1) -> int:
        """How many of ``total`` visual tokens may stay.

        A ratio is rounded to the nearest token (half up).

        Args:
            total: Unpruned visual tokens of one prompt.
            items: Images and videos among them; each keeps at least one token.

        Raises:
            BudgetError: More tokens than exist, fewer than one per item, or a unit that needs a cost model.
        """
        self.require_token_unit()
        wanted = int(self.amount) if self.unit == "tokens" else math.floor(self.amount * total + 0.5)
        if wanted > total:
            raise BudgetError(
                f"budget '{self}' asks for {wanted} visual tokens but the prompt has only {total}. "
                f"The nearest feasible budget is {total} tokens (or 1.0)."
            )
        if wanted < items:
            raise BudgetError(
                f"budget '{self}' leaves {wanted} of {total} visual tokens for {items} image(s) or video(s): less than "
                f"one each. The nearest feasible budget is {items} tokens (or {items / total:.4g})."
            )
        return wanted

    def __str__(self) -> str:
        """The budget as text that :meth:`parse` reads back."""
        if self.unit == "ratio":
            return f"{self.amount * 100:.12g}%"
        if self.relative:
            return f"{self.amount * 100:.12g}% {'kv' if self.unit == 'bytes' else 'time' if self.unit == 'ms' else self.unit}"
        name = {"tokens": "tokens", "flops": "flops", "ms": "ms", "bytes": "B kv"}[self.unit]
        return f"{self.amount:.15g} {name}"
