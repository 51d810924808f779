"""Compaction: the kept columns of a ragged batch, packed side by side and padded, and the way back.

An index launch finds by prefix sums, without a sort, which column every slot takes and which slot every column is grown
from. A payload launch then copies embeddings, positions, flags and deepstack rows to their places, in tiles of eight
kilobytes whose bits are not looked at. Growing an output is that launch with another index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from vlm_budget.errors import KernelInputError

from ._launch import (
    FLOATS,
    Config,
    blocks,
    device_function,
    kernel,
    power_of_two,
    require_dtype,
    require_int32,
    require_rows,
    require_same_device,
    require_shape,
    tl,
)

BLOCK = 2048
"""Flags read at a time."""
TILE = 8192
"""Bytes that a program copies: enough in flight to keep the memory busy, and few enough for many programs."""
WIDEST = 1024
"""Bytes of a row in a tile, two 16-byte loads of a warp: 3584 and 4096 columns of any element type fill whole tiles."""
TALLEST = 512
"""Rows in a tile, however narrow."""
LEVELS = 4
"""Deepstack levels per launch; released models have three."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def compaction_index_reference(keep: torch.Tensor, slots: int, right_padded: bool) -> Index:
    """What is right; see :func:`vlm_budget.ops.compaction_index`."""
    # A stable sort of the flags lists survivors in order, at the end that the padding leaves free.
    order = keep.to(torch.uint8).argsort(dim=1, stable=True, descending=right_padded)
    index = (order[:, :slots] if right_padded else order[:, keep.shape[1] - slots :]).contiguous()
    survivors = keep.sum(1, keepdim=True)
    first = torch.where(survivors > 0, slots - survivors, 0).clamp_min(0) * (not right_padded)
    source = (keep.cumsum(1) - 1).clamp_min(0) + first
    return index, keep.gather(1, index), source.clamp_max(max(slots - 1, 0))


