"""What is done in a run, and in one forward of it."""

from __future__ import annotations

from dataclasses import dataclass

from .call import Grid
from .clock import Tick
from .method import SparseAttention


@dataclass(frozen=True)
class Setting:
    """What a shape of video and a number of steps come to.

    Attributes:
        method: With all of its fields set.
        warmup_steps: First steps that stay dense.
        dense_layers: First layers that stay dense.
        full: Everything is computed, by the untouched processors.
        remark: What the user is told of it.
    """

    method: SparseAttention
    warmup_steps: int
    dense_layers: int
    full: bool = False
    remark: str | None = None


@dataclass(frozen=True)
class Forward:
    """One forward of a transformer.

    Attributes:
        grid: The video's tokens.
        tick: Where in the run.
        setting: What is done.
        why: Why all of its layers are dense; None where they are not.
    """

    grid: Grid
    tick: Tick
    setting: Setting
    why: str | None
