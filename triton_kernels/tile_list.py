"""The tiles that sparse attention computes: lists of tiles of keys for every query block, and an order of query tiles.

Kept key blocks that lie side by side are one run, which is cut into tiles of one size and at most one that is smaller:
so tails are few, however small the blocks are. Tiles that are full stand at the front of a list, and those that need a
mask at its back, counted from the end. A list is as long as it can become: what it holds is known on the device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ._heads import group_strides, lying, require_shared
from ._launch import Config, blocks, device_function, kernel, power_of_two, require_dtype, require_int32, tl

CHUNK = 1024
"""Key blocks that a program looks at together."""
SHIFT = 256
"""A tile is packed as ``first key * SHIFT + keys``; tiles are smaller than that."""


def slots_for(keys: int, key_blocks: int, size: int) -> int:
    """Entries of a list: full tiles, at most one tail per run, and one that is read ahead."""
    return keys // size + blocks(key_blocks, 2) + 1


def tile_list_reference(
    key_sizes: torch.Tensor, kept: torch.Tensor, keys: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is right.

    Args:
        key_sizes: [B or 1, H or 1, Ck] int32.
        kept: [B or 1, H or 1, Cq, Ck] bool.
        keys: Keys that there are; blocks end there at the latest.
        size: Keys of a full tile.

    Returns:
        [B', H', Cq, slots] int32 lists, B' and H' those that the two have together, and [B', H', Cq, 2] int32 numbers
        of full tiles and of smaller ones.
    """
    outer = torch.broadcast_shapes(key_sizes.shape[:2], kept.shape[:2])
    rows, slots = kept.shape[2], slots_for(keys, kept.shape[3], size)
    ends = key_sizes.clamp_min(0).cumsum(-1).clamp_max(keys).expand(*outer, -1).reshape(-1, kept.shape[3]).tolist()
    flags = kept.expand(*outer, -1, -1).reshape(-1, rows, kept.shape[3]).tolist()
    lists = torch.zeros(len(ends), rows, slots, dtype=torch.int32)
    counts = torch.zeros(len(ends), rows, 2, dtype=torch.int32)
    for own, (until, table) in enumerate(zip(ends, flags, strict=True)):
        for row, seen in enumerate(table):
            runs: list[list[int]] = []
            for start, end, stays in zip([0, *until], until, seen, strict=False):
                if stays and end > start:
                    if runs and runs[-1][1] == start:
                        runs[-1][1] = end
                    else:
                        runs.append([start, end])
            tiles = [(at, min(end - at, size)) for start, end in runs for at in range(start, end, size)]
            full = [at * SHIFT + size for at, length in tiles if length == size]
            tails = [at * SHIFT + length for at, length in tiles if length < size]
            lists[own, row, : len(full)] = torch.tensor(full, dtype=torch.int32)
            lists[own, row, slots - len(tails) :] = torch.tensor(tails[::-1], dtype=torch.int32)
            counts[own, row] = torch.tensor([len(full), len(tails)], dtype=torch.int32)
    device = kept.device
    return lists.view(*outer, rows, slots).to(device), counts.view(*outer, rows, 2).to(device)


@device_function
def _later(left, right):
    return tl.maximum(left, right)


