"""What may be spent.

``Budget.parse`` and ``Budget`` accept what users type: ``0.2`` and ``"20%"`` are ratios of the *unpruned visual tokens
of a prompt*, ``128`` and ``"128 tokens"`` are tokens per prompt (one batch row, all its images together). FLOPs,
milliseconds and bytes are what one prompt may cost the language model: its pass over the prompt, or the cache that this
leaves. They become tokens in a plan, with the prices of a :class:`~vlm_budget.cost.CostModel`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from numbers import Integral, Real
from typing import Literal, get_args

from .errors import BudgetError, InfeasibleBudgetError

Unit = Literal["ratio", "tokens", "flops", "ms", "bytes"]

_TEXT = re.compile(
    r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:nan|inf))\s*(%?)\s*([a-z ]*?)\s*$", re.IGNORECASE
)
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_AMOUNTS: dict[str, tuple[Unit, float]] = {
    "token": ("tokens", 1),
    "tokens": ("tokens", 1),
    "flops": ("flops", 1),
    "kflops": ("flops", 10**3),
    "mflops": ("flops", 10**6),
    "gflops": ("flops", 10**9),
    "tflops": ("flops", 10**12),
    "pflops": ("flops", 10**15),
    "ms": ("ms", 1),
    "s": ("ms", 1000),
    **{f"{name}{of}": ("bytes", size) for name, size in _BYTES.items() for of in ("", " kv", " cache", " kv cache")},
}
_SHARES: dict[str, Unit] = {
    "": "ratio",
    "token": "ratio",
    "tokens": "ratio",
    "flops": "flops",
    "ms": "ms",
    "time": "ms",
    "latency": "ms",
    "kv": "bytes",
    "cache": "bytes",
    "kv cache": "bytes",
}
_EXAMPLES = "0.2, '25%', 128, '128 tokens', '40% flops', '80 ms', '200 MB kv'"


@dataclass(frozen=True, init=False)
class Budget:
    """An amount in a unit: ``Budget("50% ms")`` as users write it, or ``Budget(0.5, "ms", relative=True)``.

    Attributes:
        amount: How much. A share in (0, 1] when ``relative``, else tokens, FLOPs, milliseconds or bytes.
        unit: ``"ratio"`` (share of visual tokens), ``"tokens"``, or of the language model's pass over the prompt
            ``"flops"``, ``"ms"``, and ``"bytes"`` of KV cache.
        relative: The amount is a share of what the unpruned model would spend.
    """

    amount: float
    unit: Unit = "ratio"
    relative: bool = True

    def __init__(self, amount: float | str, unit: Unit = "ratio", relative: bool = True) -> None:
        """Text says unit and kind itself, so nothing may stand beside it.

        Raises:
            BudgetError: Not a budget.
        """
        if isinstance(amount, str):
            if (unit, relative) != ("ratio", True):
                raise BudgetError(f"Budget({amount!r}) is read as it is written; leave out unit and relative")
            read = Budget.parse(amount)
            amount, unit, relative = read.amount, read.unit, read.relative
        for name, value in (("amount", amount), ("unit", unit), ("relative", relative)):
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        """Refuse what is no amount of the unit, and amounts that no input could ever meet."""
        if isinstance(self.amount, bool) or not isinstance(self.amount, Real):
            raise BudgetError(f"the amount of a budget is a number, got {self.amount!r}. Try one of {_EXAMPLES}.")
        if self.unit not in get_args(Unit):
            raise BudgetError(f"the unit of a budget is one of {', '.join(get_args(Unit))}, got {self.unit!r}")
        if self.relative != {"ratio": True, "tokens": False}.get(self.unit, self.relative):
            raise BudgetError(
                "a share of the tokens is a 'ratio' with relative=True, a number of them is 'tokens' without"
            )
        try:
            object.__setattr__(self, "amount", float(self.amount))
        except OverflowError:
            object.__setattr__(self, "amount", math.inf)
        if math.isnan(self.amount) or math.isinf(self.amount):
            raise BudgetError(f"budget must be a finite number, got {self.amount}. Try one of {_EXAMPLES}.")
        if self.amount <= 0:
            raise BudgetError(f"budget must be above 0, got {self.amount:g} {self.unit}. Try one of {_EXAMPLES}.")
        if self.relative and self.amount > 1:
            raise BudgetError(
                f"a relative budget is a share in (0, 1] or up to 100%, got {self.amount:g} (= {self.amount:.0%}). "
                f"For an absolute number of tokens pass an int, such as {max(1, round(self.amount))}, or '… tokens'."
            )
        if self.unit == "tokens" and not self.amount.is_integer():
            raise BudgetError(
                f"tokens are whole, got {self.amount:g} tokens. Did you mean '{self.amount:g}' (a ratio) or '…%'?"
            )

    @classmethod
    def parse(cls, value: Budget | str | float) -> Budget:
        """Read a budget the way users write it.

        Args:
            value: A :class:`Budget`, a float ratio in (0, 1], an int number of tokens, or text such as ``"25%"``,
                ``"128 tokens"``, ``"40% flops"``, ``"80 ms"``, ``"50% ms"``, ``"200 MB kv"``.

        Raises:
            BudgetError: Not a budget: zero, negative, NaN, above 100 %, fractional tokens, unknown unit.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, (str, Real)):
            raise BudgetError(f"cannot read a budget from {value!r} ({type(value).__name__}). Try one of {_EXAMPLES}.")
        if isinstance(value, str):
            return cls._parse_text(value)
        return cls(value, "tokens", relative=False) if isinstance(value, Integral) else cls(value)

    @classmethod
    def _parse_text(cls, text: str) -> Budget:
        match = _TEXT.match(text)
        if match is None:
            raise BudgetError(f"cannot read a budget from {text!r}. Try one of {_EXAMPLES}.")
        number, unit = float(match[1]), " ".join(match[3].lower().split())
        if match[2] and unit in _SHARES:
            # In decimals, so that '7%' is 0.07 and str() reads back exactly.
            return cls(float(Decimal(match[1]) / 100) if math.isfinite(number) else number, _SHARES[unit])
        if not match[2] and unit in _AMOUNTS:
            kind, size = _AMOUNTS[unit]
            return cls(number * size, kind, relative=False)
        if not match[2] and not unit:
            return cls(number) if re.search(r"[.e]", match[1], re.IGNORECASE) else cls(number, "tokens", relative=False)
        raise BudgetError(f"unknown unit in budget {text!r}. Try one of {_EXAMPLES}.")

    def require_token_unit(self) -> None:
        """Refuse the units that only a plan can turn into tokens.

        Raises:
            BudgetError: The unit is FLOPs, milliseconds or bytes.
        """
        if self.unit not in ("ratio", "tokens"):
            raise BudgetError(
                f"budget '{self}' is no number of tokens by itself: how many it buys depends on the model and the "
                "prompt. patch(model, method, budget) and handle.plan(**inputs) work it out; here, use a ratio (0.2, "
                "'20%') or tokens (128, '128 tokens')."
            )

    def tokens(self, total: int, items: int = 1) -> int:
        """How many of ``total`` visual tokens may stay.

        A ratio is rounded to the nearest token, half up, in the decimals it was written in: 29% of 50 are 15.

        Args:
            total: Unpruned visual tokens of one prompt.
            items: Images and videos among them; each keeps at least one token.

        Raises:
            BudgetError: More tokens than exist, fewer than one per item, or a unit that is priced by a cost model.
        """
        self.require_token_unit()
        exact = Decimal(repr(self.amount)) * (int(total) if self.unit == "ratio" else 1)
        wanted = int(exact.to_integral_value(ROUND_HALF_UP))
        if wanted > total:
            raise InfeasibleBudgetError(
                f"budget '{self}' asks for {wanted} visual tokens but the prompt has only {total}.",
                [Budget(total, "tokens", relative=False), Budget(1.0)],
            )
        if wanted < items:
            raise InfeasibleBudgetError(
                f"budget '{self}' leaves {wanted} of {total} visual tokens for {items} image(s) or video(s): less than "
                "one each.",
                [Budget(items, "tokens", relative=False), Budget(items / total)],
            )
        return wanted

    def __str__(self) -> str:
        """The budget as text that :meth:`parse` reads back to an equal one."""
        amount = Decimal(repr(self.amount))
        if self.relative:
            return f"{_short(amount * 100)}%{_SHARE_NAMES[self.unit]}"
        if self.unit == "tokens":
            return count_of(int(self.amount))
        return f"{_short(amount)} ms" if self.unit == "ms" else _in_large_units(amount, self.unit)


