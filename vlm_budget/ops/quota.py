"""A budget split by largest remainder, on the device."""

from __future__ import annotations

import torch

from ..triton_kernels.quota import MOST, quota_reference, quota_triton, require_shares
from .dispatch import mode, operator, runs_kernel


@operator("quota")
def _operator(total: int, weights: torch.Tensor, caps: torch.Tensor) -> torch.Tensor:
    require_shares(total, weights, caps)
    few = len(caps) <= MOST or mode() == "triton"
    run = quota_triton if few and runs_kernel(weights.float()) else quota_reference
    return run(total, weights, caps)


@_operator.register_fake
def _fake(total: int, weights: torch.Tensor, caps: torch.Tensor) -> torch.Tensor:
    return weights.new_empty(weights.shape, dtype=torch.int32)


def quota(total: int, weights: torch.Tensor, caps: torch.Tensor) -> torch.Tensor:
    """Split ``total`` in proportion to ``weights`` by largest remainder, within caps, without asking the device.

    The rules are those of :func:`vlm_budget.allocate.split` without floors: what a share cannot hold is poured over the
    others, zero weights get what is left once every other share is full, and equal remainders go to the earlier share.
    Weights are rounded to about a 2**30th of the largest, so that every device splits alike.

    Args:
        total: Whole units to give away.
        weights: [S] of floating point; what is not finite or not positive counts as zero.
        caps: [S] int64 or int32 on the same device, the most each share can take.

    Returns:
        [S] int32, summing to ``total``, or to the sum of the caps where that is less.

    Raises:
        KernelInputError: Shapes, devices or element types that do not fit, or a negative total.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    shares: torch.Tensor = _operator(total, weights, caps)
    return shares
