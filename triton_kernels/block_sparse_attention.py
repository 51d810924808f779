"""Attention over some pairs of blocks, of any sizes, with what is left out counted by its means.

Queries and keys lie block after block. One online softmax runs over the keys of the blocks that a query block keeps,
and, where means are given, over one column per block that it drops: as many keys as the block has, all at its mean
(SVG-EAR, arXiv:2603.08982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from vlm_budget.errors import KernelInputError

from . import tile_list
from ._attended_tile import SIZES, attended_tile
from ._heads import group_strides, lying, require_descriptors, require_shared
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
)
from .tile_list import SHIFT, listed_tiles, query_tiles, slots_for

WORKSPACE = 64 * 2**20
"""Bytes that the kernel takes beside its inputs and outputs, at most: heads are taken in turns."""
LOG2E = math.log2(math.e)
WIDEST = 128
"""Channels of a head that the kernel takes."""
ENTRIES = 2**22
"""Logits that the reference holds at a time."""


def block_sparse_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    mean_keys: torch.Tensor | None = None,
    mean_values: torch.Tensor | None = None,
    tile: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is right, and fast where blocks are few; see :func:`vlm_budget.ops.block_sparse_attention`.

    The columns of each query block are gathered, so that it costs what the map says. Heads that share a map are taken
    together.
    """
    batch, heads, length, _ = query.shape
    kind = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros(query.shape, dtype=kind, device=query.device)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=kind, device=query.device)
    keys, values, bias = key.to(kind), value.to(kind), None
    if mean_keys is not None and mean_values is not None:
        several = key_sizes[..., : mean_keys.shape[2]].to(kind).log()
        bias = torch.cat([several.new_zeros(*several.shape[:2], key.shape[2]), several], -1)
        keys, values = torch.cat([keys, mean_keys.to(kind)], 2), torch.cat([values, mean_values.to(kind)], 2)
    apart = torch.broadcast_shapes(query_sizes.shape[:2], key_sizes.shape[:2], kept.shape[:2])
    for b, h in product(range(apart[0]), range(apart[1])):
        own = (slice(b, b + 1) if apart[0] > 1 else slice(None), slice(h, h + 1) if apart[1] > 1 else slice(None))
        q, k, v = query[own].to(kind) * scale, keys[own], values[own]
        extra = None if bias is None else bias[_one(bias, b, h)]
        sizes = key_sizes[_one(key_sizes, b, h)].clamp_min(0)
        ends = query_sizes[_one(query_sizes, b, h)].clamp_min(0).cumsum(-1).clamp_max(length).tolist()
        start = 0
        for end, seen in zip(ends, _columns(sizes, kept[_one(kept, b, h)], key.shape[2], k.shape[2]), strict=True):
            if end > start and len(seen):
                rows = (*own, slice(start, end))
                whole = len(seen) == k.shape[2]
                taken = (k, v) if whole else (k.index_select(2, seen), v.index_select(2, seen))
                _attend(q[:, :, start:end], *taken, None if extra is None else extra[seen], out[rows], lse[rows])
            start = end
    return out.to(query.dtype), lse.float()


def _one(given: torch.Tensor, b: int, h: int) -> tuple[int, int]:
    """Where the entry of a batch row and a head lies in what may have one for all."""
    return b if given.shape[0] > 1 else 0, h if given.shape[1] > 1 else 0


