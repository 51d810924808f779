"""One call of self-attention, as methods see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Grid:
    """Tokens of a video: frame by frame, row by row.

    Attributes:
        frames: Latent frames, after the transformer's patches.
        rows: Tokens along the height.
        cols: Tokens along the width.
    """

    frames: int
    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return self.frames * self.rows * self.cols

    @property
    def frame(self) -> int:
        """Tokens of one frame."""
        return self.rows * self.cols

    def __str__(self) -> str:
        """``21x45x80``."""
        return f"{self.frames}x{self.rows}x{self.cols}"


@dataclass(frozen=True)
class Moment:
    """Where in a run a call happens.

    Attributes:
        step: Denoising step, from 0.
        steps: Denoising steps of the run; None where nothing says how many.
        layer: Layer, from 0, over all lists of blocks of the transformer.
        layers: Layers of the transformer.
        branch: Which forward of the step, from 0: those of classifier-free guidance.
        part: Which call of the layer, from 0: Mochi's attend to one sample after the other.
    """

    step: int
    steps: int | None
    layer: int
    layers: int
    branch: int = 0
    part: int = 0


@dataclass(frozen=True)
class Call:
    """One call of self-attention, after norms and RoPE.

    Attributes:
        query: [B, H, L, D]; like the others strided at will, but for the last dimension.
        key: [B, H, L, D].
        value: [B, H, L, D].
        grid: The video's tokens; ``grid.tokens`` is called N.
        first: Where the video's tokens begin among the L: 0, or behind the text.
        valid: [B, L] bool, which tokens are no padding; None where all are. All video tokens are valid.
        empty_rows: Padding attends to nothing, and gets zeros; else it attends to all that is valid.
        scale: What logits are multiplied with.
        moment: Where in the run.
        state: What a method keeps from step to step for this layer, branch and part; emptied when a run begins.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: Grid
    first: int
    valid: torch.Tensor | None
    empty_rows: bool
    scale: float
    moment: Moment
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def video(self) -> slice:
        """The video's tokens among the L."""
        return slice(self.first, self.first + self.grid.tokens)

    @property
    def text(self) -> int:
        """Text tokens among the L, padding included."""
        return self.query.shape[2] - self.grid.tokens

    @property
    def queries(self) -> torch.Tensor:
        """[B, H, N, D] of the video."""
        return self.query[:, :, self.video]

    @property
    def keys(self) -> torch.Tensor:
        """[B, H, N, D] of the video."""
        return self.key[:, :, self.video]

    @property
    def values(self) -> torch.Tensor:
        """[B, H, N, D] of the video."""
        return self.value[:, :, self.video]


@dataclass(frozen=True)
class Blocks:
    """The video's tokens in an order, cut into blocks, and the pairs of blocks that are computed.

    Orders and sizes may be of batch and heads 1, for all alike. Blocks may be empty.

    Attributes:
        query_order: [B|1, H|1, N] int32, which token stands at each place; None: as they come.
        query_sizes: [B|1, H|1, Cq] int32, tokens of each block; they add up to N.
        key_order: Like ``query_order``, of keys and values.
        key_sizes: [B|1, H|1, Ck] int32.
        kept: [B, H, Cq, Ck] bool (batch and heads may be 1), the pairs that are computed.
        mean_keys: [B, H, Ck, D] float32, the mean key of each block. Where given, a dropped block j still counts as
            ``key_sizes[j]`` keys at its mean, with its mean value: the centroid correction of SVG-EAR
            (arXiv:2603.08982).
        mean_values: [B, H, Ck, D] float32, with ``mean_keys``.
        tile: Size of every block but the last of its side, where all are alike; None: any sizes.
    """

    query_order: torch.Tensor | None
    query_sizes: torch.Tensor
    key_order: torch.Tensor | None
    key_sizes: torch.Tensor
    kept: torch.Tensor
    mean_keys: torch.Tensor | None = None
    mean_values: torch.Tensor | None = None
    tile: int | None = None
