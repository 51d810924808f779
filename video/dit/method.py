"""The base of every sparse attention method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar

from vlm_budget.errors import OptionError

from .call import Blocks, Call, Grid

DENSITY = 0.25
"""What a method computes where neither its options, nor a budget, nor a preset says."""


@dataclass(frozen=True, kw_only=True)
class SparseAttention:
    """One method and its configuration: the fields of a frozen dataclass.

    A method sees one call and returns :class:`~.call.Blocks`. It never sees warm-up, text, padding or undo, which are
    the same for all methods.

    Attributes:
        density: Share of the video's pairs of tokens that a sparse call computes, in (0, 1], corrections counted; a
            promise from above. None: what ``budget=`` says, else the model's preset.
        warmup: Share of a run's first steps that stay dense. None: the model's preset.
        dense_layers: Share of the first layers that stay dense. None: the model's preset.
    """

    density: float | None = None
    warmup: float | None = None
    dense_layers: float | None = None

    title: ClassVar[str] = ""
    """What it is, in a few words, for lists."""
    paper: ClassVar[str] = ""
    """Where it comes from; empty for a baseline."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            OptionError: A value that cannot be used.
        """
        if self.density is not None:
            require_share("density", self.density, above_zero=True)
        for name in ("warmup", "dense_layers"):
            if getattr(self, name) is not None:
                require_share(name, getattr(self, name))

    @property
    def settled(self) -> bool:
        """Whether the method's own options say how much is computed: no preset fills in, and no budget fits beside."""
        return self.density is not None

    @property
    def tile(self) -> int | None:
        """Tokens of every block, where the method cuts them all alike."""
        fixed = getattr(self, "cut", "fixed") == "fixed"
        return getattr(self, "block_size", None) if fixed else None

    def blocks(self, call: Call) -> Blocks:
        """What to compute of a call.

        Args:
            call: Its tensors must not be changed; what should last until the next step goes into ``call.state``.
        """
        raise NotImplementedError(f"{type(self).__name__} must say the blocks(call) that it computes")

    def least_density(self, grid: Grid) -> float:
        """The smallest density that the method can promise on a grid."""
        raise NotImplementedError(f"{type(self).__name__} must say the least_density(grid) that it can promise")

    def overhead(self, grid: Grid, width: int, calls: int) -> float:
        """FLOPs that a head spends beside attention: clustering, means, choosing blocks.

        Args:
            grid: Tokens of the video.
            width: Dimensions of a head.
            calls: Sparse calls of one layer, one after the other.

        Returns:
            For all of the calls together.
        """
        return 0.0

    def promised(self, grid: Grid) -> float:
        """The density to keep on a grid; where nobody says, a quarter, or the smallest if that is more.

        Raises:
            OptionError: The one that was asked for is below what the method can keep there.
        """
        least = self.least_density(grid)
        if self.density is None:
            return max(DENSITY, least)
        if self.density < least:
            raise OptionError(
                f"density={self.density:g} is below the minimum of {type(self).__name__} on a grid of {grid}, which is "
                f"{rounded_up(least):g}. Ask for at least that, for smaller blocks, or for no correction."
            )
        return self.density

    def __str__(self) -> str:
        """The class and the fields that are not the default."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        said = [
            f"{field.name}={f'{value:.4g}' if isinstance(value, float) else repr(value)}"
            for field, value in zip(fields(self), given.values(), strict=True)
            if value != field.default
        ]
        return f"{type(self).__name__}({', '.join(said)})"


def rounded_up(share: float) -> float:
    """A share in four digits, not below it."""
    digits = 10 ** (4 - math.ceil(math.log10(share))) if share > 0 else 1
    return min(math.ceil(share * digits - 1e-9) / digits, max(share, 1.0))


def require_share(name: str, value: object, above_zero: bool = False) -> None:
    """Refuse an option that is no share.

    Raises:
        OptionError: It is not a number in [0, 1], or with ``above_zero`` in (0, 1].
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and 0 <= float(value) <= 1 and (float(value) > 0 or not above_zero)):  # type: ignore[arg-type]
        raise OptionError(f"{name} must be a number in {'(' if above_zero else '['}0, 1], got {value!r}")


def require_count(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Refuse an option that is no whole number within its bounds.

    Raises:
        OptionError: It is not an int of at least ``least`` and at most ``most``.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and least <= value and (most is None or value <= most)):  # type: ignore[operator]
        upper = "" if most is None else f" and at most {most}"
        raise OptionError(f"{name} must be an int of at least {least}{upper}, got {value!r}")


def require_one_of(name: str, value: object, among: Sequence[str]) -> None:
    """Refuse an option that is none of its values.

    Raises:
        OptionError: It is another.
    """
    if value not in among:
        raise OptionError(f"{name} must be {' or '.join(map(repr, among))}, got {value!r}")


def require_extent(name: str, value: object) -> None:
    """Refuse an option that is no size in frames, rows and columns.

    Raises:
        OptionError: It is not three ints of at least 1.
    """
    if not (isinstance(value, tuple) and len(value) == 3):
        raise OptionError(f"{name} must be three ints (frames, rows, columns), got {value!r}")
    for part in value:
        require_count(name, part)
