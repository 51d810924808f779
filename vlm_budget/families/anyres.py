"""Any-resolution packing shared by LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision.

The model's own ``pack_image_features`` is run on a tensor of coordinates instead of features, with NaN for the newline
vector. Whatever it does (unpadding, row ends, shrinking of large mosaics) is thereby read off exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..layout import Partition, VisualItem

Pack = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


def anyres_item(size: Sequence[int], grid: tuple[int, int] | None, side: int, pixels: int, pack: Pack) -> VisualItem:
    """Layout of one image.

    Args:
        size: The image's height and width in pixels.
        grid: Crop rows and columns; None for an image with a single partition.
        side: Tokens along one side of a partition.
        pixels: Pixels along one side of a partition.
        pack: Packs ``[[P, side * side, 3]]`` coordinates with a given [3] newline vector into [n, 3].

    Returns:
        The item; crops follow the thumbnail in row-major order.
    """
    rows, cols = grid or (0, 0)
    partitions = [Partition("thumbnail" if grid else "image", side, side)]
    partitions += [
        Partition("crop", side, side, _crop_box(size, (rows, cols), pixels, row, col))
        for row in range(rows)
        for col in range(cols)
    ]
    packed = pack([_coordinates(rows, cols, side)], torch.full((3,), math.nan))
    newline = packed[:, 0].isnan()
    place = packed.nan_to_num(0).round().long()
    resampled = bool((packed.nan_to_num(0) - place).abs().max() > 1e-3)
    base = packed[:, 0] > 0.5
    row, col = place[:, 1], place[:, 2]
    crop = torch.where(base, 0, 1 + (row // side) * max(cols, 1) + col // side)
    partition = crop.masked_fill(newline, -1)
    patch = ((row % side) * side + col % side).masked_fill(newline, -1)
    line = newline.cumsum(0) - newline.long()
    if grid:
        line = line.masked_fill(base, -1)
    picture = (int(size[0]), int(size[1]))
    return VisualItem("image", tuple(partitions), partition, patch, line, resampled, picture)


def _coordinates(rows: int, cols: int, side: int) -> torch.Tensor:
    """[P, side * side, 3]: (is the base picture, row in the mosaic, column in the mosaic)."""
    inner = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    parts = [torch.cat([torch.ones(side * side, 1), inner], 1)]
    for row in range(rows):
        for col in range(cols):
            offset = torch.tensor([row * side, col * side])
            parts.append(torch.cat([torch.zeros(side * side, 1), inner + offset], 1))
    return torch.stack(parts)


def _crop_box(
    size: Sequence[int], grid: tuple[int, int], pixels: int, row: int, col: int
) -> tuple[float, float, float, float]:
    # The picture is resized to fit the canvas with its aspect kept, and padded evenly.
    height, width = (int(n) for n in size)
    canvas_h, canvas_w = grid[0] * pixels, grid[1] * pixels
    scale_h, scale_w = canvas_h / height, canvas_w / width
    if scale_w < scale_h:
        new_w, new_h = canvas_w, min(math.ceil(height * scale_w), canvas_h)
    else:
        new_w, new_h = min(math.ceil(width * scale_h), canvas_w), canvas_h
    left, top = (canvas_w - new_w) // 2, (canvas_h - new_h) // 2
    return (
        (col * pixels - left) / new_w,
        (row * pixels - top) / new_h,
        ((col + 1) * pixels - left) / new_w,
        ((row + 1) * pixels - top) / new_h,
    )


def crop_grid(size: Any, pinpoints: Sequence[Sequence[int]], pixels: int) -> tuple[int, int]:
    """Crop rows and columns of an image: the pinpoint that wastes least, as the processor chooses it."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution([int(n) for n in size], [list(p) for p in pinpoints])
    return height // pixels, width // pixels
