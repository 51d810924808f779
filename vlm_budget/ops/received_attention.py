"""The attention that every key receives."""

from __future__ import annotations

from typing import get_args

import torch

from ..errors import KernelInputError
from ..triton_kernels._launch import require_same_device
from ..triton_kernels.received_attention import Over, received_attention_reference, received_attention_triton
from .attention_rows import check_heads
from .dispatch import operator, runs_kernel

_SCHEMA = "(Tensor query, Tensor key, float scaling, Tensor? first, Tensor? stop, Tensor? mask, str reduce) -> Tensor"


@operator("received_attention", _SCHEMA, floating=("query", "key"))
def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: torch.Tensor | None,
    stop: torch.Tensor | None,
    mask: torch.Tensor | None,
    reduce: str,
) -> torch.Tensor:
    run = received_attention_triton if runs_kernel(query, key, mask) else received_attention_reference
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
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


def received_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    *,
    first: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: Over = "mean",
) -> torch.Tensor:
    """Mean of the softmax map over heads and queries, in float32, without the map and without gradients.

    What a query sees is said as for :func:`attention_rows`; rows that see nothing, or that hold infinity or NaN, give
    nothing and are counted. Where limits grow from query to query (causal attention, packed sequences, windows), blocks
    that they part are not read.

    Args:
        query: [B, H, n, d], strided at will but for the last dimension.
        key: [B, Hkv, L, d], same; heads shared by several query heads are not repeated.
        scaling: Factor on the logits.
        first: [B or 1, n] int32 or int64, the first key that a query sees; None for the first of all.
        stop: [B or 1, n] same, the first one behind those that it sees; None for all.
        mask: Bool (True: seen) or addends on the logits, broadcastable to [B, H, n, L].
        reduce: Over queries: ``"mean"`` or ``"sum"``. Over heads it is always the mean.

    Returns:
        [B, L] float32.

    Raises:
        KernelInputError: Shapes that do not match, an unknown ``reduce``, or what the kernel cannot read.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    check_heads(query, key)
    require_same_device(query=query, key=key, first=first, stop=stop, mask=mask)
    if reduce not in get_args(Over):
        raise KernelInputError(f"reduce must be one of {', '.join(get_args(Over))}, got {reduce!r}")
    received: torch.Tensor = _operator(query.detach(), key.detach(), float(scaling), first, stop, mask, reduce)
    return received
