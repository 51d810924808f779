"""What the operations of sparse video attention are timed on: one entry per operation, as :mod:`.op_cases` has them.

Tokens come with clusters of about as many tokens as SVG2 gives those of released models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vlm_budget import ops
from vlm_budget.ops.block_sparse_attention import Backend
from vlm_budget.video.dit.call import Grid

from .op_work import TOLERANCE, Bound, OpCase, Sizes, Work, weight
from .video_shapes import TILE, Cut, Kind, Shape, cut

LENGTHS = (4096, 32760)
"""Tokens: a short video, and Wan's at 480p."""
QUERIES, KEYS = 300, 120
"""Tokens of a cluster."""
DENSITY = 0.25

VIDEO_CASES: list[OpCase] = []


def case(op: str, what: str, bound: Bound) -> Callable[[Any], Any]:
    """Add a function as an entry."""

    def add(make: Callable[[Sizes, int, torch.Generator], Work]) -> Any:
        VIDEO_CASES.append(OpCase(op, what, bound, make))
        return make

    return add


# --- the table -------------------------------------------------------------------------------------------------------


@case("kmeans_assign", "to clusters of keys", "matrix")
def _kmeans_assign(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    (points,), clusters = _tokens(sizes, tokens, draw, 1), _clusters(tokens, KEYS)
    some = torch.randperm(tokens, generator=draw, device=sizes.device)[:clusters]
    centroids = points[:, :, some].float()
    moved = weight(points, centroids) + 4 * sizes.heads * tokens

    def judge(labels: torch.Tensor) -> torch.Tensor:
        rounded = centroids.to(points.dtype)[0].float()
        half, worst = rounded.square().sum(-1) / 2, torch.zeros((), device=sizes.device)
        for part, label in zip(points[0].split(2048, 1), labels[0].long().split(2048, 1), strict=True):
            gain = part.float() @ rounded.mT - half[:, None]
            short = gain.amax(-1) - gain.gather(-1, label[..., None])[..., 0]
            worst = torch.maximum(worst, short.max() / half.max())
        return worst

    call = partial(ops.kmeans_assign, points, centroids)
    return Work(call, moved, 2 * points.numel() * clusters, 1e-5, judge)


@case("counting_sort", "labels of key clusters", "memory")
def _counting_sort(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    labels = _labels(sizes, tokens, draw)
    clusters = _clusters(tokens, KEYS)
    moved = 2 * weight(labels) + 4 * sizes.heads * clusters
    return Work(partial(ops.counting_sort, labels, clusters), moved, tolerance=0)


@case("block_means", "clusters of keys, by an order", "memory")
def _block_means(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    (values,) = _tokens(sizes, tokens, draw, 1)
    order, counts = _sorted(sizes, tokens, draw)
    moved = weight(values, order, counts) + 4 * counts.numel() * sizes.head_dim
    return Work(partial(ops.block_means, values, order, counts, None), moved)


@case("permute_tokens", "queries, keys and values", "memory")
def _permute_tokens(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    tensors = _tokens(sizes, tokens, draw, 3)
    rows, columns = (_sorted(sizes, tokens, draw)[0] for _ in range(2))
    moved = 2 * weight(*tensors) + weight(rows, columns)
    return Work(partial(ops.permute_tokens, tensors, [rows, columns, columns]), moved, tolerance=0)


@case("unpermute_tokens", "what attention gives", "memory")
def _unpermute_tokens(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    (out,) = _tokens(sizes, tokens, draw, 1)
    order = _sorted(sizes, tokens, draw)[0]
    return Work(partial(ops.unpermute_tokens, out, order), 2 * weight(out) + weight(order), tolerance=0)


@case("block_map", "a quarter of the keys", "latency")
def _block_map(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    means, moved = _means(sizes, tokens, draw)
    return Work(partial(ops.block_map, *means, sizes.head_dim**-0.5, density=DENSITY), moved, tolerance=0)


@case("block_map", "nine tenths of the mass", "latency")
def _block_map_mass(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    means, moved = _means(sizes, tokens, draw)
    scale, share = sizes.head_dim**-0.5, 0.9

    def judge(kept: torch.Tensor) -> torch.Tensor:
        """By how much the mass misses its share, or still reaches it without the smallest block that is kept."""
        logits = means[0].double() @ means[1].double().mT * scale + means[2].double().log()[:, :, None]
        mass = logits.softmax(-1)
        whole = (mass * kept).sum(-1)
        least = mass.masked_fill(~kept, torch.inf).amin(-1)
        return torch.maximum(share - whole, whole - least - share).max().clamp_min(0)

    return Work(partial(ops.block_map, *means, scale, top_p=share), moved, tolerance=1e-5, judge=judge)


def _attention(kind: Kind, tile: int | None, corrected: bool, sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    shape = _shape(sizes, tokens)
    query, key, value = _tokens(sizes, shape.length, draw, 3)
    blocks = cut(shape, kind, tile, DENSITY, sizes.device, seed=draw.initial_seed())
    means = block_means_of(key, value, blocks) if corrected else None
    call = attention(query, key, value, blocks, shape.scale, means)
    moved = weight(query, key, value, query, blocks.kept) + 4 * sizes.heads * shape.length
    return Work(call, moved, int(shape.flops * blocks.pairs(corrected)), TOLERANCE[sizes.dtype])


case("block_sparse_attention", "a quarter, uneven blocks", "matrix")(partial(_attention, "clustered", None, False))
case("block_sparse_attention", "a quarter, the rest by means", "matrix")(partial(_attention, "random", None, True))
case("block_sparse_attention", f"a quarter, blocks of {TILE}", "matrix")(partial(_attention, "random", TILE, False))


# --- inputs ----------------------------------------------------------------------------------------------------------


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Cut,
    scale: float,
    means: tuple[torch.Tensor, torch.Tensor] | None,
    backend: Backend = "auto",
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A call of block-sparse attention."""
    keys, values = means or (None, None)
    given = (query, key, value, blocks.query_sizes, blocks.key_sizes, blocks.kept)
    named = {"mean_keys": keys, "mean_values": values, "tile": blocks.tile, "backend": backend}
    return partial(ops.block_sparse_attention, *given, scale=scale, **named)  # type: ignore[arg-type]


def block_means_of(key: torch.Tensor, value: torch.Tensor, blocks: Cut) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, H, C, D] mean keys and values of the video's blocks."""
    sizes = blocks.key_sizes[..., : blocks.video].contiguous()
    with ops.use("reference"):
        return ops.block_means(key, None, sizes, None), ops.block_means(value, None, sizes, None)


def _tokens(sizes: Sizes, tokens: int, draw: torch.Generator, count: int) -> list[torch.Tensor]:
    """[1, H, N, D] of noise, so many."""
    size = (1, sizes.heads, tokens, sizes.head_dim)
    return [torch.randn(size, generator=draw, device=sizes.device).to(sizes.dtype) for _ in range(count)]


def _clusters(tokens: int, each: int) -> int:
    return max(2, tokens // each)


def _labels(sizes: Sizes, tokens: int, draw: torch.Generator) -> torch.Tensor:
    """[1, H, N] int32 of clusters of keys."""
    size = (1, sizes.heads, tokens)
    return torch.randint(_clusters(tokens, KEYS), size, generator=draw, device=sizes.device, dtype=torch.int32)


def _sorted(sizes: Sizes, tokens: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """An order by cluster, and the clusters' sizes."""
    with ops.use("reference"):  # a kernel that is wrong must not spoil the inputs of another
        order, counts = ops.counting_sort(_labels(sizes, tokens, draw), _clusters(tokens, KEYS))
    return order, counts


def _shape(sizes: Sizes, tokens: int) -> Shape:
    """A video of so many tokens and a few of text."""
    text = min(256, tokens // 8)
    clusters = (_clusters(tokens, QUERIES), _clusters(tokens, KEYS))
    return Shape("", Grid(1, 1, tokens - text), text, sizes.heads, sizes.head_dim, clusters, 0.0)


def _means(
    sizes: Sizes, tokens: int, draw: torch.Generator
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], int]:
    """Mean queries and keys of clusters with their sizes, and the bytes that a map of them moves."""

    def normal(count: int) -> torch.Tensor:
        return torch.randn(1, sizes.heads, count, sizes.head_dim, generator=draw, device=sizes.device)

    rows, columns = _clusters(tokens, QUERIES), _clusters(tokens, KEYS)
    counts = _sorted(sizes, tokens, draw)[1]
    means = (normal(rows), normal(columns), counts)
    return means, weight(*means) + sizes.heads * rows * columns
