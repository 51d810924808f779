"""Token Transforming inside a vision transformer: at a few blocks, fewer tokens that each are a mixture of all.

Token Transforming (arXiv 2506.05709) writes every reduction as Y = W X and lets a token feed several outputs. The
paper's abstract fixes no more than that; how W is made, where and how often is ours: the assumptions A1 to A6 of the
documentation page. The matrix is the one of the merging stage for VLMs (:mod:`vlm_budget.pruners.token_transforming`).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch

from vlm_budget.errors import OptionError
from vlm_budget.pruners.token_transforming import transform_matrix
from vlm_budget.vit import Reduced, VitContext, VitMethod, equal_steps

_DEPTHS = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class VitTokenTransforming(VitMethod):
    """Anchors by importance; every anchor becomes a mixture of the tokens whose keys are like its own.

    Attributes:
        layers: 0-based blocks that reduce; None for those at a quarter, half and three quarters of the depth.
        temperature: Softmax temperature on the cosine similarities.
        top: Tokens an anchor may take from; None for all.
        self_weight: Weight in [0, 1] of the anchor itself, beside its share of the softmax; 1 is pruning.
        exclusive: Every token feeds only its most similar anchor, and those average (classic merging).
    """

    layers: tuple[int, ...] | None = None
    temperature: float = 0.1
    top: int | None = 16
    self_weight: float = 0.0
    exclusive: bool = False

    paper: ClassVar[str] = "arXiv 2506.05709"

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("temperature", "self_weight"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), Real):
                raise OptionError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not 1e-6 <= self.temperature < float("inf"):  # below, logits overflow
            raise OptionError(f"temperature must be at least 1e-6 and finite, got {self.temperature}")
        if not 0 <= self.self_weight <= 1:
            raise OptionError(f"self_weight must lie in [0, 1], got {self.self_weight}")
        if (
            isinstance(self.top, bool)
            or not isinstance(self.top, int | None)
            or (self.top is not None and self.top < 1)
        ):
            raise OptionError(f"top must be a number of tokens from 1, or None for all, got {self.top!r}")
        if not isinstance(self.exclusive, bool):
            raise OptionError(f"exclusive must be True or False, got {self.exclusive!r}")
        if self.layers is not None and not _rising(self.layers):
            raise OptionError(f"layers must be a tuple of rising block indices from 0, got {self.layers!r}")

    def schedule(self, tokens: int, keep: int | None, blocks: int) -> tuple[int, ...]:
        """Equal steps at the chosen blocks.

        Raises:
            OptionError: The model has no such block.
        """
        assert keep is not None, "the engine gives a budget to methods that are not fixed"
        layers = self.layers
        if layers is None:
            layers = tuple(sorted({min(round(blocks * depth), blocks - 1) for depth in _DEPTHS}))
        if layers[-1] >= blocks:
            raise OptionError(f"layers={layers}: the model has only {blocks} blocks (0 to {blocks - 1})")
        after = dict(zip(layers, equal_steps(tokens, keep, len(layers)), strict=True))
        counts = [tokens]
        for block in range(blocks):
            counts.append(after.get(block, counts[-1]))
        return tuple(counts[1:])

    def reduce(self, ctx: VitContext, keep: int) -> Reduced:
        """Choose anchors, and mix."""
        with torch.no_grad():
            anchors = ctx.importance().argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(-1).values
            if self.self_weight == 1:  # the matrix would be one-hot
                weights = None
            else:
                weights = transform_matrix(
                    ctx.patch_keys.transpose(1, 2).flatten(2),
                    anchors,
                    temperature=self.temperature,
                    top=self.top,
                    self_weight=self.self_weight,
                    exclusive=self.exclusive,
                )
        if weights is None:
            return Reduced(ctx.tokens.gather(1, anchors[..., None].expand(-1, -1, ctx.tokens.shape[-1])))
        return Reduced(weights.to(ctx.tokens.dtype) @ ctx.tokens)


def _rising(layers: object) -> bool:
    if not isinstance(layers, tuple) or not layers:
        return False
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
    return whole and all(a < b for a, b in zip(layers, layers[1:], strict=False))
