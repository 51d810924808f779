"""Greedy set selection: max-min diversity, determinantal point processes and maximum coverage.

Each is one Python loop over the tokens kept; a step is a few tensor operations over all candidates and, but for
:func:`max_coverage`, never makes the host wait. Equal gains go to the lower index on every device.
"""

from __future__ import annotations

import torch

WHOLE_UP_TO = 2**27
"""Similarities that :class:`CosineRows` keeps at once (512 MiB in float32, 11,585 tokens)."""

EXHAUSTED = 1e-5
"""Share of a token's length outside the span of the chosen ones that is no more than rounding."""


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Rows of length one, in float32 or wider; zeros stay zeros, and so do rows that hold no finite numbers."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1).nan_to_num(0.0)


class CosineRows:
    """The cosine similarities of n tokens, row by row: kept whole where they fit, else made when asked for.

    Args:
        features: [n, C].
        whole_up_to: The most similarities to keep.
    """

    def __init__(self, features: torch.Tensor, whole_up_to: int = WHOLE_UP_TO) -> None:
        self.unit = unit_rows(features)
        self.size = len(self.unit)
        self.whole = self.unit @ self.unit.T if self.size**2 <= whole_up_to else None
        self._chunk = max(1, whole_up_to // max(self.size, 1))

    def row(self, index: torch.Tensor) -> torch.Tensor:
        """[1, n] similarities of the token at ``index`` ([1] int64) to all."""
        if self.whole is not None:
            return self.whole.index_select(0, index)
        return self.unit.index_select(0, index) @ self.unit.T

    def nearest(self) -> torch.Tensor:
        """[n] distance ``1 - cos`` of every token to the nearest other one; infinite for an only token."""
        found = []
        for start in range(0, self.size, self._chunk):
            stop = min(start + self._chunk, self.size)
            rows = (self.unit[start:stop] @ self.unit.T if self.whole is None else self.whole[start:stop]).clone()
            rows.diagonal(start).fill_(float("-inf"))
            found.append(1 - rows.amax(1))
        return torch.cat(found)


@torch.no_grad()
def max_min(rows: CosineRows, k: int) -> torch.Tensor:
    """Tokens far apart: each next one is the farthest from its nearest chosen one.

    The first is the token whose nearest neighbour is farthest. A running minimum makes a step O(n), O(n C) where rows
    are not kept.

    Args:
        rows: Similarities; the distance is ``1 - cos``.
        k: How many, 1 to n.

    Returns:
        [k] int64 indices in the order of choice.
    """
    distance = rows.nearest()[None]
    chosen = torch.empty(1, k, dtype=torch.long, device=distance.device)
    for step in range(k):
        index = torch.argmax(distance, 1, keepdim=True, out=chosen[:, step : step + 1])[0]
        found = 1 - rows.row(index)
        distance = torch.minimum(distance, found, out=distance) if step else found
        distance.index_fill_(1, index, float("-inf"))
    return chosen[0]


@torch.no_grad()
def map_dpp(rows: CosineRows, log_quality: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy MAP of a determinantal point process with the kernel ``diag(q) S diag(q)``.

    *Fast Greedy MAP Inference for Determinantal Point Process to Improve Recommendation Diversity*, arXiv 1709.05135
    (NeurIPS 2018): each step adds the token that raises the determinant most, and one row to an incremental Cholesky
    factor, O(n) for every token chosen so far. The factor here is that of S; a token's gain is its squared quality
    times what is left of its squared length. Tokens without gain (duplicates of chosen ones, tokens beyond the rank,
    zero quality) follow when nothing else is left, by quality.

    Args:
        rows: Similarities S.
        log_quality: [n] logarithm of the quality, so that any range of it fits; ``-inf`` for zero.
        k: How many, 1 to n.

    Returns:
        [k] int64 indices in the order of choice.
    """
    level = 2 * log_quality.to(rows.unit)[None]
    left = (rows.unit.ne(0).any(1)[None] & level.isfinite()).to(level)  # exactly one, so that equal tokens tie
    last = _below_everything(log_quality).to(level)[None]
    chosen = torch.empty(1, k, dtype=torch.long, device=left.device)
    factor = left.new_empty(k, rows.size)
    for step in range(k):
        gain = torch.where(left > EXHAUSTED, left.log().add_(level), last)
        index = torch.argmax(gain, 1, keepdim=True, out=chosen[:, step : step + 1])[0]
        own = left.index_select(1, index)
        scale = torch.where(own > EXHAUSTED, own.rsqrt(), 0.0)
        above = factor[:step]
        row = torch.addmm(rows.row(index), above.index_select(1, index).T, above, alpha=-1)
        found = torch.mul(row, scale, out=factor[step : step + 1])
        left.addcmul_(found, found, value=-1).index_fill_(1, index, 0.0)
        last.index_fill_(1, index, float("-inf"))
    return chosen[0]


def _below_everything(scores: torch.Tensor) -> torch.Tensor:
    """[n] numbers in the order of ``scores``, ties to the lower index, all lower than any logarithm."""
    order = scores.argsort(descending=True, stable=True)
    places = torch.arange(-1, -len(scores) - 1, -1, dtype=torch.float32, device=scores.device)
    return torch.empty_like(places).scatter_(0, order, places * 1e30)


@torch.no_grad()
def max_coverage(rows: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy maximum coverage: each next column raises the sum of row maxima most.

    Only rows whose maximum rose can change a gain, so the gains are kept and corrected: after t columns that is about
    one row in t. Sums are taken in whole numbers, and so are exact in any order.

    Args:
        rows: [m, n] finite and non-negative.
        k: How many columns, 1 to n.

    Returns:
        [k] int64 column indices in the order of choice.
    """
    whole = _whole_numbers(rows)
    covered = whole.new_zeros(len(whole), 1)
    gain = whole.sum(0, keepdim=True)
    chosen = torch.empty(1, k, dtype=torch.long, device=rows.device)
    for step in range(k):
        index = torch.argmax(gain, 1, keepdim=True, out=chosen[:, step : step + 1])[0]
        column = whole.index_select(1, index)
        raised = (column > covered).nonzero()[:, 0]  # the host waits for their number, and saves nearly all of the work
        before, after = covered[raised], column[raised]
        gain -= whole[raised].clamp(before, after).sub_(before).sum(0)  # what was to be won there, and no longer is
        covered[raised] = after
        gain.index_fill_(1, index, -1)  # for good: a column chosen cannot be raised again
    return chosen[0]


def _whole_numbers(rows: torch.Tensor) -> torch.Tensor:
    """[m, n] int64: ``rows`` times a power of two, as fine as the sum over a column allows."""
    above = torch.frexp(rows.amax()).exponent  # every entry is below 2 ** above, and every sum below 2 ** 62
    return (rows.double() * torch.exp2(62.0 - len(rows).bit_length() - above.double())).long()