def _columns(sizes: torch.Tensor, kept: torch.Tensor, keys: int, columns: int) -> Iterator[torch.Tensor]:
    """For each query block the columns that it sees: keys, and behind all keys the means of dropped blocks."""
    count = columns - keys
    block_of = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes.long())[:keys]
    # As many query blocks at a time as memory allows: looking up each alone takes longer than attention on few tokens.
    for part in kept.split(max(1, ENTRIES // max(columns, 1))):
        seen = torch.zeros(len(part), columns, dtype=torch.bool, device=kept.device)
        seen[:, : len(block_of)] = part[:, block_of]
        seen[:, keys:] = ~part[:, :count] & (sizes[:count] > 0)
        yield from seen.nonzero()[:, 1].split(seen.sum(-1).tolist())


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    extra: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Softmax attention of all rows over all columns, into ``out`` and ``lse``."""
    turned = key.transpose(-1, -2)
    step = max(1, ENTRIES // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], step):
        rows = slice(start, start + step)
        logits = query[:, :, rows] @ turned
        if extra is not None:
            logits += extra
        peak = logits.amax(-1, keepdim=True)
        weights = logits.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        out[:, :, rows] = (weights @ value).div_(total)
        lse[:, :, rows] = (peak + total.log()).squeeze(-1)


def require_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    kept: torch.Tensor,
    mean_keys: torch.Tensor | None = None,
    mean_values: torch.Tensor | None = None,
) -> None:
    """Refuse what neither half can compute.

    Raises:
        KernelInputError: Element types, shapes or devices that do not fit together, or half a correction.
    """
    require_dtype((*FLOATS, torch.float64), query=query)
    require_dtype((query.dtype,), key=key, value=value)
    require_dtype((torch.bool,), kept=kept)
    given = {"query": query, "key": key, "value": value, "query_sizes": query_sizes, "key_sizes": key_sizes}
    require_same_device(**given, kept=kept, mean_keys=mean_keys, mean_values=mean_values)
    require_shape((None, None, None, None), query=query, key=key)
    batch, heads, rows, width = query.shape
    require_shape((batch, heads, None, width), key=key)
    require_shape(tuple(key.shape), value=value)
    require_int32(query=batch * heads * rows, key=batch * heads * key.shape[2])
    require_shared(batch, heads, None, query_sizes=query_sizes, key_sizes=key_sizes)
    require_shape((None, None, query_sizes.shape[2], key_sizes.shape[2]), kept=kept)
    if kept.shape[0] not in (1, batch) or kept.shape[1] not in (1, heads):
        raise KernelInputError(f"kept must be of batch {batch} or 1 and heads {heads} or 1, got {list(kept.shape)}")
    if (mean_keys is None) != (mean_values is None):
        raise KernelInputError("mean_keys and mean_values come together, got only one of them")
    if mean_keys is not None and mean_values is not None:
        require_shape((batch, heads, None, width), mean_keys=mean_keys)
        require_shape(tuple(mean_keys.shape), mean_values=mean_values)
        if mean_keys.shape[2] > key_sizes.shape[2]:
            raise KernelInputError(
                f"mean_keys must have at most one mean per key block, got {mean_keys.shape[2]} for {key_sizes.shape[2]}"
            )


KEY = ("HEAD", "KEYS", "UNIT", "TMA")
KERNELS = {
    "half": kernel(Config(warps=8, stages=3), Config(warps=8, stages=2), key=KEY, sizes=SIZES)(attended_tile),
    "single": kernel(Config(warps=4, stages=2), sizes=SIZES)(attended_tile),
    "lists": listed_tiles,
}
"""What is launched, attention by element type. Configurations differ in what is in flight alone, so in no bit."""


# --- wrapper ---------------------------------------------------------------------------------------------------------


def tile_of(dtype: torch.dtype, head: int) -> tuple[int, int]:
    """Rows and keys of a tile: what registers hold, with the masks of heads that are no power of two."""
    if dtype == torch.float32:  # three products of halves, and both halves of every factor
        return 16, 32
    return 128, 64 if head == power_of_two(head, 16) else 32


@dataclass(frozen=True)
class Turns:
    """What is computed at a time, so that the lists of tiles fit into :data:`WORKSPACE`.

    Attributes:
        batch: Samples.
        heads: Heads of each.
        blocks: Query blocks of each.
        bytes: What a turn takes beside inputs and outputs, at most. It exceeds :data:`WORKSPACE` only where one query
            block alone does not fit.
    """

    batch: int
    heads: int
    blocks: int
    bytes: int


def turns_of(
    query: tuple[int, int, int, int],
    keys: int,
    kept: tuple[int, int, int, int],
    *,
    corrected: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Turns:
    """How a call is divided.

    Args:
        query: [B, H, Lq, D], shape of the queries.
        keys: Lk.
        kept: [B or 1, H or 1, Cq, Ck], shape of the map, 1 only where sizes of key blocks are shared as well.
        corrected: Blocks of keys that have a mean.
        dtype: Of queries and keys.
    """
    (batch, heads, length, width), (samples, groups, query_blocks, key_blocks) = query, kept
    rows, size = tile_of(dtype, width)
    means = 2 * corrected * width * dtype.itemsize * (batch // samples) * (heads // groups)
    each = 4 * slots_for(keys, key_blocks, size) + 16  # the list of a query block, and how long it is, twice
    # Of a sample and head: the order of its tiles, in 64 bits, and what leads there.
    small = (query_blocks + 1) * 64 + (length // rows + query_blocks + 1) * 80
    small *= (batch // samples) * (heads // groups)
    small += means
    fit = WORKSPACE // (query_blocks * each + small)
    of_heads = groups if fit >= groups else blocks(groups, blocks(groups, max(1, fit)))
    of_batch = min(samples, max(1, fit // groups))
    of_blocks = query_blocks if fit else max(1, (WORKSPACE - small) // each)
    return Turns(
        batch=batch if samples == 1 else of_batch,
        heads=heads if groups == 1 else of_heads,
        blocks=of_blocks,
        bytes=of_batch * of_heads * (of_blocks * each + small),
    )


def block_sparse_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    mean_keys: torch.Tensor | None = None,
    mean_values: torch.Tensor | None = None,
    tile: int | None = None,
    tma: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel; see :func:`vlm_budget.ops.block_sparse_attention`.

    Args:
        tma: Full tiles of keys are read through descriptors of the tensor memory accelerator (Hopper and later).

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_attention(query, key, value, query_sizes, key_sizes, kept, mean_keys, mean_values)
    require_dtype(FLOATS, query=query)
    require_rows(query=query, key=key, value=value)
    if tma:
        require_descriptors(key=key, value=value)
    require_int32(row_stride=128 * max(one.stride(2) for one in (query, key, value)))
    key_sizes, kept = lying(key_sizes), lying(kept)
    (batch, heads, length, width), keys = query.shape, key.shape[2]
    if width > WIDEST:
        raise KernelInputError(f"the kernel takes heads of up to {WIDEST} channels, got {width}. Take the reference.")
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    if not query_sizes.shape[2] or not key_sizes.shape[2] or not out.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    ends = query_sizes.clamp_min(0).cumsum(-1).clamp_max(length)
    begins = torch.cat([torch.zeros_like(ends[..., :1]), ends], -1)
    sizes = torch.cat([ends, torch.full_like(ends[..., :1], length)], -1) - begins
    samples, groups = torch.broadcast_shapes(key_sizes.shape[:2], kept.shape[:2])
    turns = turns_of(
        (batch, heads, length, width),
        keys,
        (samples, groups, *kept.shape[2:]),
        corrected=0 if mean_keys is None else mean_keys.shape[2],
        dtype=query.dtype,
    )
    whole = Part(query, key, value, mean_keys, mean_values, key_sizes, kept, begins, sizes, out, lse)
    for b, h in product(range(0, batch, turns.batch), range(0, heads, turns.heads)):
        part = whole.cut(slice(b, b + turns.batch), slice(h, h + turns.heads)).with_means_like_queries()
        for i in range(0, kept.shape[2], turns.blocks):
            _launched(part, slice(i, i + turns.blocks), scale * LOG2E, tile_of(query.dtype, width), tma)
    return out, lse


class Part(NamedTuple):
    """What a launch works on.

    Attributes:
        query: [B, H, Lq, D].
        key: [B, H, Lk, D].
        value: [B, H, Lk, D].
        mean_keys: [B, H, Cm, D].
        mean_values: [B, H, Cm, D].
        key_sizes: [B or 1, H or 1, Ck].
        kept: [B or 1, H or 1, Cq, Ck].
        begins: [B or 1, H or 1, Cq + 1], where query blocks begin; the last one is the rows that belong to none.
        sizes: [B or 1, H or 1, Cq + 1], their rows.
        out: [B, H, Lq, D], to be written.
        lse: [B, H, Lq], to be written.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mean_keys: torch.Tensor | None
    mean_values: torch.Tensor | None
    key_sizes: torch.Tensor
    kept: torch.Tensor
    begins: torch.Tensor
    sizes: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor

    def with_means_like_queries(self) -> Part:
        """Means in the queries' element type, row behind row."""
        keys, values = (None if m is None else m.to(self.query.dtype).contiguous() for m in self[3:5])
        return self._replace(mean_keys=keys, mean_values=values)

    def cut(self, samples: slice, heads: slice) -> Part:
        """Some samples and heads, or all that there is where they share it."""
        every = slice(None)
        places = {
            name: (samples if one.shape[0] > 1 else every, heads if one.shape[1] > 1 else every)
            for name, one in self._asdict().items()
            if one is not None
        }
        return self._replace(**{name: getattr(self, name)[place] for name, place in places.items()})


def _launched(part: Part, some: slice, scale: float, tile: tuple[int, int], tma: bool) -> None:
    """The lists of some query blocks, and their tiles; with the last of them, the rows that belong to none."""
    query, key, value, mean_keys, mean_values, key_sizes, kept, begins, sizes, out, lse = part
    (batch, heads, length, width), (rows, size), last = query.shape, tile, kept.shape[2]
    kept = kept[:, :, some].view(torch.uint8)
    lists, counts = tile_list.tile_list_triton(key_sizes, kept.view(torch.bool), key.shape[2], size)
    counts = torch.nn.functional.pad(counts, (0, 0, 0, 1))
    none = sizes[..., last:] if some.stop >= last else torch.zeros_like(sizes[..., last:])
    sizes = torch.cat([sizes[..., :last][..., some], none], -1)
    begins = torch.cat([begins[..., :last][..., some], begins[..., last:]], -1)
    most = length // rows + sizes.shape[-1]
    firsts, packed = query_tiles(begins, sizes, counts.sum(-1), rows, most)
    tensors = (query, key, value, mean_keys, out)
    strides = [stride for one in tensors for stride in ((0, 0, 0) if one is None else one.stride()[:3])]
    unit = next(unit for unit in (16, 8, 1) if not any(stride % unit for stride in strides))
    launched = KERNELS["single" if query.dtype == torch.float32 else "half"]
    call = partial(
        launched.launch,
        (batch * heads * most,),
        query, key, value, mean_keys, mean_values, key_sizes, kept, firsts, packed, lists, counts, out, lse,
        scale, heads, most, key.shape[2], lists.shape[-1], kept.shape[2],
        0 if mean_keys is None else mean_keys.shape[2],
        *(stride for one in (firsts, lists, counts, key_sizes, kept) for stride in group_strides(one)), kept.stride(2),
        *lse.stride()[:2], *(stride // unit for stride in strides),
        HEAD=width, WIDTH=power_of_two(width, 16), ROWS=rows, KEYS=size, MEANS=min(size, 32), UNIT=unit,
        SHIFT=SHIFT, TMA=tma, WIDEN=launched.interpreted,
    )  # fmt: skip
    with_scratch(query.device, call) if tma and not launched.interpreted else call()


def with_scratch(device: torch.device, call: Callable[[], None]) -> None:
    """Make a launch whose descriptors need memory of the device, without touching the allocator of anyone else."""

    def launch() -> None:
        import triton

        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
        call()

    copy_context().run(launch)


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make shipped launches, for ``make kernels-compile``."""
    sizes, kept = torch.full((1, 2, 3), 50, dtype=torch.int32), torch.ones(1, 2, 3, 3, dtype=torch.bool)
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    several = [(bf16, 64), (bf16, 72), (bf16, 128), (fp16, 128), (fp32, 128)]
    for dtype, head, corrected, tma in (
        *((dtype, head, True, False) for dtype, head in several),
        *((bf16, 128, False, tma) for tma in (False, True)),
    ):
        rows, means = torch.zeros(1, 2, 150, head, dtype=dtype), torch.zeros(1, 2, 3, head) if corrected else None
        call = partial(block_sparse_attention_triton, rows, rows, rows, sizes, sizes, kept, 0.125, means, means)
        words = ("corrected" if corrected else "plain") + (", descriptors" if tma else "")
        yield f"{dtype} heads of {head}, {words}", partial(call, tma=tma)