def count_of(tokens: int) -> str:
    """``"1 token"``, ``"2 tokens"``."""
    return f"{tokens} token" if tokens == 1 else f"{tokens} tokens"


def in_words(amount: float, unit: Unit) -> str:
    """An amount for people, in four digits: ``1.234 GFLOPs``, ``80 ms``, ``12.5 MB kv``."""
    if unit == "ms":
        return f"{amount:.4g} ms" if amount < 1e4 else f"{amount:.0f} ms"
    prefix = next((name for name, size in _PREFIXES if amount >= size), "")
    size = dict(_PREFIXES).get(prefix, 1)
    return f"{amount / size:.4g} {prefix}FLOPs" if unit == "flops" else f"{amount / size:.4g} {prefix}B kv"


_PREFIXES = (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3))
_SHARE_NAMES = {"ratio": "", "tokens": "", "flops": " flops", "ms": " ms", "bytes": " kv"}


def _in_large_units(amount: Decimal, unit: Unit) -> str:
    """In the largest unit that is read back to the same float."""
    for prefix, size in _PREFIXES:
        name = f"{prefix}FLOPs" if unit == "flops" else f"{prefix}B kv"
        number = amount / size
        if number >= 1 and name.lower() in _AMOUNTS and float(number) * size == float(amount):
            return f"{_short(number)} {name}"
    return f"{_short(amount)} {'flops' if unit == 'flops' else 'B kv'}"


def _short(number: Decimal) -> str:
    text = str(number)
    return text.rstrip("0").rstrip(".") if "." in text and "E" not in text else text
