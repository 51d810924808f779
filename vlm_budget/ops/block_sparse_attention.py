"""Attention over some pairs of blocks, with what is left out counted by its means."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from ..errors import KernelInputError
from ..triton_kernels.block_sparse_attention import (
    WIDEST,
    block_sparse_attention_reference,
    block_sparse_attention_triton,
    require_attention,
)
from .dispatch import mode, operator, runs_kernel
from .flash_blocks import flash_blocks

Backend = Literal["auto", "tma", "fa4"]

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor query_sizes, Tensor key_sizes, Tensor kept, float scale,"
    " Tensor? mean_keys, Tensor? mean_values, int? tile, bool tma) -> (Tensor, Tensor)"
)


@operator("block_sparse_attention", _SCHEMA, floating=("query", "key", "value", "mean_keys", "mean_values"))
def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    mean_keys: torch.Tensor | None,
    mean_values: torch.Tensor | None,
    tile: int | None,
    tma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    require_attention(query, key, value, query_sizes, key_sizes, kept, mean_keys, mean_values)
    given = (query, key, value, query_sizes, key_sizes, kept, scale, mean_keys, mean_values, tile)
    if tma or (runs_kernel(query) and (query.shape[3] <= WIDEST or mode() == "triton")):
        return block_sparse_attention_triton(*given, tma)
    return block_sparse_attention_reference(*given)


@_operator.register_fake
def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    mean_keys: torch.Tensor | None,
    mean_values: torch.Tensor | None,
    tile: int | None,
    tma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = query.new_empty(query.shape)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    kept: torch.Tensor,
    *,
    scale: float,
    mean_keys: torch.Tensor | None = None,
    mean_values: torch.Tensor | None = None,
    tile: int | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query block to the key blocks that it keeps. No gradients, and the host does not wait.

    Blocks follow each other from the first row. Dropped blocks may be counted by their means (the centroid correction
    of SVG-EAR, arXiv:2603.08982): block j then stands in the same softmax as ``key_sizes[j]`` keys at its mean key,
    with its mean value.

    Args:
        query: [B, H, Lq, D], strided at will but for the last dimension.
        key: [B, H, Lk, D], same, and of the same element type.
        value: [B, H, Lk, D], same.
        query_sizes: [B or 1, H or 1, Cq] int32, rows of each query block; some may be 0. Rows beyond their sum get
            zeros, and ``-inf`` in the second result.
        key_sizes: [B or 1, H or 1, Ck] int32; keys beyond their sum are never read.
        kept: [B or 1, H or 1, Cq, Ck] bool, the pairs that are computed.
        scale: Factor on the logits, not negative.
        mean_keys: [B, H, Cm, D] mean keys of the first Cm key blocks, which are corrected; the others are not.
        mean_values: [B, H, Cm, D], with ``mean_keys``.
        tile: Size of all blocks but the last two of each side (a part of one, and text), where they are alike: a hint
            that changes no result.
        backend: ``"auto"`` is what ``VLM_BUDGET_KERNELS`` says; ``"tma"`` is the kernel with keys read by the tensor
            memory accelerator; ``"fa4"`` is FlashAttention-4 for ``tile=128`` on Hopper, not verified on a device.

    Returns:
        [B, H, Lq, D] like ``query``, and [B, H, Lq] float32 natural logarithms of the softmax denominators. A row
        that sees nothing gets zeros and ``-inf``.

    Raises:
        KernelInputError: Tensors that do not fit together, or what the kernel cannot read.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
        MissingExtraError: ``backend="fa4"`` without FlashAttention-4.
    """
    require_attention(query, key, value, query_sizes, key_sizes, kept, mean_keys, mean_values)
    if backend not in get_args(Backend):
        raise KernelInputError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if tile is not None and tile < 1:
        raise KernelInputError(f"tile must be at least 1, got {tile}")
    if not 0 <= scale < math.inf:
        raise KernelInputError(f"scale must be finite and not negative, got {scale}")
    if backend == "fa4":
        return flash_blocks(
            block_sparse_attention,
            *(query.detach(), key.detach(), value.detach(), query_sizes, key_sizes, kept),
            scale=scale,
            mean_keys=mean_keys,
            mean_values=mean_values,
            tile=tile,
        )
    means = (None if mean is None else mean.detach() for mean in (mean_keys, mean_values))
    found: tuple[torch.Tensor, torch.Tensor] = _operator(
        *(query.detach(), key.detach(), value.detach(), query_sizes, key_sizes, kept, float(scale)),
        *(*means, tile, backend == "tma"),
    )
    return found
