"""Softmax rows of chosen queries, heads reduced in the same pass."""

from __future__ import annotations

from typing import get_args

import torch

from ..errors import KernelInputError
from ..triton_kernels._launch import require_same_device
from ..triton_kernels.attention_rows import Reduce, attention_rows_reference, attention_rows_triton
from .dispatch import operator, runs_kernel

_SCHEMA = "(Tensor query, Tensor key, float scaling, Tensor? first, Tensor? stop, Tensor? mask, str reduce) -> Tensor"


@operator("attention_rows", _SCHEMA, floating=("query", "key"))
def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: torch.Tensor | None,
    stop: torch.Tensor | None,
    mask: torch.Tensor | None,
    reduce: str,
) -> torch.Tensor:
    run = attention_rows_triton if runs_kernel(query, key, mask) else attention_rows_reference
    return run(query, key, scaling, first, stop, mask, reduce)


@_operator.register_fake
def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: torch.Tensor | None,
    stop: torch.Tensor | None,
    mask: torch.Tensor | None,
    reduce: str,
) -> torch.Tensor:
    batch, heads, n, keys = *query.shape[:3], key.shape[2]
    shape = (batch, heads, n, keys) if reduce == "none" else (batch, n, keys)
    return query.new_empty(shape, dtype=torch.float32)


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    *,
    first: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: Reduce = "mean",
) -> torch.Tensor:
    """Softmax rows of a few chosen queries over all keys, added and reduced in float32, without gradients.

    A key is seen where limits and mask all say so. A row that sees none, or that holds infinity or NaN, is zero.

    Args:
        query: [B, H, n, d], strided at will but for the last dimension.
        key: [B, Hkv, L, d], same; heads shared by several query heads are not repeated.
        scaling: Factor on the logits.
        first: [B or 1, n] int32 or int64, the first key that a query sees; None for the first of all.
        stop: [B or 1, n] same, the first one behind those that it sees; None for all.
        mask: Bool (True: seen) or addends on the logits, broadcastable to [B, H, n, L].
        reduce: Over heads: ``"mean"``, ``"sum"`` or ``"max"``, or ``"none"``.

    Returns:
        [B, n, L] float32; [B, H, n, L] for ``reduce="none"``.

    Raises:
        KernelInputError: Shapes that do not match, an unknown ``reduce``, or what the kernel cannot read.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    check_heads(query, key)
    require_same_device(query=query, key=key, first=first, stop=stop, mask=mask)
    if reduce not in get_args(Reduce):
        raise KernelInputError(f"reduce must be one of {', '.join(get_args(Reduce))}, got {reduce!r}")
    rows: torch.Tensor = _operator(query.detach(), key.detach(), float(scaling), first, stop, mask, reduce)
    return rows


def check_heads(query: torch.Tensor, key: torch.Tensor) -> None:
    """Refuse queries and keys that do not go together.

    Raises:
        KernelInputError: Their batches, widths or numbers of heads do not match.
    """
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise KernelInputError(
            f"query must be [B, H, n, d] and key [B, Hkv, L, d], got {list(query.shape)} and {list(key.shape)}"
        )
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        raise KernelInputError(f"query heads must be a multiple of key heads, got {query.shape[1]} for {key.shape[1]}")
