"""Orders and blocks that only depend on the grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from vlm_budget.transfer import moved

from .call import Grid

Extent = tuple[int, int, int]
"""Frames, rows, columns."""


class Cut(NamedTuple):
    """Tokens in an order, cut into blocks.

    Attributes:
        order: [1, 1, N] int32, which token stands at each place; None: as they come.
        sizes: [1, 1, C] int32, tokens of each block.
        tile: Size of every block but the last, where all are alike.
    """

    order: torch.Tensor | None
    sizes: torch.Tensor
    tile: int | None = None


def per_grid(build: Callable[..., Any], device: torch.device, *arguments: Any) -> Any:
    """What a function of the host builds from hashable arguments, built once and kept on ``device``.

    Args:
        build: Returns a tensor, or a tuple that may hold some.
        device: Where they are used; the first use on it copies.
        arguments: Of ``build``.
    """
    return _per_grid(build, device, arguments)


@lru_cache(maxsize=64)
def _per_grid(build: Callable[..., Any], device: torch.device, arguments: tuple[Any, ...]) -> Any:
    with torch.inference_mode(False), torch.no_grad():  # kept for calls of every mode
        built = build(*arguments)
        if isinstance(built, torch.Tensor):
            return moved(built, device)
        parts = [moved(part, device) if isinstance(part, torch.Tensor) else part for part in built]
        return type(built)(*parts) if hasattr(built, "_fields") else tuple(parts)


def axis_tiles(length: int, size: int) -> list[int]:
    """An axis cut into parts of ``size``, the last one what is left."""
    return [min(size, length - start) for start in range(0, length, size)]


def even_parts(length: int, size: int) -> list[int]:
    """An axis cut into as few parts of at most ``size`` as there must be, alike but for one."""
    parts = -(-length // size)
    return [(index + 1) * length // parts - index * length // parts for index in range(parts)]


def fixed_blocks(tokens: int, size: int) -> Cut:
    """Tokens as they come, in blocks of ``size``, on the host."""
    return Cut(None, _sizes(axis_tiles(tokens, size)), size)


def cubes(grid: Grid, extent: Extent) -> Cut:
    """3-D tiles in raster order, those at the far borders smaller, on the host.

    Args:
        grid: Tokens of the video.
        extent: Of a tile, in frames, rows and columns.
    """
    along = [torch.arange(length, device="cpu") // part for length, part in zip(sides(grid), extent, strict=True)]
    counts = cube_counts(grid, extent)
    label = (along[0][:, None, None] * counts[1] + along[1][:, None]) * counts[2] + along[2]
    label = label.flatten()
    order = label.argsort(stable=True).int()[None, None]
    sizes = torch.bincount(label, minlength=counts[0] * counts[1] * counts[2])
    return Cut(order, sizes.int()[None, None])


def cube_counts(grid: Grid, extent: Extent) -> Extent:
    """3-D tiles along each axis."""
    frames, rows, cols = (-(-length // part) for length, part in zip(sides(grid), extent, strict=True))
    return frames, rows, cols


def token_major(grid: Grid) -> torch.Tensor:
    """[1, 1, N] int32 on the host: places of a frame one after the other, each with its tokens of all frames."""
    tokens = torch.arange(grid.tokens, dtype=torch.int32, device="cpu")
    return tokens.view(grid.frames, grid.frame).T.reshape(1, 1, -1)


def sides(grid: Grid) -> Extent:
    """Frames, rows, columns."""
    return grid.frames, grid.rows, grid.cols


def drawn(tokens: int, count: int, seed: int) -> torch.Tensor:
    """[count] int64 on the host: different tokens in pseudo-random order, the same for every sample and head."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(tokens, generator=generator, device="cpu")[:count]


def _sizes(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.int32, device="cpu")[None, None]
