"""VisPruner: the tokens the tower looks at, and distinct ones among the rest.

Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, arXiv 2412.01818 (v2; v1 is
FasterVLM, here ``cls_topk``), from the formula. A part of the tokens is chosen by CLS attention. Of the rest, round
after round, every other token is compared with those between, and the few that resemble them most are dropped, until
as many remain as are wanted.

Ours, where the formula at hand is silent: similarity is the cosine of features before the projector; the rest is
ordered by attention, highest first, and survivors keep their order; of equal similarities the later token is dropped.
In towers without a class token the attention each token receives stands in (what the author advises for Qwen2.5-VL,
as reported in the project's issues).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch

from vlm_budget.errors import OptionError
from vlm_budget.greedy import unit_rows
from vlm_budget.pruner import Attention, Context, Pruner, Tower, saliency
from vlm_budget.pruners.cls_topk import equal_shares


@dataclass(frozen=True, kw_only=True)
class VisPruner(Pruner):
    """Important tokens by attention, diverse ones by removing duplicates.

    Attributes:
        important_ratio: Share of the kept tokens that attention chooses, rounded down per partition.
        step: The most tokens dropped in one round.
        scope: ``"partition"`` splits the count equally over thumbnail, crops and frames; ``"item"`` treats them as one.
    """

    important_ratio: float = 0.5
    step: int = 8
    scope: Literal["partition", "item"] = "partition"

    paper = "arXiv 2412.01818"
    reads_hidden = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.important_ratio, bool) or not isinstance(self.important_ratio, Real):
            raise OptionError(f"important_ratio must be a number in [0, 1], got {self.important_ratio!r}")
        if not 0 <= self.important_ratio <= 1:
            raise OptionError(f"important_ratio must lie in [0, 1], got {self.important_ratio}")
        if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 1:
            raise OptionError(f"step must be an int of at least 1, got {self.step!r}")
        if self.scope not in ("partition", "item"):
            raise OptionError(f"scope must be 'partition' or 'item', got {self.scope!r}")

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """Attention at the feature layer."""
        return (saliency(tower, tower.feature_layer),)

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Important and diverse tokens, per partition or over the item."""
        assert ctx.hidden is not None
        item = ctx.item
        scores = ctx.token_scores(next(iter(ctx.attention)))
        groups = [(item.partition == index).nonzero().flatten() for index in range(len(item.partitions))]
        counts = equal_shares(item, k)
        if self.scope == "item":
            groups, counts = [item.candidates], [k]
        chosen = []
        for group, count in zip(groups, counts, strict=True):
            tokens = ctx.there(group)
            ranked = tokens[scores[tokens].argsort(descending=True, stable=True)]
            important, rest = ranked.split([n := int(count * self.important_ratio), len(ranked) - n])
            chosen += [important, rest[distinct(ctx.hidden[rest], count - n, self.step)]]
        return torch.cat(chosen)


def distinct(features: torch.Tensor, count: int, step: int) -> torch.Tensor:
    """What remains when tokens that resemble others are dropped, a few at a time.

    In every round each even token is matched with the odd one most similar to it; the ``step`` even tokens with the
    best matches are dropped (fewer in the last round, or where there are fewer).

    Args:
        features: [m, C], compared by cosine.
        count: How many remain, 0 to m.
        step: Tokens dropped per round.

    Returns:
        [count] int64 ascending.
    """
    left = torch.arange(len(features) if count else 0, device=features.device)
    unit = unit_rows(features)
    similar = unit @ unit.T
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        match = similar[even][:, odd].amax(1)
        drop = min(step, len(left) - count, len(even))
        stay = even[match.argsort(stable=True)[: len(even) - drop]]
        left = torch.cat([stay, odd]).sort().values
    return left
