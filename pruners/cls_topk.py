"""CLS top-k: the tokens the vision tower's class token looks at.

[CLS] Attention is All You Need for Training-Free Visual Token Pruning (FasterVLM), arXiv 2412.01818, from the paper.
Score: head-mean CLS attention at the layer whose output the language model gets. Any-resolution images keep an equal
share per partition, as the authors' LLaVA-NeXT setting does; ``scope="item"`` ranks all partitions together instead.
Where the tower has no class token, the attention each token receives takes its place (ours; the paper has CLS only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from vlm_budget.allocate import split
from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.ops import segmented_topk
from vlm_budget.pruner import Attention, Context, Pruner, Tower, saliency


@dataclass(frozen=True, kw_only=True)
class ClsTopK(Pruner):
    """Keep the tokens with the highest CLS attention.

    Attributes:
        scope: ``"partition"`` splits the count equally over thumbnail, crops and frames; ``"item"`` ranks globally.
    """

    scope: Literal["partition", "item"] = "partition"

    paper = "arXiv 2412.01818"

    def __post_init__(self) -> None:
        """Check the scope."""
        super().__post_init__()
        if self.scope not in ("partition", "item"):
            raise OptionError(f"scope must be 'partition' or 'item', got {self.scope!r}")

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """Attention at the feature layer."""
        return (saliency(tower, tower.feature_layer),)

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Top ``k`` by attention, per partition or over the item."""
        item = ctx.item
        scores = ctx.token_scores(next(iter(ctx.attention)))
        if self.scope == "item":
            return scores.argsort(descending=True, stable=True)[:k]  # unlike topk, ties go to the earlier everywhere
        return segmented_topk(scores, ctx.partition, equal_shares(item, k))


def equal_shares(item: VisualItem, k: int) -> list[int]:
    """``k`` tokens split equally over an item's partitions; what one cannot hold (padding) passes on to the others."""
    return split(k, [float(n > 0) for n in item.shown], item.shown)
