"""VisionZip: dominant tokens by attention, contextual tokens merged from the rest.

VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv 2412.04467, from the paper. Dominant
tokens are those the class token attends to most. Of the rest, evenly strided targets each take in the mean of the
tokens whose keys are most similar to theirs: the contextual tokens, mixed before the projector.

Where this differs from the released code, and why:

* The released code also projects the class token itself, and counts it as a dominant token. Transformers' models have
  no placeholder for it, so its slot goes to one more dominant patch.
* Tokens keep the order of the image; released, the contextual tokens stand behind the dominant ones.
* The counts are exact for every budget: a share, 10 of 64 as published, instead of two numbers.

Ours, not the paper's: received attention in towers without a class token, and an equal share of the budget for every
partition that can hold one (as in the LLaVA-NeXT setting), what it cannot hold passing on.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch

from vlm_budget.errors import OptionError
from vlm_budget.ops import assign, assigned_merge, segmented_topk
from vlm_budget.pruner import Attention, Context, Pruner, Selection, Tower, saliency
from vlm_budget.pruners.cls_topk import equal_shares
from vlm_budget.pruners.token_transforming import project_mix


@dataclass(frozen=True, kw_only=True)
class VisionZip(Pruner):
    """Top attention, and the rest merged by the similarity of keys.

    Attributes:
        contextual: Share of the kept tokens that are merged from the rest, rounded per partition.
        layer: Vision layer (0-based) of attention and keys; default the layer the language model reads.
    """

    contextual: float = 10 / 64
    layer: int | None = None

    paper = "arXiv 2412.04467"
    reads_hidden = True
    merges = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.contextual, bool) or not isinstance(self.contextual, Real):
            raise OptionError(f"contextual must be a number in [0, 1], got {self.contextual!r}")
        if not 0 <= self.contextual <= 1:
            raise OptionError(f"contextual must lie in [0, 1], got {self.contextual}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int | None):
            raise OptionError(f"layer must be an int or None, got {self.layer!r}")

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """Attention and head-mean keys of one layer."""
        layer = tower.feature_layer if self.layer is None else self.layer
        return (saliency(tower, layer), Attention(layer, "mean_keys"))

    def pick(self, ctx: Context, k: int) -> Selection:
        """Dominant and contextual tokens of every partition."""
        attention, mean_keys = ctx.attention
        scores, keys = ctx.there(ctx.token_scores(attention)), ctx.there(ctx.in_token_order(mean_keys))
        counts = equal_shares(ctx.item, k)
        merged = [int(self.contextual * count + 0.5) for count in counts]
        dominant = segmented_topk(scores, ctx.partition, [n - m for n, m in zip(counts, merged, strict=True)])
        values = ctx.features[dominant]
        if not any(merged):
            return Selection(dominant, values)
        left = [size - count + own for size, count, own in zip(ctx.item.shown, counts, merged, strict=True)]
        places, strides, start, end = [], [], 0, 0
        for index, own in enumerate(merged):
            end += left[index]
            left[index] *= own > 0  # partitions without contextual tokens have nothing to merge into
            places.append(torch.arange(end - left[index], end, device="cpu"))
            strides.append(start + torch.arange(own, device="cpu") * (left[index] // max(own, 1)))
            start += left[index]
        rest, targets = rest_by_partition(ctx, dominant)[ctx.there(torch.cat(places))], ctx.there(torch.cat(strides))
        owner = assign(keys, rest[targets], among=rest, sizes=left, shares=merged)
        weights = contextual_weights(owner, targets)
        mixed = project_mix(ctx, lambda hidden: assigned_merge(hidden, owner, weights, len(targets), among=rest))
        return Selection(torch.cat([dominant, rest[targets]]), torch.cat([values, mixed]))


def rest_by_partition(ctx: Context, taken: torch.Tensor) -> torch.Tensor:
    """[r] int64 ascending positions of the candidates that are not among ``taken``, partition by partition."""
    return ctx.partition.index_fill(0, taken, -1).argsort(stable=True)[len(ctx.separators) + len(taken) :]


def contextual_weights(owner: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How the tokens left over make contextual ones: ``target + mean(tokens assigned to it)``, a sum of weight 2.

    Args:
        owner: [m] int64, which target each token is assigned to; targets to themselves.
        targets: [c] int64 positions of the targets among them.

    Returns:
        [m] float32, the weight of each token in its target's sum. A target without others is itself alone.
    """
    others = owner.new_zeros(len(targets)).scatter_add_(0, owner, torch.ones_like(owner)) - 1
    return (1 / others.clamp_min(1))[owner].index_fill_(0, targets, 1.0)
