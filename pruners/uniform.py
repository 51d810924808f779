"""Uniform: evenly spread tokens, the other baseline every method must beat.

Each partition gets a share in proportion to its tokens, and spends it on a two-dimensional lattice: text lines at even
heights, each with evenly spaced tokens. (Strided picking on the flattened sequence, as the HiRED repository's spatial
baseline does, aliases with the row length; the lattice does not.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlm_budget.allocate import split
from vlm_budget.pruner import Context, Pruner


@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """Keep tokens on a 2-D lattice."""

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Spread ``k`` tokens over the partitions, and over each partition's grid."""
        item = ctx.item
        members = [(item.partition == index).nonzero().flatten() for index in range(len(item.partitions))]
        sizes = [len(tokens) for tokens in members]
        picked = [
            tokens[lattice(item.patch[tokens], grid.cols, count)]
            for tokens, grid, count in zip(members, item.partitions, split(k, sizes, sizes), strict=True)
            if count
        ]
        return ctx.there(torch.cat(picked))


def lattice(patch: torch.Tensor, cols: int, count: int) -> torch.Tensor:
    """Evenly spread positions among the patches present in a grid.

    Args:
        patch: [m] int64, ascending ``row * cols + col`` of the tokens present (unpadding removes whole rows or columns,
            so they form a rectangle; other shapes work but spread less evenly).
        cols: Grid width.
        count: How many, at most m.

    Returns:
        [count] int64 distinct positions into ``patch``.
    """
    lines = [(patch // cols == row).nonzero().flatten() for row in (patch // cols).unique()]
    height, width = len(lines), max(len(line) for line in lines)
    rows = min(height, count, max(math.ceil(count / width), round(math.sqrt(count * height / width))))
    used = [lines[row] for row in evenly(rows, height).tolist()]
    caps = [len(line) for line in used]
    if sum(caps) < count:  # ragged shapes only: fall back to an even stride over all tokens
        return evenly(count, len(patch)).to(patch.device)
    shares = split(count, caps, caps)
    return torch.cat([line[evenly(n, len(line))] for line, n in zip(used, shares, strict=True) if n])


def evenly(count: int, length: int) -> torch.Tensor:
    """[count] int64 positions in ``range(length)``, each in the middle of its part of ``length / count``.

    In integers: at a hundred thousand tokens, float32 gives some positions twice.
    """
    return (2 * torch.arange(count, device="cpu") + 1) * length // (2 * count)
