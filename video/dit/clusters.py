"""k-means on the queries or keys of every head, warm from step to step.

Every head of every sample is clustered by itself, from the same pseudo-random tokens, so that a batch gives what its
samples give alone. The host never waits for the device: iterations are counted, not tested for convergence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlm_budget.ops import block_means, counting_sort, kmeans_assign

AXIS_ITERATIONS = 16
"""Power iterations for the axis along which centroids spread most; singular vectors would make the host wait."""


class Clusters(NamedTuple):
    """Tokens of every head, cluster after cluster.

    Attributes:
        centroids: [B, H, C, D] in the points' element type, to begin the next step with.
        order: [B, H, N] int32, tokens of the first cluster in their order, then those of the second, and so on.
        sizes: [B, H, C] int32, tokens of each; some may be empty.
    """

    centroids: torch.Tensor
    order: torch.Tensor
    sizes: torch.Tensor


def cluster(
    points: torch.Tensor, centroids: torch.Tensor, iterations: int, subset: torch.Tensor | None = None
) -> Clusters:
    """Lloyd's iterations: every token to its nearest centroid, every centroid to the mean of its tokens.

    Args:
        points: [B, H, N, D].
        centroids: [B, H, C, D] to start with. Those of empty clusters stay as they are.
        iterations: How many, at least 1.
        subset: [n] int64, tokens that centroids are the means of; None: all.

    Returns:
        All tokens' clusters. Without ``subset``, centroids are the means of these very clusters.
    """
    among = points if subset is None else points.index_select(2, subset)
    moving = centroids.float()
    for _ in range(iterations):
        order, sizes = counting_sort(kmeans_assign(among, moving), moving.shape[2])
        moving = block_means(among, order, sizes, moving)
    if subset is not None:
        order, sizes = counting_sort(kmeans_assign(points, moving), moving.shape[2])
    return Clusters(moving.to(points.dtype), order, sizes)


def first_clusters(
    points: torch.Tensor,
    starts: torch.Tensor,
    iterations: int,
    order: str = "index",
    subset: torch.Tensor | None = None,
) -> Clusters:
    """Clusters of tokens that were not clustered before.

    Args:
        points: [B, H, N, D].
        starts: [C] int64, the tokens that are the first centroids.
        iterations: How many, at least 1.
        order: How clusters are numbered: ``"chain"``, ``"axis"`` or ``"index"``, see :func:`arranged`. They keep their
            numbers in later steps, in which centroids move little.
        subset: See :func:`cluster`.
    """
    centroids = points.index_select(2, starts)
    if order == "index" or iterations == 1:
        return cluster(points, arranged(centroids, order), iterations, subset)
    centroids = cluster(points, centroids, iterations - 1, subset).centroids
    return cluster(points, arranged(centroids, order), 1, subset)


def arranged(centroids: torch.Tensor, order: str) -> torch.Tensor:
    """Centroids [B, H, C, D] so that neighbours are alike: in a :func:`chain`, along an :func:`axis`, or unchanged."""
    if order == "index":
        return centroids
    ranked = chain(centroids) if order == "chain" else axis(centroids)
    return centroids.gather(2, ranked[..., None].expand(centroids.shape))


def chain(centroids: torch.Tensor) -> torch.Tensor:
    """From the centroid farthest from the middle always on to the nearest that is left.

    C steps, one after the other: done once in a run, not in every step.

    Args:
        centroids: [B, H, C, D].

    Returns:
        [B, H, C] int64, which centroid stands at each place.
    """
    points = centroids.float()
    count = points.shape[2]
    current = (points - points.mean(2, keepdim=True)).square().sum(-1).argmax(-1, keepdim=True)
    left = points.square().sum(-1) / -2  # the nearest has the largest x . c - |c|^2 / 2
    ranked = []
    for _ in range(count):
        ranked.append(current)
        left = left.scatter(2, current, -torch.inf)
        at = points.gather(2, current[..., None].expand(*current.shape, points.shape[-1]))
        current = ((points @ at.mT).squeeze(-1) + left).argmax(-1, keepdim=True)
    return torch.cat(ranked, dim=2)


def axis(centroids: torch.Tensor) -> torch.Tensor:
    """Along the direction in which centroids spread most.

    Args:
        centroids: [B, H, C, D].

    Returns:
        [B, H, C] int64, which centroid stands at each place.
    """
    points = centroids.float()
    points = points - points.mean(2, keepdim=True)
    farthest = points.square().sum(-1).argmax(-1)[..., None, None]
    direction = points.gather(2, farthest.expand(*farthest.shape[:3], points.shape[-1])).mT
    for _ in range(AXIS_ITERATIONS):
        direction = torch.nn.functional.normalize(points.mT @ (points @ direction), dim=2)
    return (points @ direction).squeeze(-1).argsort(dim=-1, stable=True)


def pieces(sizes: torch.Tensor, largest: int, slots: int) -> torch.Tensor:
    """Clusters cut into nearly even pieces, so that no block is larger than can be promised.

    Args:
        sizes: [B, H, C] int32.
        largest: Tokens of a piece, at most.
        slots: Room for pieces; ``C + N // largest`` always suffice.

    Returns:
        [B, H, slots] int32 sizes of the pieces in the order of their clusters; the last ones are empty.
    """
    counts = (sizes.long() + (largest - 1)) // largest
    ends = counts.cumsum(-1)
    slot = torch.arange(slots, device=sizes.device).expand(*sizes.shape[:2], slots).contiguous()
    owner = torch.searchsorted(ends, slot, right=True).clamp_max_(sizes.shape[2] - 1)
    among = counts.gather(2, owner).clamp_min_(1)
    place = slot - (ends - counts).gather(2, owner)
    tokens = sizes.long().gather(2, owner)
    even = (place + 1) * tokens // among - place * tokens // among
    return torch.where(slot < ends[..., -1:], even, 0).int()


def labels_of(order: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """[B, H, N] int64, the block of each token, of an order and the sizes of its blocks."""
    shape = torch.broadcast_shapes(order.shape[:2], sizes.shape[:2])
    ends = sizes.long().cumsum(-1).expand(*shape, -1).contiguous()
    place = torch.arange(order.shape[2], device=order.device).expand(*shape, -1).contiguous()
    block = torch.searchsorted(ends, place, right=True).clamp_max_(sizes.shape[2] - 1)
    return torch.empty_like(block).scatter_(2, order.long().expand(block.shape), block)
