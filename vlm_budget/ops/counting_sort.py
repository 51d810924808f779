"""Tokens in the order of their clusters."""

from __future__ import annotations

import torch

from ..triton_kernels._heads import lying
from ..triton_kernels.counting_sort import counting_sort_reference, counting_sort_triton, require_labels
from .dispatch import operator, runs_kernel


@operator("counting_sort", "(Tensor labels, SymInt clusters) -> (Tensor, Tensor)")
def _operator(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    require_labels(labels, clusters)
    run = counting_sort_triton if runs_kernel(labels) else counting_sort_reference
    return run(labels, clusters)


@_operator.register_fake
def _fake(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    return labels.new_empty(labels.shape), labels.new_empty(*labels.shape[:2], clusters)


def counting_sort(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that puts tokens of one cluster next to each other, heads apart; stable. The host does not wait.

    Args:
        labels: [B, H, N] int32, the cluster of every token; one outside of the clusters counts as the nearest of them.
        clusters: C, at least 1.

    Returns:
        [B, H, N] int32 tokens: those of cluster 0 as they were, then those of cluster 1, and so on; and [B, H, C] int32
        sizes of the clusters.

    Raises:
        KernelInputError: Other shapes or element types, or fewer than one cluster.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    order, sizes = _operator(lying(labels), clusters)
    return order, sizes
