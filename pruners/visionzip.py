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
from torch.nn.functional import normalize, one_hot

from vlm_budget.errors import OptionError
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
        scores, keys = ctx.token_scores(attention).to(ctx.device), ctx.in_token_order(mean_keys).to(ctx.device)
        dominant, contextual, mixing = [], [], []
        for index, count in enumerate(equal_shares(ctx.item, k)):
            tokens = (ctx.item.partition == index).nonzero().flatten().to(ctx.device)
            merged = int(self.contextual * count + 0.5)
            ranked = tokens[scores[tokens].argsort(descending=True, stable=True)]
            dominant.append(ranked[: count - merged])
            if merged:
                rest = ranked[count - merged :].sort().values
                targets = torch.arange(merged, device=ctx.device) * (len(rest) // merged)
                contextual.append(rest[targets])
                mixing.append((rest, contextual_weights(keys[rest], targets)))
        values = ctx.features[torch.cat(dominant)]
        if mixing:
            values = torch.cat([values, project_mix(ctx, mixing)])
        return Selection(torch.cat(dominant + contextual), values)


def contextual_weights(keys: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How the tokens left over make contextual ones: ``target + mean(tokens assigned to it)``, a sum of weight 2.

    Args:
        keys: [m, d] keys of the tokens left over.
        targets: [c] int64 positions of the targets among them.

    Returns:
        [c, m] float32. A token is assigned to the target of the highest cosine; a target without any is itself alone.
    """
    unit = normalize(keys.float(), dim=-1)
    owner = (unit[targets] @ unit.T).argmax(0)
    assigned = one_hot(owner, len(targets)).T.float().index_fill_(1, targets, 0.0)
    weights = assigned / assigned.sum(1, keepdim=True).clamp_min(1.0)
    return weights.index_put_((torch.arange(len(targets), device=targets.device), targets), weights.new_ones(()))
