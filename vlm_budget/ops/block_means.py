"""Means of blocks of tokens."""

from __future__ import annotations

import torch

from ..triton_kernels._heads import lying
from ..triton_kernels.block_means import block_means_reference, block_means_triton, require_blocks
from .dispatch import operator, runs_kernel


@operator(
    "block_means",
    "(Tensor values, Tensor? order, Tensor sizes, Tensor? otherwise) -> Tensor",
    floating=("values", "otherwise"),
)
def _operator(
    values: torch.Tensor, order: torch.Tensor | None, sizes: torch.Tensor, otherwise: torch.Tensor | None
) -> torch.Tensor:
    require_blocks(values, order, sizes, otherwise)
    run = block_means_triton if runs_kernel(values) else block_means_reference
    return run(values, order, sizes, otherwise)


@_operator.register_fake
def _fake(
    values: torch.Tensor, order: torch.Tensor | None, sizes: torch.Tensor, otherwise: torch.Tensor | None
) -> torch.Tensor:
    shape = (*values.shape[:2], sizes.shape[2], values.shape[3])
    return values.new_empty(shape, dtype=torch.float32)


def block_means(
    values: torch.Tensor,
    order: torch.Tensor | None,
    sizes: torch.Tensor,
    otherwise: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of every block of tokens, heads apart, added up in float32: the update of k-means, or mean keys.

    Blocks follow each other, the first from the first token. Tokens behind the last block count for none. Nothing of it
    is differentiated; the same input gives the same bits, and the host does not wait.

    Args:
        values: [B, H, N, D], of any strides.
        order: [B or 1, H or 1, N] int32, the token at every place, as from :func:`counting_sort`; each from 0 to N - 1,
            which a CUDA device does not check. None where the values lie in order.
        sizes: [B or 1, H or 1, C] int32 tokens of every block, adding up to at most N.
        otherwise: [B, H, C, D] float32, what an empty block has; 0 by default.

    Returns:
        [B, H, C, D] float32.

    Raises:
        KernelInputError: Shapes, element types or devices that do not match.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    values, sizes = lying(values.detach()), lying(sizes)
    order = None if order is None else lying(order)
    otherwise = None if otherwise is None else lying(otherwise.detach())
    means: torch.Tensor = _operator(values, order, sizes, otherwise)
    return means