def take_columns_reference(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.take_columns`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def compact_reference(
    embeds: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor,
    keep: torch.Tensor,
    positions: torch.Tensor | None,
    visual: torch.Tensor | None,
    deepstack: Sequence[torch.Tensor],
    rows: int,
) -> list[torch.Tensor]:
    """What is right; see :func:`vlm_budget.ops.compact`. A list: embeddings, positions and flags if any, the levels."""
    _require_matching(embeds, index, valid, keep, positions, visual, deepstack, rows)
    taken = [take_columns_reference(embeds, index)]
    if positions is not None:
        taken.append(torch.where(valid, positions.gather(-1, index.expand(*positions.shape[:-1], -1)), 0))
    if visual is not None:
        taken.append(visual.gather(1, index) & valid)
        if deepstack:
            if keep.device.type == "cpu" and (found := int((visual & keep).sum())) != rows:
                raise KernelInputError(f"{rows} visual columns were said to be kept, and {found} are")
            source = visual_rows_reference(visual, keep, rows).clamp_max(len(deepstack[0]) - 1)
            taken += [level.index_select(0, source) for level in deepstack]
    return taken


def _require_matching(
    embeds: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor,
    keep: torch.Tensor,
    positions: torch.Tensor | None,
    visual: torch.Tensor | None,
    deepstack: Sequence[torch.Tensor],
    rows: int,
) -> None:
    named = {f"deepstack[{i}]": level for i, level in enumerate(deepstack)}
    require_same_device(embeds=embeds, index=index, valid=valid, keep=keep, positions=positions, visual=visual, **named)
    require_dtype((torch.int64,), index=index)
    require_dtype((torch.bool,), valid=valid, keep=keep)
    require_shape((None, None, None), embeds=embeds)
    require_shape((len(embeds), None), index=index)
    require_shape(index.shape, valid=valid)
    require_shape(embeds.shape[:2], keep=keep)
    if positions is not None:
        require_shape((None, *embeds.shape[:2]), positions=positions)
    if visual is not None:
        require_dtype((torch.bool,), visual=visual)
        require_shape(embeds.shape[:2], visual=visual)
    for name, level in named.items():
        require_shape((None, None), **{name: level})
        require_shape(deepstack[0].shape, **{name: level})
        require_dtype((deepstack[0].dtype,), **{name: level})
    if deepstack and (visual is None or not 0 <= rows <= min(visual.numel(), len(deepstack[0]))):
        raise KernelInputError(f"deepstack keeps {rows} rows: pass visual= and levels with as many or more")


def visual_rows_reference(visual: torch.Tensor, keep: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows] int64, the rank among all ``visual`` columns of every one that is kept; ``rows`` is how many are."""
    flags = visual.flatten()
    stays = flags & keep.flatten()
    slot = torch.where(stays, stays.cumsum(0) - 1, rows).clamp_max(rows)  # behind the last row: not returned
    return slot.new_zeros(rows + 1).scatter_(0, slot, flags.cumsum(0) - 1)[:rows]


@kernel(Config(warps=8), sizes=("slots", "length", "stride"))
def _index(keep, index, valid, source, slots, length, stride, RIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one row's columns: where they go, and where they are grown from."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    lane = tl.arange(0, BLOCK)
    survivors = tl.zeros((), tl.int32)
    before = tl.zeros((), tl.int32)  # those in front of the block
    for start in range(0, length, BLOCK):
        at = start + lane
        found = tl.sum(tl.load(keep + row * stride + at, mask=at < length, other=0).to(tl.int32), 0)
        survivors += found
        before += tl.where(start < begin, found, 0)
    at = begin + lane
    inside = at < length
    flags = tl.load(keep + row * stride + at, mask=inside, other=0).to(tl.int32)
    stays = flags != 0
    seen = before + tl.cumsum(flags, 0)  # survivors up to the column, itself included
    dropped = at - seen  # others before it, if it is one of them
    # Survivors in order; the others in order on the side of the padding, as many as there is room for.
    if RIGHT:
        first = tl.zeros((), tl.int32)
        slot = tl.where(stays, seen - 1, survivors + dropped)
    else:
        first = tl.where(survivors > 0, tl.maximum(slots - survivors, 0), 0)
        slot = slots - tl.where(stays, survivors - seen + 1, length - dropped)
    fits = inside & (slot >= 0) & (slot < slots)
    tl.store(index + row * slots + slot, at.to(tl.int64), mask=fits)
    tl.store(valid + row * slots + slot, flags.to(tl.uint8), mask=fits)
    grown = tl.minimum(tl.maximum(seen - 1, 0) + first, tl.maximum(slots - 1, 0))
    tl.store(source + row * length + at, grown.to(tl.int64), mask=inside)


def compaction_index_triton(keep: torch.Tensor, slots: int, right_padded: bool) -> Index:
    """The kernel; see :func:`vlm_budget.ops.compaction_index`.

    Raises:
        KernelInputError: Element types, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype((torch.bool,), keep=keep)
    require_shape((None, None), keep=keep)
    require_rows(keep=keep)
    batch, length = keep.shape
    require_slots(slots, length)
    require_int32(batch=batch, length=blocks(length, BLOCK) * BLOCK)
    index = torch.empty(batch, slots, dtype=torch.int64, device=keep.device)
    valid = torch.empty(batch, slots, dtype=torch.bool, device=keep.device)
    source = torch.empty(batch, length, dtype=torch.int64, device=keep.device)
    if keep.numel():
        given = (_bits(keep), index, _bits(valid), source, slots, length, keep.stride(0))
        _index.launch((batch, blocks(length, BLOCK)), *given, RIGHT=right_padded, BLOCK=BLOCK)
    return index, valid, source


def require_slots(slots: int, length: int) -> None:
    """Refuse more slots than columns.

    Raises:
        KernelInputError: There are more.
    """
    if not 0 <= slots <= length:
        raise KernelInputError(f"slots must lie between 0 and the {length} columns of a row, got {slots}")


@kernel(Config(warps=8), sizes=("columns", "rows", "most"))
def _visual_rows(visual, keep, source, columns, rows, most, BLOCK: tl.constexpr):
    """One block of the batch's columns: the ranks of those that are visual and kept, at most ``most``."""
    begin = tl.program_id(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    ranked = tl.zeros((), tl.int32)  # visual columns in front of the block
    kept = tl.zeros((), tl.int32)
    for start in range(0, begin, BLOCK):
        at = start + lane
        flags = tl.load(visual + at).to(tl.int32)
        ranked += tl.sum(flags, 0)
        kept += tl.sum(flags & tl.load(keep + at).to(tl.int32), 0)
    at = begin + lane
    inside = at < columns
    flags = tl.load(visual + at, mask=inside, other=0).to(tl.int32)
    stays = flags & tl.load(keep + at, mask=inside, other=0).to(tl.int32)
    rank = tl.minimum(ranked + tl.cumsum(flags, 0) - 1, most)
    place = kept + tl.cumsum(stays, 0) - 1
    tl.store(source + place, rank.to(tl.int64), mask=(stays != 0) & (place < rows))
    # Where more were promised than are kept, the last block makes the rest point at what can be read.
    promised = tl.where(begin + BLOCK >= columns, rows, 0)
    for start in range(kept + tl.sum(stays, 0), promised, BLOCK):
        at = start + lane
        tl.store(source + at, tl.zeros((BLOCK,), tl.int64), mask=at < rows)


@device_function
def _copy(source, target, begin, end, alive, column, width):
    """Copy rows that begin at elements ``begin`` of one tensor to elements ``end`` of another."""
    cells = alive[:, None] & (column < width)[None, :]
    values = tl.load(source + begin[:, None] + column[None, :], mask=cells)
    tl.store(target + end[:, None] + column[None, :], values, mask=cells)


@device_function
def _copy_level(source, target, mine, begin, end, alive, column, width):
    """Copy rows of a deepstack level, if there is one and it is this program's."""
    if source is not None:
        if mine:
            _copy(source, target, begin, end, alive, column, width)


# fmt: off
@kernel(Config(warps=4), Config(warps=8), Config(warps=2), key=("width", "level_width"),
        sizes=("batch", "slots", "rows", "axes", "position_axis", "position_batch", "flag_batch"))
def _payload(
    index, values, taken, valid, positions, taken_positions, visual, taken_visual,
    source, level0, level1, level2, level3, taken0, taken1, taken2, taken3,
    batch, slots, rows, axes, width, value_batch, value_column, position_axis, position_batch, flag_batch,
    level_width, stride0, stride1, stride2, stride3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    # fmt: on
    """One tile: some slots' embeddings, with their positions and flags, or some rows of a deepstack level."""
    across = tl.cdiv(tl.maximum(tl.maximum(width, level_width), 1), COLUMNS)
    part = tl.program_id(0) % across  # programs that run together copy what lies together
    plane = tl.program_id(1)
    at = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    wide = at.to(tl.int64)
    if values is not None:
        if plane == 0:
            alive = at < batch * slots
            row = (at // tl.maximum(slots, 1)).to(tl.int64)
            where = tl.load(index + wide, mask=alive, other=0)
            _copy(values, taken, row * value_batch + where * value_column, wide * width, alive, column, width)
            if valid is not None:
                if part == 0:
                    holds = tl.load(valid + wide, mask=alive, other=0) != 0
                    if positions is not None:
                        begin = row * position_batch + where
                        end = wide
                        for _ in range(axes):
                            found = tl.load(positions + begin, mask=holds, other=0)
                            tl.store(taken_positions + end, found, mask=alive)
                            begin += position_axis
                            end += batch * slots
                    if visual is not None:
                        flags = tl.load(visual + row * flag_batch + where, mask=holds, other=0)
                        tl.store(taken_visual + wide, flags, mask=alive)
    if source is not None:
        if plane > 0:
            alive = at < rows
            where = tl.load(source + wide, mask=alive, other=0)
            end = wide * level_width
            _copy_level(level0, taken0, plane == 1, where * stride0, end, alive, column, level_width)
            _copy_level(level1, taken1, plane == 2, where * stride1, end, alive, column, level_width)
            _copy_level(level2, taken2, plane == 3, where * stride2, end, alive, column, level_width)
            _copy_level(level3, taken3, plane == 4, where * stride3, end, alive, column, level_width)


def take_columns_triton(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.take_columns`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_same_device(values=values, index=index)
    require_dtype((torch.int64,), index=index)
    require_shape((None, None, None), values=values)
    require_shape((len(values), None), index=index)
    return _copied(values, index)[0]


def compact_triton(
    embeds: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor,
    keep: torch.Tensor,
    positions: torch.Tensor | None,
    visual: torch.Tensor | None,
    deepstack: Sequence[torch.Tensor],
    rows: int,
) -> list[torch.Tensor]:
    """The kernel; see :func:`vlm_budget.ops.compact`. A list: embeddings, positions and flags if any, the levels.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    _require_matching(embeds, index, valid, keep, positions, visual, deepstack, rows)
    source = None if visual is None or not deepstack else _kept_visual_rows(visual, keep, rows, len(deepstack[0]))
    holds = None if positions is None and visual is None else valid
    taken = _copied(embeds, index, holds, positions, visual, source, deepstack[:LEVELS])
    for start in range(LEVELS, len(deepstack), LEVELS):
        taken += _copied(None, index, source=source, levels=deepstack[start : start + LEVELS])
    return taken


def _kept_visual_rows(visual: torch.Tensor, keep: torch.Tensor, rows: int, given: int) -> torch.Tensor:
    """[rows] int64, as :func:`visual_rows_reference`."""
    columns = visual.numel()
    require_int32(columns=blocks(columns, BLOCK) * BLOCK, rows=rows)
    source = torch.empty(rows, dtype=torch.int64, device=visual.device)
    if rows:
        flags = [_bits(each.contiguous()) for each in (visual, keep)]
        _visual_rows.launch((blocks(columns, BLOCK),), *flags, source, columns, rows, given - 1, BLOCK=BLOCK)
    return source


def _copied(
    values: torch.Tensor | None,
    index: torch.Tensor,
    valid: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    visual: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    levels: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """One launch; copies of what there is of values, positions, flags and levels."""
    require_rows(values=values, positions=positions, visual=visual)
    require_rows(**{f"deepstack[{i}]": level for i, level in enumerate(levels)})
    bits = list(map(_bits, given := (values, positions, visual, *levels)))
    batch, slots = index.shape
    rows, axes = (0 if each is None else len(each) for each in (source, positions))
    width, level_width = (0 if each is None else each.shape[-1] for each in (values, levels[0] if levels else None))
    size = max(each.element_size() for each in (values, *levels) if each is not None)
    columns = min(power_of_two(max(width, level_width)), WIDEST // size)
    height = min(TILE // size // columns, TALLEST)
    programs = blocks(max(batch * slots, rows), height) * blocks(max(width, level_width, 1), columns)
    require_int32(slots=batch * slots + height, rows=rows + height, width=width, programs=programs)
    shapes = [(batch, slots, width), (axes, batch, slots), (batch, slots), *[(rows, level_width)] * len(levels)]
    taken = [None if each is None else each.new_empty(shape) for each, shape in zip(given, shapes, strict=True)]
    if programs:
        into, unused = [_bits(each) for each in taken], [None] * (LEVELS - len(levels))
        _payload.launch(
            (programs, 1 + len(levels)),
            index.contiguous(),
            *(bits[0], into[0], None if valid is None else _bits(valid.contiguous())),
            *(bits[1], into[1], bits[2], into[2]),
            *(source, *bits[3:], *unused, *into[3:], *unused),
            *(batch, slots, rows, axes, width),
            *(*_strides(values, 2), *_strides(positions, 2), *_strides(visual, 1)),
            *(level_width, *(level.stride(0) for level in levels), *[0] * len(unused)),
            ROWS=height,
            COLUMNS=columns,
        )
    return [each for each in taken if each is not None]


def _strides(tensor: torch.Tensor | None, count: int) -> Sequence[int]:
    return [0] * count if tensor is None else tensor.stride()[:count]


def _bits(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same memory as whole numbers, so that one kernel copies all element types of a size."""
    if tensor is None:
        return None
    if tensor.is_complex() or tensor.is_quantized or tensor.element_size() not in _BITS:
        raise KernelInputError(f"cannot copy elements of {tensor.dtype}. Convert the tensor with .to(), or use views.")
    return tensor.view(_BITS[tensor.element_size()])


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    keep = torch.arange(64).remainder(3).bool().expand(2, -1).contiguous()
    for right_padded in (False, True):
        yield f"index, right_padded={right_padded}", partial(compaction_index_triton, keep, 48, right_padded)
    index, valid = torch.zeros(2, 48, dtype=torch.int64), torch.ones(2, 48, dtype=torch.bool)
    positions = torch.zeros(3, 2, 64, dtype=torch.int64)
    yield "flags", partial(take_columns_triton, keep[..., None], index)
    for dtype in FLOATS:
        for width in (896, 3584, 4096):
            embeds, levels = torch.zeros(2, 64, width, dtype=dtype), [torch.zeros(128, width, dtype=dtype)] * 3
            yield f"{dtype} {width}, output", partial(take_columns_triton, embeds, index)
            for visual, rows in ((None, ()), (keep, levels)):
                run = partial(compact_triton, embeds, index, valid, keep, positions, visual, rows, 84)
                yield f"{dtype} {width}, {len(rows)} levels", run
