"""The oracle: SVG2's clusters, chosen by their true mass.

For study: it computes all pairs to choose some. What it is better by than :mod:`.svg2` is what the estimate loses; what
it is worse by than dense attention is what leaving out blocks loses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlm_budget.ops import block_means
from vlm_budget.video.dit.call import Blocks, Call, Grid
from vlm_budget.video.dit.clusters import labels_of
from vlm_budget.video.dit.selection import Rule, all_pairs, corrected, most_probable, not_finite
from vlm_budget.video.dit.tiles import Cut

from .svg2 import SVG2

ENTRIES = 2**23
"""Probabilities held at a time."""


@dataclass(frozen=True, kw_only=True)
class Oracle(SVG2):
    """SVG2 that knows the attention of every pair of clusters. Never faster than dense attention."""

    title = "SVG2's clusters, by their true mass"
    paper = "arXiv 2505.18875"

    def chosen(self, call: Call, query: Cut, key: Cut, rule: Rule) -> Blocks:
        """The blocks that a rule takes, by their true mass."""
        if rule.everything:
            return all_pairs(query, key)
        mass = block_mass(call, query, key)
        kept = most_probable(mass, key.sizes, rule) | not_finite(mass)[..., None]
        means = block_means(call.keys, key.order, key.sizes) if self.correction else None
        return corrected(call, query, key, kept, means)

    def overhead(self, grid: Grid, width: int, calls: int) -> float:
        """SVG2's, and the logits of all pairs."""
        return super().overhead(grid, width, calls) + float(calls * grid.tokens**2 * width * 2)


def block_mass(call: Call, query: Cut, key: Cut) -> torch.Tensor:
    """Attention that every block of queries gives every block of keys, among the video's tokens.

    Returns:
        [B, H, Cq, Ck] float32: sums over the rows of a block of queries.
    """
    batch, heads, tokens, _ = call.queries.shape
    own, seen = _labels(call, query), _labels(call, key)
    columns = key.sizes.shape[2]
    mass = torch.zeros(batch, heads, query.sizes.shape[2], columns, device=call.query.device)
    turned, step = call.keys.float().mT, max(1, ENTRIES // (batch * heads * tokens))
    for first in range(0, tokens, step):
        rows = slice(first, first + step)
        weights = (call.queries[:, :, rows].float() @ turned).mul_(call.scale).softmax(-1)
        found = weights.new_zeros(*weights.shape[:3], columns)
        found.scatter_add_(3, seen[:, :, None].expand(weights.shape), weights)
        mass.scatter_add_(2, own[:, :, rows, None].expand(found.shape), found)
    return mass


def _labels(call: Call, cut: Cut) -> torch.Tensor:
    batch, heads, tokens, _ = call.queries.shape
    as_they_come = torch.arange(tokens, dtype=torch.int32, device=call.query.device)[None, None]
    return labels_of(as_they_come if cut.order is None else cut.order, cut.sizes).expand(batch, heads, tokens)
