"""Which pairs of blocks are computed, and at what price."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlm_budget.errors import OptionError
from vlm_budget.ops import block_map, block_means

from .call import Blocks, Call
from .tiles import Cut

MOST_BLOCKS = 4096
"""Blocks of keys among which one row's are chosen."""


@dataclass(frozen=True)
class Rule:
    """How far blocks are taken by falling mass.

    Attributes:
        top_p: Until this share of a row's mass is reached; None with ``tokens``.
        floor: With ``top_p``: in any case until this share of the keys is reached.
        tokens: As long as the blocks' keys are no more than these.
    """

    top_p: float | None = None
    floor: float = 0.0
    tokens: int | None = None

    @property
    def everything(self) -> bool:
        """Whether all blocks are taken anyway."""
        return self.top_p is not None and self.top_p >= 1

    def share(self, total: int) -> float | None:
        """``tokens`` of ``total``, between two whole numbers so that rounding cannot matter."""
        return None if self.tokens is None else min((self.tokens + 0.5) / total, 1.0)


def tokens_within(density: float, tokens: int) -> int:
    """Whole keys within a density, and none less because of how floats are rounded."""
    return math.floor(density * tokens + 1e-6)


def most_probable(mass: torch.Tensor, sizes: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Blocks by falling mass, ties to the lower index; at least the best one, and never an empty one.

    Args:
        mass: [B, H, Cq, Ck], at least 0.
        sizes: [B|1, H|1, Ck] int32, keys of each block.
        rule: How far. With ``tokens``, it stops at the first block that does not fit.

    Returns:
        [B, H, Cq, Ck] bool.
    """
    there = (sizes > 0)[:, :, None].expand_as(mass)
    ranked, order = mass.double().masked_fill(~there, -torch.inf).sort(dim=-1, descending=True, stable=True)
    keys = sizes.long()[:, :, None].expand_as(mass).gather(-1, order)
    counted = keys.cumsum(-1)
    if rule.tokens is not None:
        taken = counted <= rule.tokens
    else:
        ranked = ranked.clamp_min(0.0)
        reached = ranked.cumsum(-1)
        total = sizes.long().sum(-1)[:, :, None, None]
        goal = reached[..., -1:] * ((rule.top_p or 0.0) * (1 - 1e-6))
        taken = (reached - ranked < goal) | (counted - keys < total * (1.0 if rule.everything else rule.floor) - 1e-6)
    taken[..., :1] = True
    return torch.zeros_like(taken).scatter_(-1, order, taken) & there


def estimated(call: Call, query: Cut, key: Cut, rule: Rule, correction: bool) -> Blocks:
    """Blocks whose pairs are chosen by the mass that their means promise.

    Args:
        call: Whose tokens.
        query: The video's queries in blocks.
        key: The video's keys in blocks.
        rule: How far blocks are taken.
        correction: Whether dropped blocks count by their means.
    """
    if rule.everything:
        return all_pairs(query, key)
    query_means = block_means(call.queries, query.order, query.sizes)
    key_means = block_means(call.keys, key.order, key.sizes)
    kept = block_map(
        query_means,
        key_means,
        key.sizes,
        call.scale,
        top_p=rule.top_p,
        density=rule.share(call.grid.tokens),
        floor=rule.floor,
    )
    kept = kept | not_finite(query_means)[..., None] | not_finite(key_means)[:, :, None]
    return corrected(call, query, key, kept, key_means if correction else None)


def all_pairs(query: Cut, key: Cut) -> Blocks:
    """Blocks whose pairs are all computed."""
    kept = torch.ones(1, 1, query.sizes.shape[2], key.sizes.shape[2], dtype=torch.bool, device=key.sizes.device)
    return of(query, key, kept)


def of(query: Cut, key: Cut, kept: torch.Tensor) -> Blocks:
    """Blocks without a correction."""
    return Blocks(query.order, query.sizes, key.order, key.sizes, kept, tile=key.tile)


def corrected(call: Call, query: Cut, key: Cut, kept: torch.Tensor, key_means: torch.Tensor | None) -> Blocks:
    """Blocks with a correction, where there are mean keys [B, H, Ck, D]."""
    if key_means is None:
        return of(query, key, kept)
    mean_values = block_means(call.values, key.order, key.sizes)
    return Blocks(query.order, query.sizes, key.order, key.sizes, kept, key_means, mean_values, key.tile)


def not_finite(means: torch.Tensor) -> torch.Tensor:
    """[B, H, C], blocks with a number that is none: their pairs are all computed, so that nothing hides it."""
    return ~means.isfinite().all(-1)


def require_blocks(count: int) -> None:
    """Refuse more blocks than one row can choose from.

    Raises:
        OptionError: They are too many.
    """
    if count > MOST_BLOCKS:
        raise OptionError(f"at most {MOST_BLOCKS} blocks of keys can be chosen from, got {count}. Make them larger.")
