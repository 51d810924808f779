"""PruMerge and PruMerge+: keep what the class token attends to, and give it what similar tokens say.

LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, arXiv 2403.15388, from the paper. The
class token's attention of the last vision layer, all heads taken as one, ranks the tokens. Each kept token adds, before
the projector, ``sum(attention * feature)`` over the tokens whose keys are most similar to its own, and one extra token
is that sum over all the dropped ones. PruMerge+ also keeps tokens at a uniform stride.

Where this differs from the paper, and why:

* The paper keeps the outliers of the attention, so that every image has a count of its own, known only after the vision
  tower has run. Here a count is promised before, so the budget decides; ``adaptive_ratio`` tells what the paper would
  keep.
* The extra token is one of the budget, and stands at the place of the highest-ranked dropped token. Where one token is
  all there is, or nothing is dropped, there is none.
* PruMerge+ adds every ``int(step / 3)``-th token, ``step = int(1 / ratio)``, about three for each outlier. So here a
  quarter of the budget goes by attention, and the rest evenly over the tokens that are left.
* Similarity is the cosine of keys, of other tokens of the same partition, kept or dropped (our reading).

Ours, not the paper's: received attention at the layer the language model reads, in towers without a class token;
partitions share the budget in proportion to their tokens and are merged each on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from vlm_budget.allocate import split
from vlm_budget.errors import OptionError
from vlm_budget.ops import assigned_merge, nearest, segmented_topk, weighted_merge
from vlm_budget.pruner import Attention, Context, Pruner, Selection, Tower
from vlm_budget.pruners.token_transforming import project_mix
from vlm_budget.pruners.uniform import evenly
from vlm_budget.pruners.visionzip import rest_by_partition
from vlm_budget.transfer import moved


@dataclass(frozen=True, kw_only=True)
class PruMerge(Pruner):
    """Top attention, each kept token enriched by its most similar neighbours.

    Attributes:
        neighbours: How many most similar tokens a kept token adds.
        layer: Vision layer (0-based) of attention and keys; default the last one.
    """

    neighbours: int = 32
    layer: int | None = None

    paper = "arXiv 2403.15388"
    reads_hidden = True
    merges = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.neighbours, bool) or not isinstance(self.neighbours, int) or self.neighbours < 0:
            raise OptionError(f"neighbours must be an int of at least 0, got {self.neighbours!r}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int | None):
            raise OptionError(f"layer must be an int or None, got {self.layer!r}")

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """The class token's row with heads joined (received attention without one), and the keys."""
        default = tower.layers - 1 if tower.has_cls else tower.feature_layer
        layer = default if self.layer is None else self.layer
        return (Attention(layer, "joint_cls" if tower.has_cls else "received"), Attention(layer, "keys"))

    def pick(self, ctx: Context, k: int) -> Selection:
        """Kept tokens of every partition, and what merges into them."""
        attention, keys = (ctx.there(ctx.in_token_order(need)) for need in ctx.attention)
        partition, sizes = ctx.partition, ctx.item.shown
        counts = split(k, sizes, sizes)
        extra = [int(1 < count < size) for count, size in zip(counts, sizes, strict=True)]
        stay = [count - more for count, more in zip(counts, extra, strict=True)]
        kept = self._kept(ctx, attention, stay)
        kept = kept[partition[kept].argsort(stable=True)]
        grouped = ctx.there(ctx.item.partition.argsort(stable=True)[len(ctx.item.separators) :])
        most = min(self.neighbours, max(sizes) - 1)
        near, _ = nearest(keys, kept, most, among=grouped, sizes=sizes, shares=stay, exclude_self=True)
        index = torch.cat([kept[:, None], near], 1)
        weights = torch.cat([attention.new_ones(len(kept), 1), attention[near.clamp_min(0)]], 1)
        if not any(extra):
            return Selection(kept, project_mix(ctx, lambda hidden: weighted_merge(hidden, index, weights)))
        dropped = partition.index_fill(0, kept, -1)  # the partition of the dropped ones, no partition of the others
        first = segmented_topk(attention, dropped, extra)

        def mix(hidden: torch.Tensor) -> torch.Tensor:
            of_dropped = assigned_merge(hidden, dropped, attention, len(sizes))
            return torch.cat(
                [weighted_merge(hidden, index, weights), of_dropped[moved(partition[first], hidden.device)]]
            )

        return Selection(torch.cat([kept, first]), project_mix(ctx, mix))

    def _kept(self, ctx: Context, attention: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The tokens that stay as they are, so many of each partition."""
        return segmented_topk(attention, ctx.partition, counts)


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge with evenly spread tokens beside those of high attention.

    Attributes:
        attended: Share of the kept tokens that is chosen by attention; the rest is spread evenly.
    """

    attended: float = 0.25

    paper = "arXiv 2403.15388"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.attended, bool) or not isinstance(self.attended, Real):
            raise OptionError(f"attended must be a number in [0, 1], got {self.attended!r}")
        if not 0 <= self.attended <= 1:
            raise OptionError(f"attended must lie in [0, 1], got {self.attended}")

    def _kept(self, ctx: Context, attention: torch.Tensor, counts: list[int]) -> torch.Tensor:
        top = [int(self.attended * count + 0.5) for count in counts]
        attended = segmented_topk(attention, ctx.partition, top)
        places, start = [], 0
        for size, count, first in zip(ctx.item.shown, counts, top, strict=True):
            places.append(start + evenly(count - first, size - first))
            start += size - first
        return torch.cat([attended, rest_by_partition(ctx, attended)[ctx.there(torch.cat(places))]])


def adaptive_ratio(attention: torch.Tensor) -> float:
    """The share of tokens the paper would keep: those above ``Q3 + 1.5 * (Q3 - Q1)`` of the attention.

    Args:
        attention: [n] class attention of one image.
    """
    low, high = torch.quantile(attention.float(), attention.new_tensor([0.25, 0.75], dtype=torch.float32))
    return float((attention > high + 1.5 * (high - low)).float().mean())
