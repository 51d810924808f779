"""DivPrune: the tokens farthest from each other.

DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv 2503.02175 (CVPR 2025), from the
paper's formula. Max-min diversity over the projected tokens, the distance being ``1 - cos``: first the token whose
nearest neighbour is farthest, then, one by one, the token farthest from its nearest chosen one.

Where this differs from the released code, and why:

* Row separators (newlines) are no candidates: they show nothing, and being unlike every patch they would be among the
  first chosen. ``newline=`` keeps them as with every other method.
* A running minimum takes the place of indexing the whole distance matrix anew for every token; the choice is the same.
* Of equally far tokens the earlier is chosen, on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_budget.greedy import CosineRows, max_min
from vlm_budget.pruner import Context, Pruner


@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Max-min diversity of the features that the language model gets."""

    paper = "arXiv 2503.02175"

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Greedy max-min selection over all patch tokens of the item."""
        candidates = ctx.candidates
        return candidates[max_min(CosineRows(ctx.features[candidates]), k)]
