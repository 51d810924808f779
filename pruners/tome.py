"""ToMe: merge the most similar patch tokens in every block of a vision transformer.

Token Merging (arXiv 2210.09461), written from the paper's formulas. In each block, between attention and MLP, the patch
tokens are split in turn into two sets; every token of the first finds the most similar one of the second, by the cosine
of their keys; the r most similar pairs are merged into averages weighted by how many patches each token stands for.
From then on attention counts a token as the patches it stands for: log(size) is added to its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from vlm_budget.budget import Budget
from vlm_budget.errors import InfeasibleBudgetError, OptionError
from vlm_budget.vit import Reduced, VitContext, VitMethod, equal_steps


def most_similar_pairs(keys: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The r most similar pairs between tokens at even and at odd positions.

    Args:
        keys: [B, N, d] one key per token.
        r: Pairs wanted, at most ``N // 2``.

    Returns:
        [B, r] int64 even positions, each once, and [B, r] the odd position nearest to each in cosine.
    """
    unit = normalize(keys.float(), dim=-1)
    best, partner = (unit[:, 0::2] @ unit[:, 1::2].transpose(-1, -2)).max(-1)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :r]
    return 2 * chosen, 2 * partner.gather(1, chosen) + 1


def merge_pairs(
    tokens: torch.Tensor, sizes: torch.Tensor, source: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge every source into its target, weighted by size. Several sources may share a target; order is kept.

    Args:
        tokens: [B, N, C].
        sizes: [B, N] float32.
        source: [B, r] int64, distinct in a row; none of them a target.
        target: [B, r] int64.

    Returns:
        [B, N - r, C] tokens and [B, N - r] sizes.
    """
    batch, length, width = tokens.shape
    stays = torch.ones(batch, length, dtype=torch.bool, device=tokens.device).scatter_(1, source, False)
    # Whole rows of one flat table are moved: scatter over [B, N, C] takes three times as long (32 x 144 x 128, a CPU).
    first = torch.arange(batch, device=tokens.device)[:, None]
    kept = stays.flatten().argsort(descending=True, stable=True)[: batch * (length - source.shape[1])]
    place = (stays.cumsum(1) - 1 + first * (length - source.shape[1])).gather(1, target).flatten()
    moved = (source + first * length).flatten()
    heavy = (tokens * sizes[..., None].to(tokens.dtype)).reshape(-1, width)
    flat = sizes.flatten()
    total = flat.index_select(0, kept).index_add(0, place, flat.index_select(0, moved))
    heavy = heavy.index_select(0, kept).index_add(0, place, heavy.index_select(0, moved))
    merged = heavy / total[:, None].to(tokens.dtype)
    return merged.reshape(batch, -1, width), total.reshape(batch, -1)


@dataclass(frozen=True, kw_only=True)
class ToMe(VitMethod):
    """Bipartite matching on keys, a constant number of merges per block.

    Attributes:
        r: Tokens that every block merges away, at most half of what it has; None to spread a budget evenly.
        proportional: Attention and average pooling count a token as the patches it stands for.
    """

    r: int | None = None
    proportional: bool = True

    paper: ClassVar[str] = "arXiv 2210.09461"

    def __post_init__(self) -> None:
        """Check the fields."""
        if isinstance(self.r, bool) or not isinstance(self.r, int | None) or (self.r is not None and self.r < 0):
            raise OptionError(f"r must be a number of tokens per block, or None, got {self.r!r}")
        if not isinstance(self.proportional, bool):
            raise OptionError(f"proportional must be True or False, got {self.proportional!r}")

    @property
    def fixed(self) -> bool:
        """``r`` says it all."""
        return self.r is not None

    @property
    def weighs(self) -> bool:
        """The field ``proportional``."""
        return self.proportional

    def schedule(self, tokens: int, keep: int | None, blocks: int) -> tuple[int, ...]:
        """``r`` fewer from block to block; a budget is spread in equal steps.

        Raises:
            InfeasibleBudgetError: A block would have to merge away more than half of its tokens.
        """
        if self.r is not None:
            counts = [tokens]
            for _ in range(blocks):
                counts.append(counts[-1] - min(self.r, counts[-1] // 2))
            return tuple(counts[1:])
        assert keep is not None, "the engine gives a budget to methods that are not fixed"
        if not _feasible(tokens, keep, blocks):
            least = next(k for k in range(keep, tokens + 1) if _feasible(tokens, k, blocks))
            raise InfeasibleBudgetError(
                f"{self} cannot leave {keep} of {tokens} tokens: with equal steps over {blocks} blocks, one of them "
                "would merge away more than half of its tokens.",
                [Budget(least, "tokens", relative=False), Budget(least / tokens)],
            )
        return tuple(equal_steps(tokens, keep, blocks))

    def reduce(self, ctx: VitContext, keep: int) -> Reduced:
        """Match and merge."""
        sizes = ctx.tokens.new_ones(ctx.tokens.shape[:2], dtype=torch.float32) if ctx.sizes is None else ctx.sizes
        with torch.no_grad():
            source, target = most_similar_pairs(ctx.patch_keys.mean(1), ctx.tokens.shape[1] - keep)
        return Reduced(*merge_pairs(ctx.tokens, sizes, source, target))


def _feasible(tokens: int, keep: int, blocks: int) -> bool:
    counts = [tokens, *equal_steps(tokens, keep, blocks)]
    return all(before - after <= before // 2 for before, after in zip(counts, counts[1:], strict=False))
