"""FastV: behind an early layer, the visual tokens that the last token looks at.

An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models, arXiv
2403.06764 (ECCV 2024), from the paper. Score: head-mean attention of the prompt's last token at layer K - 1. The kept
tokens keep their rotary positions.

Where this differs from the released code: one attention row is computed beside the backend in use (no second eager
pass, which writes the layer's cache twice); the image may stand anywhere in the prompt; several images are ranked each
on their own, with shares in proportion to their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch

from vlm_budget.decoder import DecoderContext, DecoderPruner, Step, most_attended
from vlm_budget.errors import OptionError
from vlm_budget.schedules import one_drop, require_layer


@dataclass(frozen=True, kw_only=True)
class FastV(DecoderPruner):
    """Keep the visual tokens with the highest attention of the last token, from layer ``k`` on.

    Attributes:
        k: K of the paper: so many layers see all visual tokens, and the attention of the last of them ranks.
        r: R of the paper: drop this share of the visual tokens, ``round(N * (1 - r))`` stay; the method then takes no
            budget. None: the budget, the mean over all layers, says how many stay.
    """

    k: int = 2
    r: float | None = None

    paper = "arXiv 2403.06764"
    layer_field: ClassVar[str | None] = "k"

    def __post_init__(self) -> None:
        """Check K and R."""
        super().__post_init__()
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise OptionError(f"k must be a number of layers, at least 1, got {self.k!r}")
        if self.r is not None and (isinstance(self.r, bool) or not isinstance(self.r, Real) or not 0 < self.r < 1):
            raise OptionError(f"r must be the share to drop, between 0 and 1, or None, got {self.r!r}")

    @property
    def fixed(self) -> bool:
        """``r`` says how many stay."""
        return self.r is not None

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """One drop at the input of layer ``k``."""
        if self.r is None:
            assert spend is not None
            return one_drop(self, self.k, tokens, spend, layers)
        require_layer(self, self.k, layers)
        keep = max(1, round(tokens * (1 - self.r)))
        return (Step(self.k, keep),) if keep < tokens else ()

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor:  # type: ignore[override]
        """Top ``k`` by the last token's attention."""
        return most_attended(ctx, ctx.last, k)
