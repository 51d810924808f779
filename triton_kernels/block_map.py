"""Which blocks of keys a block of queries attends to, from the means of both, without sorting.

The mass of a pair of blocks is estimated by their means, as SVG2 does (arXiv:2505.18875): the softmax over key blocks
of ``scale * mean query . mean key``, every block counted as often as it has keys. One program per block of queries then
finds, by bisection over the bits of the scores, the one at which the mass or the number of keys is reached, and where
among its equals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from vlm_budget.errors import KernelInputError

from ._heads import group_strides, lying, require_shared
from ._launch import (
    FLOATS,
    Config,
    device_function,
    kernel,
    power_of_two,
    require_dtype,
    require_int32,
    require_same_device,
    require_shape,
    tl,
)

MOST_BLOCKS = 4096
"""Key blocks whose scores a program holds."""
LOWEST, HIGHEST = -1e38, 1e38
"""Scores of infinity and of what is not a number: such a block is still one, and comes first or last."""
SLACK = 1e-6
"""Mass is reached up to this relative difference, and keys up to this many: sums are rounded."""


def block_map_reference(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    top_p: float | None = None,
    density: float | None = None,
    floor: float = 0.0,
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.block_map`."""
    scores, least, most = _prepared(query_means, key_means, key_sizes, scale, top_p, density, floor)
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    there = (key_sizes > 0)[:, :, None].expand_as(scores).gather(-1, order)
    keys = key_sizes[:, :, None].expand_as(scores).gather(-1, order).long()
    counted = keys.cumsum(-1)
    if density is not None:
        taken = counted <= most[:, :, None, None]
        taken[..., :1] = True
    else:
        # Scores hold the logarithm of the size: exp of their difference to the best is mass, up to a common factor.
        mass = (ranked.double() - ranked[..., :1].double()).exp().mul_(there)
        reached = mass.cumsum(-1)
        target = reached[..., -1:] * ((top_p or 0.0) * (1 - SLACK))
        taken = (reached - mass < target) | (counted - keys < least[:, :, None, None])
    return torch.zeros_like(taken).scatter_(-1, order, taken & there)


