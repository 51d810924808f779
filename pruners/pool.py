"""Pool: average neighbouring tokens down to exactly the budget, the baseline that drops nothing.

Each partition gets a share of the budget in proportion to its tokens and is cut into that many cells, near squares in
the sense of ``uniform``: bands of text lines at even heights, each cut into cells of even width.
Every token lies in exactly one cell. A cell's embedding is the mean of its tokens as the language model gets them, and
stands where the token nearest to its centre stood. LLaVA-OneVision (arXiv 2408.03326) pools video frames in this space
too, by a fixed factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlm_budget.allocate import split
from vlm_budget.ops import segmented_topk
from vlm_budget.pruner import Context, Pruner, Selection
from vlm_budget.transfer import moved


@dataclass(frozen=True, kw_only=True)
class Pool(Pruner):
    """Average tokens over the cells of a 2-D grid."""

    merges = True

    def pick(self, ctx: Context, k: int) -> Selection:
        """Cut the partitions into ``k`` cells, and average over each."""
        item = ctx.item
        members = [(item.partition == index).nonzero().flatten() for index in range(len(item.partitions))]
        sizes = [len(tokens) for tokens in members]
        cell = torch.full((item.size,), -1, device="cpu")
        distance = torch.zeros(item.size, dtype=torch.long, device="cpu")
        start = 0
        for tokens, grid, count in zip(members, item.partitions, split(k, sizes, sizes), strict=True):
            if count:
                cells = cells_of(item.patch[tokens], grid.cols, count)
                cell[tokens] = start + cells
                distance[tokens] = centre_distance(item.patch[tokens], grid.cols, cells)
                start += count
        keep = segmented_topk(-distance, cell, [1] * k)
        means = cell_means(ctx.features, cell)
        return Selection(ctx.there(keep), means[ctx.there(cell[keep])])


def cells_of(patch: torch.Tensor, cols: int, count: int) -> torch.Tensor:
    """Which cell each token lies in.

    Args:
        patch: [m] int64, ascending ``row * cols + col`` of the tokens present (a rectangle after unpadding; on other
            shapes that cannot be banded, cells are runs of the flattened sequence).
        cols: Grid width.
        count: Cells, at most m.

    Returns:
        [m] int64 in ``range(count)``; no cell is empty.
    """
    row = torch.unique(patch // cols, return_inverse=True)[1]
    height = int(row.max()) + 1
    width = math.ceil(len(patch) / height)
    bands = min(height, count, max(math.ceil(count / width), round(math.sqrt(count * height / width))))
    band = row * bands // height
    column = torch.zeros_like(patch)
    widths = []
    for index in range(bands):
        inside = band == index
        present, column[inside] = torch.unique(patch[inside] % cols, return_inverse=True)
        widths.append(len(present))
    if sum(widths) < count:
        return torch.arange(len(patch), device="cpu") * count // len(patch)
    sizes = torch.tensor(split(count, widths, widths, [1] * bands), device="cpu")
    within = column * sizes[band] // torch.tensor(widths, device="cpu")[band]
    return (sizes.cumsum(0) - sizes)[band] + within


def centre_distance(patch: torch.Tensor, cols: int, cell: torch.Tensor) -> torch.Tensor:
    """[m] int64 squared distance of each token from the mean place of its cell, times the cell's size squared."""
    size = torch.bincount(cell)
    distance = torch.zeros_like(patch)
    for axis in (patch // cols, patch % cols):
        total = torch.zeros_like(size).index_add_(0, cell, axis)
        distance += (axis * size[cell] - total[cell]).square()
    return distance


def cell_means(features: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    """[cells, D] mean features in their dtype; tokens of cell -1 (separators) belong to none."""
    order = cell.argsort(stable=True)
    order = order[int((cell < 0).sum()) :]
    sizes = torch.bincount(cell[order])
    place = torch.arange(len(order), device="cpu") - (sizes.cumsum(0) - sizes)[cell[order]]
    index = torch.full((len(sizes), int(sizes.max())), -1, device="cpu")
    index[cell[order], place] = order
    index, sizes = (moved(tensor, features.device) for tensor in (index, sizes))
    # Gathered and summed in a fixed order: adding by index would round differently from run to run on a GPU.
    gathered = features[index.clamp_min(0)].float() * (index >= 0)[..., None]
    return (gathered.sum(1) / sizes[:, None]).to(features.dtype)
