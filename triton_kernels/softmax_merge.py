"""Every anchor as the mixture of all tokens: a softmax over cosines of keys, without the matrix of all pairs.

Anchors come in strips whose softmax fits into a bounded scratch. A first launch writes the exponentials of a strip, and
their sums; a second multiplies them with the values. A cosine cannot exceed an anchor's with itself, which is
subtracted instead of a running maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations

import torch
from torch.nn.functional import normalize

from vlm_budget.errors import KernelInputError

from ._keys import aligned, bounded, channel_block, cosines, lengths_of, product
from ._launch import (
    FLOATS,
    Config,
    blocks,
    kernel,
    power_of_two,
    require_dtype,
    require_int32,
    require_rows,
    require_same_device,
    require_shape,
    tl,
)
from .nearest import ENTRIES

ANCHORS = 64
TOKENS = 128
"""Strips are multiples of so many anchors, padded to multiples of so many tokens: of every tile below."""
SCRATCH = 2**26
"""Bytes of exponentials at a time, or one tile of anchors where that is more."""


# --- references ------------------------------------------------------------------------------------------------------


def softmax_merge_reference(
    values: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    temperature: float,
    among: torch.Tensor,
    self_weight: float,
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.softmax_merge`."""
    wide = values if values.dtype == torch.float64 else values.float()
    mixed = [wide[:0]]
    for own in anchors.split(max(1, ENTRIES // max(len(among), 1))):
        cosine = normalize(keys[own].float(), dim=-1) @ normalize(keys[among].float(), dim=-1).T
        softmax = (cosine / temperature).softmax(-1).to(wide.dtype)
        mixed.append((1 - self_weight) * (softmax @ wide[among]) + self_weight * wide[own])
    return torch.cat(mixed).to(values.dtype)


# --- kernels ---------------------------------------------------------------------------------------------------------


@kernel(Config(warps=4, stages=3), sizes=("count", "n", "parts"))
def _exponentials(
    keys,
    lengths,
    anchors,
    among,
    shares,
    sums,
    count,
    n,
    parts,
    scale,
    width,
    stride,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Softmax of a tile of anchors over a block of tokens, not yet divided; zeros behind the last token."""
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, inside = slot < count, at < n
    anchor = tl.load(anchors + slot, mask=real, other=0)
    token = tl.load(among + at, mask=inside, other=0)
    cosine = cosines(keys, lengths, anchor, token, real, inside, width, stride, TILE, BLOCK, BLOCK_C, WIDEN)
    length = tl.load(lengths + anchor, mask=real, other=0.0)
    itself = tl.where(length == float("inf"), 0.0, length) / bounded(length)
    itself = itself * itself  # 1, or 0 of a key of length 0
    share = tl.where(inside[None, :], tl.exp2((cosine - itself[:, None]) * scale), 0.0)
    row = slot.to(tl.int64)
    tl.store(shares + row[:, None] * (tl.cdiv(n, PADDED) * PADDED) + at[None, :], share.to(shares.dtype.element_ty))
    tl.store(sums + row * parts + tl.program_id(1), tl.sum(share, 1))


@kernel(Config(warps=4, stages=3), sizes=("count", "n"))
def _mixtures(
    values,
    anchors,
    among,
    shares,
    totals,
    out,
    count,
    n,
    self_weight,
    width,
    stride,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of outputs: some channels of some anchors."""
    slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real, known = slot < count, channel < width
    row = slot.to(tl.int64)
    first = shares + row[:, None] * (tl.cdiv(n, PADDED) * PADDED)
    mixed = tl.zeros((TILE, CHANNELS), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        token = tl.load(among + at, mask=inside, other=0)
        share = tl.load(first + at[None, :])
        value = tl.load(
            values + token[:, None] * stride + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        mixed = product(share, value, mixed, WIDEN)
    total = tl.load(totals + slot)
    anchor = tl.load(anchors + slot, mask=real, other=0)
    mask = real[:, None] & known[None, :]
    own = tl.load(values + anchor[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    result = (1 - self_weight) * (mixed / total[:, None]) + self_weight * own
    tl.store(out + row[:, None] * width + channel[None, :], result.to(out.dtype.element_ty), mask=mask)


# --- wrappers --------------------------------------------------------------------------------------------------------


def softmax_merge_triton(
    values: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    temperature: float,
    among: torch.Tensor,
    self_weight: float,
) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.softmax_merge`.

    Raises:
        KernelInputError: Element types, devices, strides, sizes or a temperature that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype(FLOATS, values=values, keys=keys)
    require_dtype((torch.int64,), anchors=anchors, among=among)
    require_same_device(values=values, keys=keys, anchors=anchors, among=among)
    require_shape((None, None), values=values, keys=keys)
    n, width = values.shape
    require_int32(tokens=n, width=width, key_width=keys.shape[1], anchors=anchors.numel(), among=among.numel())
    require_shape((n, None), keys=keys)
    require_shape((anchors.numel(),), anchors=anchors)
    require_shape((among.numel(),), among=among)
    require_rows(values=values, keys=keys, anchors=anchors, among=among)
    if not temperature > 0:
        raise KernelInputError(f"temperature must be above 0, got {temperature}")
    if not len(among) and len(anchors):
        raise KernelInputError("there are no tokens to mix: among is empty")
    if not len(anchors) * width:
        return values.new_empty(len(anchors), width)
    values, keys, anchors, among = aligned(values), aligned(keys), aligned(anchors), aligned(among)
    out = torch.empty(len(anchors), values.shape[1], dtype=values.dtype, device=values.device)
    scale = 1.4426950408889634 / temperature  # exp2
    lengths = lengths_of(keys)
    columns = TOKENS * blocks(len(among), TOKENS)
    strip = ANCHORS * max(1, min(SCRATCH // (values.element_size() * columns * ANCHORS), blocks(len(anchors), ANCHORS)))
    shares = torch.empty(strip, columns, dtype=values.dtype, device=values.device)
    for first in range(0, len(anchors), strip):
        rows = slice(first, first + strip)
        sums = _shared(keys, lengths, anchors[rows], among, shares, scale)
        _mixed(values, anchors[rows], among, shares, sums, float(self_weight), out[rows])
    return out if values.shape[1] == width else out[:, :width].contiguous()


def _shared(
    keys: torch.Tensor,
    lengths: torch.Tensor,
    anchors: torch.Tensor,
    among: torch.Tensor,
    shares: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Write the exponentials of a strip, and give their sums."""
    wide = keys.dtype == torch.float32  # no tensor cores: operands lie in registers
    tile, block = (32, 64) if wide else (ANCHORS, TOKENS)
    tiles, parts = ANCHORS // tile * blocks(len(anchors), ANCHORS), blocks(shares.shape[1], block)
    sums = torch.empty(tiles * tile, parts, dtype=torch.float32, device=keys.device)
    _exponentials.launch(
        (tiles, parts),
        keys,
        lengths,
        anchors,
        among,
        shares,
        sums,
        len(anchors),
        len(among),
        parts,
        scale,
        keys.shape[1],
        keys.stride(0),
        TILE=tile,
        BLOCK=block,
        BLOCK_C=channel_block(keys.dtype),
        PADDED=TOKENS,
        WIDEN=_exponentials.interpreted,
    )
    return sums.sum(1)


def _mixed(
    values: torch.Tensor,
    anchors: torch.Tensor,
    among: torch.Tensor,
    shares: torch.Tensor,
    sums: torch.Tensor,
    self_weight: float,
    out: torch.Tensor,
) -> None:
    """Write the mixtures of a strip."""
    width = values.shape[1]
    wide = values.dtype == torch.float32
    tile, block, most = (32, 16, 64) if wide else (ANCHORS, 64, 128)
    channels = min(most, power_of_two(width, 16))
    _mixtures.launch(
        (blocks(len(anchors), tile), blocks(width, channels)),
        values,
        anchors,
        among,
        shares,
        sums,
        out,
        len(anchors),
        len(among),
        self_weight,
        width,
        values.stride(0),
        TILE=tile,
        BLOCK=block,
        CHANNELS=channels,
        PADDED=TOKENS,
        WIDEN=_mixtures.interpreted,
    )


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    anchors, among = torch.arange(5), torch.arange(64)
    for dtype in FLOATS:
        for width in (1024, 48, 20, 16):  # rows of 20 channels are copied to rows of 32
            states = torch.zeros(64, width, dtype=dtype)
            yield f"{width} wide, {dtype}", partial(softmax_merge_triton, states, states, anchors, 0.1, among, 0.0)
    for dtype, other in permutations(FLOATS, 2):
        values, keys = torch.zeros(64, 1024, dtype=dtype), torch.zeros(64, 1024, dtype=other)
        yield f"{dtype}, keys {other}", partial(softmax_merge_triton, values, keys, anchors, 0.1, among, 0.0)
