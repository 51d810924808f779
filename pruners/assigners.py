"""How a grid of tokens becomes any number of tokens: the ways of QuoTA, arXiv 2503.08689, each in exact number.

The paper resamples to the largest h x w that fits in n, and loses the rest. Here the grid is cut into n near squares:
bands of even heights, each cut into cells of even widths, one more in some bands where n is no product.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from vlm_budget.ops import assigned_merge, weighted_merge
from vlm_budget.pruners.tome import most_similar_pairs
from vlm_budget.pruners.uniform import evenly
from vlm_budget.transfer import moved

Assigner = Literal["bilinear", "average", "merge", "stride"]
ASSIGNERS: tuple[Assigner, ...] = get_args(Assigner)


def bands(rows: int, cols: int, count: int) -> list[int]:
    """Cells of every band of a grid cut into ``count`` of them, 1 to ``rows * cols``; none has more than ``cols``."""
    number = min(rows, count, max(math.ceil(count / cols), round(math.sqrt(count * rows / cols))))
    return [(index + 1) * count // number - index * count // number for index in range(number)]


def places(rows: int, cols: int, count: int) -> torch.Tensor:
    """[count] int64 ascending: the tokens of a grid, in row-major order, in which the cells' centres lie."""
    cut = bands(rows, cols, count)
    lines = evenly(len(cut), rows).tolist()
    return torch.cat([line * cols + evenly(cells, cols) for line, cells in zip(lines, cut, strict=True)])


Listed = tuple[torch.Tensor, torch.Tensor]


def corners(rows: int, cols: int, count: int) -> Listed:
    """The tokens around the centre of every cell and their bilinear weights.

    Where all bands have as many cells, they are those of ``torch.nn.functional.interpolate`` without aligned corners.

    Returns:
        [count, 4] int64 tokens in row-major order, -1 for nothing, and [count, 4] float32 weights.
    """
    band, cell, cells, number = _cells(rows, cols, count)
    top, down = _before(band, number, rows)
    left, across = _before(cell, cells, cols)
    weights = torch.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], 1)
    index = torch.stack(
        [top * cols + left, top * cols + left + 1, (top + 1) * cols + left, (top + 1) * cols + left + 1]
    )
    return index.T.masked_fill(weights == 0, -1), weights.float()


def windows(rows: int, cols: int, count: int) -> Listed:
    """The tokens that every cell touches, in equal parts.

    Where all bands have as many cells, they are those of ``torch.nn.functional.adaptive_avg_pool2d``.

    Returns:
        [count, t] int64 tokens in row-major order, -1 for nothing, and [count, t] float32 weights.
    """
    band, cell, cells, number = _cells(rows, cols, count)
    top, height = _touched(band, number, rows)
    left, width = _touched(cell, cells, cols)
    inside = torch.arange(int((height * width).max()), device="cpu")
    index = (top[:, None] + inside // width[:, None]) * cols + left[:, None] + inside % width[:, None]
    real = inside < (height * width)[:, None]
    return index.masked_fill(~real, -1), real / (height * width)[:, None].float()


def _cells(rows: int, cols: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[count] int64 each: a cell's band, its place there, how many are in the band; and, [1], the number of bands."""
    cut = torch.tensor(bands(rows, cols, count), device="cpu")
    band = torch.repeat_interleave(torch.arange(len(cut), device="cpu"), cut)
    place = torch.arange(count, device="cpu") - (cut.cumsum(0) - cut)[band]
    return band, place, cut[band], torch.tensor([len(cut)], device="cpu")


def _before(index: torch.Tensor, parts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The token before the centre of a part of ``length`` tokens, and how far behind it the centre lies, in [0, 1)."""
    doubled = ((2 * index + 1) * length - parts).clamp_min(0)  # the centre's place, times twice the number of parts
    return doubled // (2 * parts), (doubled % (2 * parts)).double() / (2 * parts)


def _touched(index: torch.Tensor, parts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token that a part of ``length`` tokens touches, and how many it does."""
    first = index * length // parts
    return first, -((index + 1) * -length // parts) - first


def resampled(features: torch.Tensor, rows: int, cols: int, count: int, how: Assigner) -> torch.Tensor:
    """``count`` tokens made of a grid of them, in row-major order.

    Args:
        features: [rows * cols, D].
        rows: Grid height.
        cols: Grid width.
        count: 1 to ``rows * cols``.
        how: ``"bilinear"`` samples at the cells' centres, ``"average"`` takes the mean of the tokens a cell touches,
            ``"merge"`` see :func:`merged`, ``"stride"`` takes the tokens at the centres as they are.

    Returns:
        [count, D] in the dtype and on the device of ``features``.
    """
    if how == "merge":
        return merged(features, count)[0]
    if how == "stride":
        return features[moved(places(rows, cols, count), features.device)]
    return weighted_merge(features, *(corners if how == "bilinear" else windows)(rows, cols, count))


def merged(features: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the most similar tokens until ``count`` are left, by the bipartite matching of ToMe on the tokens.

    Every round matches tokens at even places with those between, and merges as many as are still too many, at most
    half. A token's embedding is the mean of all that it stands for.

    Args:
        features: [n, D].
        count: 1 to n.

    Returns:
        [count, D] embeddings, and [count] int64 ascending, the tokens that took in the others.
    """
    owner = kept = torch.arange(len(features), device=features.device)
    tokens = features
    while (length := len(kept)) > count:
        left = max(count, length - length // 2)
        (source,), (target,) = most_similar_pairs(tokens[None], length - left)
        stays = torch.ones(length, dtype=torch.bool, device=kept.device).index_fill(0, source, False)
        rank = stays.cumsum(0) - 1
        owner = rank.index_copy(0, source, rank[target])[owner]
        kept = kept[stays.argsort(descending=True, stable=True)[:left]]
        sizes = torch.zeros_like(kept).scatter_add_(0, owner, torch.ones_like(owner))
        tokens = assigned_merge(features, owner, sizes.float().reciprocal()[owner], left)
    return tokens, kept
