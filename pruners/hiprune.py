"""HiPrune: anchors of a middle layer with their neighbours, then what the deep layer attends to.

HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models, arXiv 2508.00553, from
its formulas. Middle layers attend to objects, deep ones gather the picture as a whole. ``alpha`` of the budget goes to
patches of highest attention at the object layer with their four neighbours; the rest to the highest attention at the
last layer but one. Attention is what a token receives, mean over heads and queries.

Where this differs from the released code, and why:

* Neighbours do not wrap around the ends of rows: a patch at the edge has fewer.
* What overlap, edges and rounding leave of the anchors' part goes to the rest, and where anchors and neighbours are
  more than the budget, anchors come first, then neighbours by deep attention; so every count is exact.
* The layers are the published 9 of 24 and the last but one, at the same part of the depth in other towers.

Any-resolution images split the budget equally over partitions, as published for LLaVA-NeXT.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from vlm_budget.errors import OptionError
from vlm_budget.layout import VisualItem
from vlm_budget.ops import segmented_topk
from vlm_budget.pruner import Attention, Context, Pruner, Tower
from vlm_budget.pruners.cls_topk import equal_shares


@dataclass(frozen=True, kw_only=True)
class HiPrune(Pruner):
    """Anchors and neighbours by object attention, the rest by deep attention.

    Attributes:
        alpha: Share of the tokens for anchors and neighbours; an anchor stands for five.
        object_layer: Vision layer (0-based) of the anchors; default 9 of 24, at that part of the depth.
        deep_layer: Vision layer of the rest; default the last but one.
    """

    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int | None = None

    paper = "arXiv 2508.00553"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real):
            raise OptionError(f"alpha must be a number in [0, 1], got {self.alpha!r}")
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha must lie in [0, 1], got {self.alpha}")
        for name in ("object_layer", "deep_layer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise OptionError(f"{name} must be an int or None, got {value!r}")

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """Received attention at the object layer and at the deep layer (the same need twice where they agree)."""
        middle = min(round(tower.layers * 9 / 24), tower.layers - 1)
        objects = middle if self.object_layer is None else self.object_layer
        deep = max(tower.layers - 2, 0) if self.deep_layer is None else self.deep_layer
        return (Attention(objects, "received"), Attention(deep, "received"))

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Anchors, neighbours and the rest, partition by partition."""
        needs = [need for need in ctx.attention if need.kind == "received"]  # a merging stage may ask for more
        objects, deep = (ctx.there(ctx.token_scores(need)) for need in (needs[0], needs[-1]))
        item = ctx.item
        shares = equal_shares(item, k)
        anchors = segmented_topk(objects, ctx.partition, [round(self.alpha * share / 5) for share in shares])
        rank = torch.zeros(item.size + 1, dtype=torch.long, device=ctx.device)  # the last place is where -1 points
        rank[ctx.there(grid_neighbours(item))[anchors]] = 1
        rank[anchors] = 2
        order = deep.argsort(descending=True, stable=True)
        order = order[rank[order].argsort(descending=True, stable=True)]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(item.size, device=ctx.device))
        return segmented_topk(-place, ctx.partition, shares)


def grid_neighbours(item: VisualItem) -> torch.Tensor:
    """The four neighbours of every token in its own partition's grid.

    Returns:
        [n, 4] int64 (CPU) positions in the item: left, right, above, below; -1 at the edges of the grid, where the
        neighbour is padding, and for separators.
    """
    areas = torch.tensor([grid.rows * grid.cols for grid in item.partitions], device="cpu")
    cols = torch.tensor([grid.cols for grid in item.partitions], device="cpu")[item.partition]
    rows = torch.tensor([grid.rows for grid in item.partitions], device="cpu")[item.partition]
    start = (areas.cumsum(0) - areas)[item.partition]
    row, col = item.patch // cols, item.patch % cols
    shown = item.partition >= 0
    at = torch.full((int(areas.sum()),), -1, device="cpu")
    at[(start + item.patch)[shown]] = shown.nonzero().flatten()
    found = []
    for down, right in ((0, -1), (0, 1), (-1, 0), (1, 0)):
        inside = shown & (row + down >= 0) & (row + down < rows) & (col + right >= 0) & (col + right < cols)
        there = (start + (row + down) * cols + col + right).where(inside, 0)
        found.append(at[there].where(inside, -1))
    return torch.stack(found, 1)
