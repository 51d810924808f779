"""The nearest centroid of every token of every head."""

from __future__ import annotations

import torch

from ..triton_kernels._heads import lying
from ..triton_kernels.kmeans_assign import WIDEST, kmeans_assign_reference, kmeans_assign_triton, require_points
from .dispatch import mode, operator, runs_kernel


@operator("kmeans_assign", floating=("points", "centroids"))
def _operator(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    require_points(points, centroids)
    narrow = points.shape[3] <= WIDEST or mode() == "triton"
    run = kmeans_assign_triton if narrow and runs_kernel(points) else kmeans_assign_reference
    return run(points, centroids)


@_operator.register_fake
def _fake(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return points.new_empty(points.shape[:3], dtype=torch.int32)


def kmeans_assign(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of every token by Euclidean distance: the assignment of k-means, heads apart.

    The one of largest ``x . c - |c|^2 / 2`` is taken, added up in float32. Centroids are rounded to the points' element
    type before anything else. Nothing of it is differentiated, and the host does not wait.

    Args:
        points: [B, H, N, D], of any strides; the kernel takes up to 128 channels, ``auto`` the reference beyond.
        centroids: [B, H, C, D] float32, from 1 to 4,096 of them.

    Returns:
        [B, H, N] int32, ties to the lower index. A centroid that is not a number is nobody's; a token that is not a
        number goes to the first.

    Raises:
        KernelInputError: Shapes, element types or devices that do not match.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    labels: torch.Tensor = _operator(lying(points.detach()), lying(centroids.detach()))
    return labels