def _prepared(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    top_p: float | None,
    density: float | None,
    floor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What both halves choose from.

    Returns:
        [B, H, Cq, Ck] float32 scores, finite where there are keys and ``-inf`` elsewhere; [B|1, H|1] int32 keys that
        are reached at least, and those that are not exceeded.
    """
    logits = (query_means.float() * scale) @ key_means.float().transpose(-1, -2)
    logits += key_sizes.float().log()[:, :, None]
    scores = logits.nan_to_num_(LOWEST, HIGHEST, LOWEST).clamp_(LOWEST, HIGHEST)
    scores.masked_fill_((key_sizes <= 0)[:, :, None], -torch.inf)
    total = key_sizes.sum(-1, dtype=torch.float64)
    # A mass of one is that of all keys, also of those whose own is rounded away.
    share = 1.0 if top_p is not None and top_p >= 1 else floor
    least = (total * share - SLACK).ceil().int()
    most = (total * (density or 0.0) + SLACK).floor().int()
    return scores, least, most


def require_blocks(query_means: torch.Tensor, key_means: torch.Tensor, key_sizes: torch.Tensor) -> None:
    """Refuse what neither half can choose from.

    Raises:
        KernelInputError: Element types, shapes or devices that do not fit together, no blocks, or too many.
    """
    require_dtype((*FLOATS, torch.float64), query_means=query_means, key_means=key_means)
    require_same_device(query_means=query_means, key_means=key_means, key_sizes=key_sizes)
    require_shape((None, None, None, None), query_means=query_means)
    batch, heads, rows, width = query_means.shape
    require_shape((batch, heads, None, width), key_means=key_means)
    columns = key_means.shape[2]
    require_shared(batch, heads, columns, key_sizes=key_sizes)
    require_int32(rows=batch * heads * rows)
    if not 1 <= columns <= MOST_BLOCKS:
        raise KernelInputError(f"there must be between 1 and {MOST_BLOCKS} key blocks, got {columns}")


@device_function
def _ranked(score, there):
    """Whole numbers in the order of finite scores, all above 0, which stands for a block without keys."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)  # minus zero equals zero
    ordered = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(there, ordered, 0).to(tl.uint32)


@kernel(Config(warps=4), sizes=("rows", "columns", "heads", "size_batch", "size_head", "limit_batch", "limit_head"))
def _kept_blocks(
    scores, sizes, limits, kept, share, rows, columns, heads, size_batch, size_head, limit_batch, limit_head,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The key blocks that one query block keeps.

    ``limits`` holds the keys that are reached at least (``BY_MASS``) or that are not exceeded. Whatever the rule, there
    is a largest rank such that the blocks from it on are enough, or too much: all above it are kept, and among its
    equals the first ones.
    """
    program = tl.program_id(0).to(tl.int64)
    pair = program // rows
    batch, head = pair // heads, pair % heads
    at = tl.arange(0, BLOCK)
    inside = at < columns
    score = tl.load(scores + program * columns + at, mask=inside, other=0.0)
    own = tl.load(sizes + batch * size_batch + head * size_head + at, mask=inside, other=0)
    limit = tl.load(limits + batch * limit_batch + head * limit_head)
    there = own > 0
    own = tl.where(there, own, 0)
    rank = _ranked(score, there)
    best = tl.max(tl.where(there, score, -3e38), 0)
    mass = tl.exp(tl.where(there, score - best, float("-inf")))
    target = tl.sum(mass, 0) * share
    reached = tl.zeros((), tl.uint32)
    for bit in range(0, 32):
        tried = reached | (tl.full((), 1, tl.uint32) << (31 - bit))
        among = rank >= tried
        keys = tl.sum(tl.where(among, own, 0), 0)
        if BY_MASS:
            enough = (tl.sum(tl.where(among, mass, 0.0), 0) >= target) & (keys >= limit)
        else:
            enough = keys > limit
        reached = tl.where(enough, tried, reached)
    above = there & (rank > reached)
    equal = there & (rank == reached)
    keys = tl.sum(tl.where(above, own, 0), 0) + tl.cumsum(tl.where(equal, own, 0), 0)
    if BY_MASS:
        before = tl.sum(tl.where(above, mass, 0.0), 0) + tl.cumsum(tl.where(equal, mass, 0.0), 0) - mass
        stays = above | (equal & ((before < target) | (keys - own < limit)))
    else:
        first = tl.min(tl.where(there & (score == best), at, BLOCK), 0)
        stays = above | (equal & (keys <= limit)) | (at == first)
    tl.store(kept + program * columns + at, stays, mask=inside)


def block_map_triton(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    top_p: float | None = None,
    density: float | None = None,
    floor: float = 0.0,
) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.block_map`.

    Raises:
        KernelInputError: Element types, devices, shapes or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_blocks(query_means, key_means, key_sizes)
    require_dtype(FLOATS, query_means=query_means, key_means=key_means)
    scores, least, most = _prepared(query_means, key_means, key_sizes, scale, top_p, density, floor)
    _, heads, rows, columns = scores.shape
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if kept.numel():
        limits = least if density is None else most
        sizes = lying(key_sizes)
        _kept_blocks.launch(
            (kept.numel() // columns,),
            scores.contiguous(), sizes, limits, kept, (top_p or 0.0) * (1 - SLACK), rows, columns, heads,
            *group_strides(sizes), *group_strides(limits),
            BY_MASS=density is None, BLOCK=power_of_two(columns, 16),
        )  # fmt: skip
    return kept


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make shipped launches, for ``make kernels-compile``."""
    for columns in (30, 1000, MOST_BLOCKS):
        means, sizes = torch.zeros(1, 2, columns, 16), torch.ones(1, 1, columns, dtype=torch.int32)
        by_mass = partial(block_map_triton, means[:, :, :3], means, sizes, 0.25)
        yield f"{columns} key blocks by mass", partial(by_mass, top_p=0.9, floor=0.1)
        yield f"{columns} key blocks by keys", partial(by_mass, density=0.25)
