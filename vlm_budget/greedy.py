"""Greedy set selection: max-min diversity, determinantal point processes and maximum coverage.

Each is one Python loop over the tokens kept; a step is a few tensor operations over all candidates and, but for
:func:`max_coverage`, never makes the host wait. On CUDA the first two are kernels (:mod:`vlm_budget.ops`). Equal gains
go to the lower index on every device.
"""

from __future__ import annotations

import torch

from .ops import greedy_diversity, greedy_dpp
from .ops.greedy_diversity import chooses_by_kernel
from .precision import exactly
from .triton_kernels._cosines import CosineRows as CosineRows
from .triton_kernels._cosines import unit_rows as unit_rows
from .triton_kernels.greedy_diversity import max_min_reference
from .triton_kernels.greedy_dpp import map_dpp_reference


@torch.no_grad()
def max_min(rows: CosineRows, k: int) -> torch.Tensor:
    """Tokens far apart by cosine: :func:`vlm_budget.ops.greedy_diversity`, with similarities that others use, too.

    Args:
        rows: Similarities; the distance is ``1 - cos``.
        k: How many, 1 to n.

    Returns:
        [k] int64 indices in the order of choice.
    """
    if _by_kernel(rows):
        return greedy_diversity(rows.features, k)
    with exactly(rows.features.device):
        return max_min_reference(rows, k)


@torch.no_grad()
def map_dpp(rows: CosineRows, log_quality: torch.Tensor, k: int) -> torch.Tensor:
    """A determinantal point process: :func:`vlm_budget.ops.greedy_dpp`, with similarities that others use, too.

    Args:
        rows: Similarities S.
        log_quality: [n] logarithm of the quality, so that any range of it fits; ``-inf`` for zero.
        k: How many, 1 to n.

    Returns:
        [k] int64 indices in the order of choice.
    """
    if _by_kernel(rows):
        return greedy_dpp(rows.features, log_quality, k)
    with exactly(rows.features.device):
        return map_dpp_reference(rows, log_quality, k)


def _by_kernel(rows: CosineRows) -> bool:
    return rows.fits and chooses_by_kernel(rows.features[None])


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
    whole = whole_numbers(rows)
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


def whole_numbers(rows: torch.Tensor) -> torch.Tensor:
    """[m, ...] int64: ``rows`` times a power of two, as fine as a sum over the first axis allows: exact in any order.

    Args:
        rows: [m, ...] finite and non-negative.
    """
    above = torch.frexp(rows.amax()).exponent  # every entry is below 2 ** above, and every sum below 2 ** 62
    return (rows.double() * torch.exp2(62.0 - len(rows).bit_length() - above.double())).long()
