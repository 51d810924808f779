"""Keys of tokens as the kernels that compare all pairs read them, and their cosines."""

from __future__ import annotations

import torch

from ._launch import LARGEST, blocks, device_function, tl


def channel_block(dtype: torch.dtype) -> int:
    """Channels of keys multiplied at a time."""
    return 16 if dtype == torch.float32 else 64


def lengths_of(keys: torch.Tensor) -> torch.Tensor:
    """[n] float32: infinite where float32 cannot hold the square of it, not a number where a key is not finite."""
    peak = torch.linalg.vector_norm(keys, torch.inf, dim=-1).float()
    return torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32) + 0 * peak


def aligned(given: torch.Tensor) -> torch.Tensor:
    """As it is, or a copy with zeros behind its rows, which change no cosine.

    Launches are made, and compiled, for rows that begin at multiples of 16 elements alone, and for strides of 32 bits:
    others take more registers than there are.
    """
    starts = given.data_ptr() % 16 == 0
    if given.ndim == 1:
        return given if starts else given.clone()
    count, width = given.shape
    rounded = 16 * max(blocks(width, 16), 1)
    if starts and rounded == width and given.stride(0) % 16 == 0 and given.stride(0) <= LARGEST:
        return given
    copy = given.new_zeros(count, rounded)
    copy[:, :width] = given
    return copy


@device_function
def product(left, right, before, WIDEN: tl.constexpr):
    """``before + left @ right``; ``WIDEN`` in the interpreter, whose own product misreads bfloat16."""
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, before, input_precision="ieee")


@device_function
def bounded(length):
    """What torch's normalize divides by: not less than 1e-12, and what is not a number stays so."""
    return tl.where(length < 1e-12, 1e-12, length)


@device_function
def cosines(
    keys,
    lengths,
    rows,
    columns,
    rows_inside,
    columns_inside,
    width,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Cosines of the keys of some tokens with those of others; a key of length 0 has none but zeros."""
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        known = channel < width
        left = tl.load(
            keys + rows[:, None] * stride + channel[None, :], mask=rows_inside[:, None] & known[None, :], other=0.0
        )
        right = tl.load(
            keys + columns[None, :] * stride + channel[:, None],
            mask=columns_inside[None, :] & known[:, None],
            other=0.0,
        )
        products = product(left, right, products, WIDEN)
    of_rows = bounded(tl.load(lengths + rows, mask=rows_inside, other=1.0))
    of_columns = bounded(tl.load(lengths + columns, mask=columns_inside, other=1.0))
    # Cosines with a key whose length overflows are zeros, as torch's normalize has them.
    endless = (of_rows == float("inf"))[:, None] | (of_columns == float("inf"))[None, :]
    return tl.where(endless, 0.0, products) / of_rows[:, None] / of_columns[None, :]