@kernel(
    Config(warps=4),
    sizes=(
        "keys",
        "slots",
        "rows",
        "columns",
        "heads",
        "size_batch",
        "size_head",
        "kept_batch",
        "kept_head",
        "kept_row",
    ),
)
def listed_tiles(
    sizes, kept, lists, counts, keys, slots, rows, columns, heads,
    size_batch, size_head, kept_batch, kept_head, kept_row,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tiles of one query block.

    A run of kept blocks ends at a dropped one that has keys, or behind the last block: there its tiles are written. Two
    sums and one maximum from left to right are all that it takes.
    """
    program = tl.program_id(0).to(tl.int64)
    row, pair = program % rows, program // rows
    batch, head = pair // heads, pair % heads
    sizes += batch * size_batch + head * size_head
    kept += batch * kept_batch + head * kept_head + row * kept_row
    lists += program * slots
    passed = tl.zeros((), tl.int32)  # keys of the blocks so far
    behind = tl.zeros((), tl.int32)  # where the last dropped block so far ended
    full = tl.zeros((), tl.int32)
    tails = tl.zeros((), tl.int32)
    for start in range(0, columns + 1, BLOCK):
        at = start + tl.arange(0, BLOCK)
        # Of each block, and of the one before it: where that was dropped, a run may begin.
        own = tl.maximum(tl.load(sizes + at, mask=at < columns, other=0), 0)
        stays = tl.load(kept + at, mask=at < columns, other=0) != 0
        earlier = (at > 0) & (at <= columns)
        before = tl.maximum(tl.load(sizes + at - 1, mask=earlier, other=0), 0)
        stayed = tl.load(kept + at - 1, mask=earlier, other=0) != 0
        begin = tl.minimum(passed + tl.cumsum(before, 0), keys)
        since = tl.where((before > 0) & ~stayed, begin, behind)
        since = tl.associative_scan(since, 0, _later)
        passed += tl.sum(before, 0)
        behind = tl.max(since, 0)
        ends = ((own > 0) & ~stays & (at < columns)) | (at == columns)
        length = tl.where(ends, begin - since, 0)
        whole = length // SIZE
        rest = length - whole * SIZE
        place = full + tl.cumsum(whole, 0) - whole
        for turn in range(0, tl.max(whole, 0)):
            tile = (since + turn * SIZE) * SHIFT + SIZE
            tl.store(lists + place + turn, tile, mask=turn < whole)
        tail = (rest > 0).to(tl.int32)
        place = slots - tails - tl.cumsum(tail, 0)
        tl.store(lists + place, (since + whole * SIZE) * SHIFT + rest, mask=rest > 0)
        full += tl.sum(whole, 0)
        tails += tl.sum(tail, 0)
    tl.store(counts + program * 2, full)
    tl.store(counts + program * 2 + 1, tails)


def tile_list_triton(
    key_sizes: torch.Tensor, kept: torch.Tensor, keys: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel; see :func:`tile_list_reference`, but for entries between the two ends of a list, which are arbitrary.

    Raises:
        KernelInputError: Element types, shapes or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype((torch.bool,), kept=kept)
    rows, columns = kept.shape[2:]
    require_shared(key_sizes.shape[0], key_sizes.shape[1], columns, key_sizes=key_sizes)
    require_int32(keys=(keys + size) * SHIFT)
    outer = torch.broadcast_shapes(key_sizes.shape[:2], kept.shape[:2])
    slots = slots_for(keys, columns, size)
    lists = torch.empty(*outer, rows, slots, dtype=torch.int32, device=kept.device)
    counts = torch.empty(*outer, rows, 2, dtype=torch.int32, device=kept.device)
    sizes, flags = lying(key_sizes), lying(kept.view(torch.uint8))
    if counts.numel():
        listed_tiles.launch(
            (counts.numel() // 2,),
            sizes, flags, lists, counts, keys, slots, rows, columns, outer[1],
            *group_strides(sizes), *group_strides(flags), flags.stride(2),
            SIZE=size, SHIFT=SHIFT, BLOCK=min(CHUNK, power_of_two(columns + 1, 16)),
        )  # fmt: skip
    return lists, counts


def query_tiles(
    begins: torch.Tensor, sizes: torch.Tensor, work: torch.Tensor, rows: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of query rows in the order in which they start: those of the blocks with most work first, head by head.

    Heads stay apart so that the keys of one, which most of its tiles read, stay in the cache.

    Args:
        begins: [B or 1, H or 1, C] first row of each query block.
        sizes: [B or 1, H or 1, C] its rows.
        work: [B or 1, H or 1, C] tiles of keys that it reads.
        rows: Rows of a tile.
        most: Tiles that there can be.

    Returns:
        [B', H', most] int32 first row of every tile, and [B', H', most] int32 ``block * SHIFT + rows``, 0 where there
        is no tile.
    """
    begins, sizes, work = torch.broadcast_tensors(begins, sizes, work)
    order = work.argsort(dim=-1, descending=True, stable=True)
    parts = (sizes.gather(-1, order) + rows - 1) // rows
    until = parts.cumsum(-1)
    turn = torch.arange(most, device=until.device).expand(*until.shape[:2], most).contiguous()
    slot = torch.searchsorted(until, turn, right=True).clamp_max_(until.shape[-1] - 1)
    block = order.gather(-1, slot)
    within = (turn - until.gather(-1, slot) + parts.gather(-1, slot)) * rows
    there = (sizes.gather(-1, block) - within).clamp(0, rows)
    first = (begins.gather(-1, block) + within).int()
    return first, torch.where(there > 0, block * SHIFT + there, 0).int()


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make shipped launches, for ``make kernels-compile``."""
    for columns in (30, 1000):
        sizes, kept = torch.ones(1, 2, columns, dtype=torch.int32), torch.ones(1, 2, 3, columns, dtype=torch.bool)
        for size in (32, 64, 128):
            yield f"tiles of {size}, {columns} key blocks", partial(tile_list_triton, sizes, kept, columns, size)
