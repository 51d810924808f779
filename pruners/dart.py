"""DART: tokens that repeat few others, behind an early layer.

Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494 (EMNLP
2025). The official code was not read; pivots and their counts follow ports of it, and are not verified against the
paper. Pivots are the visual and text tokens whose keys of layer K - 1 have the largest L1 norm; each pivot in turn adds
its share of the visual tokens least similar to it, by the cosine of their normalised hidden states.

Where this differs: the count is exact. The ports add ``int(N (1 - R) / pivots)`` per pivot, a few tokens off the
target, and their list of candidates can run empty; here the shares are split to the last token, and a pivot takes only
from what is left. Visual pivots are paid from the count. Several images are treated each on their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_budget.allocate import split
from vlm_budget.decoder import DecoderContext, DecoderPruner, Step
from vlm_budget.errors import OptionError
from vlm_budget.schedules import one_drop


@dataclass(frozen=True, kw_only=True)
class DART(DecoderPruner):
    """Keep pivots and the visual tokens least similar to them, from ``layer`` on.

    Attributes:
        layer: So many layers see all visual tokens; the keys of the last of them choose the pivots.
        pivots_visual: Visual tokens that serve as pivots; they stay. Fewer where fewer tokens may stay.
        pivots_text: Text tokens that serve as pivots. Fewer where the prompt has fewer.
    """

    layer: int = 2
    pivots_visual: int = 4
    pivots_text: int = 4

    paper = "arXiv 2502.11494"
    layer_field: ClassVar[str | None] = "layer"

    def __post_init__(self) -> None:
        """Check the counts."""
        super().__post_init__()
        for name, least in (("layer", 1), ("pivots_visual", 1), ("pivots_text", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} must be an int of at least {least}, got {value!r}")

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """One drop at the input of ``layer``."""
        assert spend is not None
        return one_drop(self, self.layer, tokens, spend, layers)

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor:  # type: ignore[override]
        """Pivots first, then each pivot's least similar tokens among what is left."""
        assert ctx.captured is not None
        size = ctx.captured.key.float().abs().sum((0, 2))
        chosen = [_largest(size[ctx.columns], min(self.pivots_visual, k))]
        text = ctx.text[_largest(size[ctx.text], self.pivots_text)]
        pivots = torch.cat([ctx.columns[chosen[0]], text])
        left = k - len(chosen[0])
        similar = _states(ctx, pivots) @ _states(ctx, ctx.columns).T
        similar[:, chosen[0]] = torch.inf
        for pivot, share in enumerate(split(left, [1.0] * len(pivots), [left] * len(pivots))):
            chosen.append(similar[pivot].argsort(stable=True)[:share])
            similar[:, chosen[-1]] = torch.inf  # taken: not for the pivots behind
        return torch.cat(chosen)


def _largest(size: torch.Tensor, count: int) -> torch.Tensor:
    return size.argsort(descending=True, stable=True)[:count]


def _states(ctx: DecoderContext, columns: torch.Tensor) -> torch.Tensor:
    """[c, D] float32 final-normed hidden states of unit length."""
    return normalize(ctx.norm(ctx.hidden[columns]).float(), dim=-1)
