"""Random token dropout for `nano-robust`, which uses no signal that a pruning method uses.

Kept tokens are a weighted sample without replacement (Gumbel top-k). The weights are tilted by a random
linear functional of the features, drawn anew for every image, and by a random offset per partition: what is
dropped is correlated with content, as it is after pruning, but in no particular direction. Neither attention
nor labels enter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_budget.eval.nano.modeling import PARTITIONS, PATCH_TOKENS, PATCHES
from vlm_budget.eval.nano.packing import ALL_SLOTS, NEWLINE_SLOTS, PATCH_SLOTS


@dataclass(frozen=True)
class TiltedDropout:
    """Settings of the dropout.

    Attributes:
        min_keep: smallest share of the 180 patch tokens kept; the share is log-uniform up to 1.
        full: probability that a batch loses nothing.
        newlines: probability that a batch which loses tokens keeps its 12 newlines.
        renumber: probability that kept tokens are numbered 1..K instead of keeping their positions.
        tilted: probability that an image's weights are tilted by its features.
        strength: largest tilt, in standard deviations of the functional.
    """

    min_keep: float = 0.08
    full: float = 0.25
    newlines: float = 0.5
    renumber: float = 0.5
    tilted: float = 0.7
    strength: float = 3.0

    def draw(self, features: Tensor, generator: torch.Generator) -> tuple[Tensor, bool]:
        """Choose what one batch keeps.

        Args:
            features: vision features, ``[B, 180, D]``.
            generator: a CPU generator; its state decides everything.

        Returns:
            Kept slots among the 192 visual tokens, ``[B, K]``, increasing, and whether to renumber them.
        """
        coin = torch.rand(4, generator=generator).tolist()
        if coin[0] < self.full:
            return ALL_SLOTS.expand(len(features), -1), False
        count = max(1, round(PATCH_TOKENS * self.min_keep ** coin[1]))
        keep = self._scores(features, generator).topk(count, 1).indices
        slots = PATCH_SLOTS[keep]
        if coin[2] < self.newlines:
            slots = torch.cat([slots, NEWLINE_SLOTS.expand(len(features), -1)], 1)
        return slots.sort(1).values, coin[3] < self.renumber

    def _scores(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """Gumbel noise plus the tilts, ``[B, 180]``."""
        batch, tokens, width = features.shape
        features = features.float().cpu()
        centred = (features - features.mean((0, 1))) / (features.std((0, 1)) + 1e-4)
        functional = torch.einsum("bnd,bd->bn", centred, torch.randn(batch, width, generator=generator))
        functional = (functional - functional.mean(1, keepdim=True)) / (functional.std(1, keepdim=True) + 1e-4)
        amount, tilted = torch.rand(2, batch, 1, generator=generator)
        strength = self.strength * amount * (tilted < self.tilted)
        offset = torch.randn(batch, PARTITIONS, generator=generator) * torch.rand(batch, 1, generator=generator)
        uniform = torch.rand(batch, tokens, generator=generator).clamp(1e-6, 1 - 1e-6)
        return strength * functional + offset.repeat_interleave(PATCHES, 1) - (-uniform.log()).log()
