"""The base of every sparse attention method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .call import Blocks, Call, Grid


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
    source: ClassVar[str] = ""
    """Paper."""

    def blocks(self, call: Call) -> Blocks:
        """What to compute of a call.

        Args:
            call: Its tensors must not be changed; what should last until the next step goes into ``call.state``.
        """
        raise NotImplementedError

    def least_density(self, grid: Grid) -> float:
        """The smallest density that the method can promise on a grid."""
        raise NotImplementedError
