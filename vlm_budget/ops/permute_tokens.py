"""Tokens of every head in another order, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import KernelInputError
from ..triton_kernels._heads import lying
from ..triton_kernels.permute_tokens import (
    permute_tokens_reference,
    permute_tokens_triton,
    require_orders,
    unpermute_tokens_reference,
    unpermute_tokens_triton,
)
from .dispatch import operator, runs_kernel


@operator("permute_tokens", "(Tensor first, Tensor[] others, Tensor[] orders) -> Tensor[]", floating=("first",))
def _permute(first: torch.Tensor, others: Sequence[torch.Tensor], orders: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    tensors = [first, *others]
    require_orders(tensors, orders)
    run = permute_tokens_triton if runs_kernel(*tensors) else permute_tokens_reference
    return run(tensors, orders)


@_permute.register_fake
def _(first: torch.Tensor, others: Sequence[torch.Tensor], orders: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (first, *others)]


def permute_tokens(tensors: Sequence[torch.Tensor], orders: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Put tokens into another order, heads apart; all tensors of a call in one launch.

    Gradients do not flow through. The host does not wait.

    Args:
        tensors: Of one shape [B, H, L, D], element type and device, of any strides: queries, keys and values.
        orders: One per tensor, [B or 1, H or 1, L] int32: the token that comes to every place, each from 0 to L - 1,
            which a CUDA device does not check.

    Returns:
        As many contiguous [B, H, L, D].

    Raises:
        KernelInputError: Shapes, element types or devices that do not match.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    if not tensors:
        raise KernelInputError("permute_tokens needs at least one tensor, got none")
    first, *others = (lying(tensor.detach()) for tensor in tensors)
    taken: list[torch.Tensor] = _permute(first, others, [lying(order) for order in orders])
    return taken


@operator("unpermute_tokens", floating=("out",))
def _unpermute(out: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    require_orders([out], [order])
    run = unpermute_tokens_triton if runs_kernel(out) else unpermute_tokens_reference
    return run(out, order)


@_unpermute.register_fake
def _(out: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    batch, heads, length, width = out.shape
    return out.new_empty(batch, length, heads, width).transpose(1, 2)


def unpermute_tokens(out: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Put tokens back to where :func:`permute_tokens` took them from. Gradients do not flow through.

    Args:
        out: [B, H, L, D], of any strides.
        order: [B or 1, H or 1, L] int32, the order that it is in: a permutation of every row, which is not checked.

    Returns:
        [B, H, L, D] that lies in memory as [B, L, H, D], so that ``transpose(1, 2)`` gives a contiguous tensor.

    Raises:
        KernelInputError: Shapes, element types or devices that do not match.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    back: torch.Tensor = _unpermute(lying(out.detach()), lying(order))
    return back
