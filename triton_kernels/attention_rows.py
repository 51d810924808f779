"""Softmax rows of a few chosen queries over all keys, their heads reduced on the way: never a whole attention map.

Two launches. The first reads every key once, for all query heads that share it, and leaves each block of keys with
softmax weights relative to the block's own maximum. The second brings the blocks of a row to one scale and reduces over
heads. What is between them, one number per head, query and key, is bounded: many queries are taken in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

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

Reduce = Literal["mean", "sum", "max", "none"]
SCRATCH = 64 * 2**20
"""Bytes between the two launches, at most, unless one query alone needs more."""
WIDEST = 256
"""Heads wider than this are read in pieces, and so is float32, whose factors lie in registers."""
BLOCK = 64
"""Keys per program of the second launch; divides the block of the first."""


def attention_rows_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: str = "mean",
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.attention_rows`.

    Raises:
        KernelInputError: No heads, or a mask of integers.
    """
    require_sense(query, mask)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query.float() @ key.float().transpose(-1, -2)) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
    within = between(first, stop, key.shape[2])
    if within is not None:
        logits = logits.masked_fill(~within, float("-inf"))
    rows = torch.nan_to_num(logits.softmax(-1))
    if reduce == "none":
        return rows
    return rows.amax(1) if reduce == "max" else rows.sum(1) if reduce == "sum" else rows.mean(1)


def require_sense(query: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Refuse what has no meaning, on any device.

    Raises:
        KernelInputError: No heads to take a mean of, or a mask of integers, which may be flags or addends.
    """
    if not query.shape[1]:
        raise KernelInputError(f"query must have at least one head, got shape {list(query.shape)}")
    if mask is not None and not mask.dtype.is_floating_point:
        require_dtype((torch.bool, *FLOATS), mask=mask)


def between(first: torch.Tensor | None, stop: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """[B, 1, n, length] bool, ``first <= j < stop`` of [B, n] limits; None without any."""
    within = None
    for limit in (first, stop):
        if limit is not None:
            columns = torch.arange(length, device=limit.device)
            inside = columns >= limit[:, None, :, None] if limit is first else columns < limit[:, None, :, None]
            within = inside if within is None else within & inside
    return within


@device_function
def products(a, b, WIDEN: tl.constexpr):
    """Matrix product with float32 sums; ``WIDEN`` in the interpreter, whose own misreads bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@kernel(
    Config(warps=4),
    sizes=(
        *("rows", "n", "group", "heads", "keys", "key_blocks"),
        *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row"),
        *("first_batch", "stop_batch", "m_batch", "m_head", "m_row", "m_key"),
    ),
)
def _block_softmax(
    query, key, first, stop, mask, weights, maxima, sums,
    scaling, rows, n, group, heads, keys, key_blocks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, first_batch, stop_batch, m_batch, m_head, m_row, m_key,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    UNIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Of one block of keys of one key head: exp(logit - m) of every query row, with m and the sum per row.

    ``heads`` counts key heads, ``rows`` the query rows that share one (``group * n``, heads outside), ``MASK`` is 0 for
    none, 1 for flags, 2 for addends. Strides of queries and keys come divided by ``UNIT``, so that the compiler knows
    that rows are aligned.
    """
    program = tl.program_id(0).to(tl.int64)
    block = program % key_blocks
    pair = program // key_blocks
    batch, own = pair // heads, pair % heads
    at = block * KEYS + tl.arange(0, KEYS)
    inside = at < keys
    wide = tl.arange(0, WIDTH)
    key += (batch * k_batch + own * k_head) * UNIT
    query += batch * q_batch * UNIT
    key_at = (at * k_row)[:, None] * UNIT + wide[None, :]
    if HEAD <= WIDTH:
        k = tl.load(key + key_at, mask=inside[:, None] & (wide < HEAD)[None, :], other=0.0)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        head, index = own * group + row // n, (row % n).to(tl.int64)
        query_at = (head * q_head + index * q_row)[:, None] * UNIT + wide[None, :]
        if HEAD <= WIDTH:
            q = tl.load(query + query_at, mask=live[:, None] & (wide < HEAD)[None, :], other=0.0)
            logits = products(q, tl.trans(k), WIDEN)
        else:
            logits = tl.zeros((ROWS, KEYS), tl.float32)
            for piece in range(0, HEAD, WIDTH):
                left = (piece + wide < HEAD)[None, :]
                q = tl.load(query + piece + query_at, mask=live[:, None] & left, other=0.0)
                k = tl.load(key + piece + key_at, mask=inside[:, None] & left, other=0.0)
                logits += products(q, tl.trans(k), WIDEN)
        logits = logits * scaling
        visible = live[:, None] & inside[None, :]
        mask_at = batch * m_batch + (head * m_head + index * m_row)[:, None] + (at * m_key)[None, :]
        if MASK == 1:
            visible = visible & (tl.load(mask + mask_at, mask=visible, other=0) != 0)
        if MASK == 2:
            logits += tl.load(mask + mask_at, mask=visible, other=0.0).to(tl.float32)
        if first is not None:
            least = tl.load(first + batch * first_batch + index, mask=live, other=0)
            visible = visible & (at[None, :] >= least[:, None])
        if stop is not None:
            end = tl.load(stop + batch * stop_batch + index, mask=live, other=0)
            visible = visible & (at[None, :] < end[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        peak = tl.max(logits, 1)
        weight = tl.exp(logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        slot = pair * rows + row
        tl.store(weights + slot[:, None] * keys + at[None, :], weight, mask=live[:, None] & inside[None, :])
        tl.store(maxima + slot * key_blocks + block, peak, mask=live)
        tl.store(sums + slot * key_blocks + block, tl.sum(weight, 1), mask=live)


@kernel(Config(warps=8), sizes=("n", "heads", "keys", "key_blocks", "key_block", "out_batch"))
def _heads_reduced(
    weights, maxima, sums, out, divisor, n, heads, keys, key_blocks, key_block, out_batch,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Of ``BLOCK`` keys and one query: the softmax over all blocks, and over heads their sum, maximum or nothing.

    ``REDUCE`` is 0 for a sum, which ``divisor`` divides, 1 for the maximum, 2 to put each head's row over its weights.
    """
    program = tl.program_id(0).to(tl.int64)
    strips = (keys + BLOCK - 1) // BLOCK
    strip = program % strips
    batch, index = program // strips // n, program // strips % n
    at = strip * BLOCK + tl.arange(0, BLOCK)
    inside = at < keys
    own = strip * BLOCK // key_block
    result = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        live = head < heads
        row = (batch * heads + head) * n + index
        there = live[:, None] & inside[None, :]
        weight = tl.load(weights + row[:, None] * keys + at[None, :], mask=there, other=0.0)
        peak = tl.full((HEADS,), float("-inf"), tl.float32)
        level = tl.zeros((HEADS,), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        for left in range(0, key_blocks, CHUNK):
            which = left + tl.arange(0, CHUNK)
            known = live[:, None] & (which < key_blocks)[None, :]
            high = tl.load(maxima + row[:, None] * key_blocks + which[None, :], mask=known, other=float("-inf"))
            mass = tl.load(sums + row[:, None] * key_blocks + which[None, :], mask=known, other=0.0)
            highest = tl.maximum(peak, tl.max(high, 1))
            level = tl.where(highest == float("-inf"), 0.0, highest)
            total = total * tl.exp(peak - level) + tl.sum(mass * tl.exp(high - level[:, None]), 1)
            peak = highest
        scale = tl.exp(tl.load(maxima + row * key_blocks + own, mask=live, other=float("-inf")) - level) / total
        # The total of a row without visible keys is zero, that of one with NaN or infinity is not a number.
        weight = tl.where((total > 0)[:, None], weight * scale[:, None], 0.0)
        if REDUCE == 0:
            result += tl.sum(weight, 0)
        if REDUCE == 1:
            result = tl.maximum(result, tl.max(weight, 0))
        if REDUCE == 2:
            tl.store(weights + row[:, None] * keys + at[None, :], weight, mask=there)
    if REDUCE == 0:
        result = result / divisor
    if REDUCE != 2:
        tl.store(out + batch * out_batch + index * keys + at, result, mask=inside)


class Attended(NamedTuple):
    """Queries, keys and limits as kernels take them; see :func:`attended`."""

    query: torch.Tensor
    key: torch.Tensor
    first: torch.Tensor | None
    stop: torch.Tensor | None
    mask: torch.Tensor | None
    kind: int
    unit: int

    def strides(self) -> tuple[int, ...]:
        """Of queries and keys, divided by ``unit``; of the limits, per batch; of the mask."""
        rows = [stride // self.unit for tensor in (self.query, self.key) for stride in _strides(tensor)[:3]]
        limits = [0 if limit is None else limit.stride(0) for limit in (self.first, self.stop)]
        return (*rows, *limits, *((0, 0, 0, 0) if self.mask is None else self.mask.stride()))

    def part(self, start: int, stop: int) -> Attended:
        """Some of the queries."""
        cut = slice(start, stop)
        return self._replace(
            query=self.query[:, :, cut],
            first=None if self.first is None else self.first[:, cut],
            stop=None if self.stop is None else self.stop[:, cut],
            mask=None if self.mask is None else self.mask[:, :, cut],
        )


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    first: torch.Tensor | None,
    stop: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> Attended:
    """Check what was given and bring it into the form that kernels take.

    Raises:
        KernelInputError: Element types, devices, strides, shapes or sizes that they cannot work on.
    """
    require_shape((None, None, None, None), query=query, key=key)
    require_dtype(FLOATS, query=query, key=key)
    require_same_device(query=query, key=key, first=first, stop=stop, mask=mask)
    require_rows(query=query, key=key)
    require_sense(query, mask)
    (batch, heads, n, width), (_, shared, keys, _) = query.shape, key.shape
    require_shape((batch, None, None, width), key=key)
    require_int32(queries=heads * n, keys=keys, programs=batch * heads * (n + 1) * blocks(keys, 16))
    if not shared or heads % shared:
        raise KernelInputError(f"query heads must be a multiple of key heads, got {heads} for {shared}")
    if query.dtype != key.dtype:
        common = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(common), key.to(common)
    first, stop = (_limit(name, limit, batch, n) for name, limit in (("first", first), ("stop", stop)))
    kind = 0
    if mask is not None:
        require_dtype((torch.bool, *FLOATS), mask=mask)
        try:
            mask = mask.expand(batch, heads, n, keys)
        except RuntimeError:
            shape = [batch, heads, n, keys]
            raise KernelInputError(f"mask must broadcast to {shape}, got {list(mask.shape)}") from None
        kind = 1 if mask.dtype == torch.bool else 2
        mask = mask.view(torch.uint8) if kind == 1 else mask
    strides = [*_strides(query)[:3], *_strides(key)[:3]]
    return Attended(query, key, first, stop, mask, kind, 1 if any(stride % 8 for stride in strides) else 8)


def _strides(tensor: torch.Tensor) -> list[int]:
    """Strides, 0 where a dimension has one element: what stands there says nothing."""
    return [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def _limit(name: str, limit: torch.Tensor | None, batch: int, n: int) -> torch.Tensor | None:
    if limit is None:
        return None
    require_dtype((torch.int32, torch.int64), **{name: limit})
    if limit.ndim != 2 or limit.shape[0] not in (1, batch) or limit.shape[1] != n:
        raise KernelInputError(f"{name} must have shape [{batch} or 1, {n}], got {list(limit.shape)}")
    return (limit if limit.stride(1) == 1 or n == 1 else limit.contiguous()).expand(batch, n)


def attention_rows_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: str = "mean",
) -> torch.Tensor:
    """The kernels; see :func:`vlm_budget.ops.attention_rows`.

    Raises:
        KernelInputError: Element types, devices, strides, shapes or sizes that they cannot work on.
        KernelUnavailableError: They cannot run here.
    """
    if reduce not in get_args(Reduce):
        raise KernelInputError(f"reduce must be one of {', '.join(get_args(Reduce))}, got {reduce!r}")
    whole = attended(query, key, first, stop, mask)
    (batch, heads, n, _), keys = query.shape, key.shape[2]
    shape = (batch, heads, n, keys) if reduce == "none" else (batch, n, keys)
    out = torch.empty(shape, dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    step = n if reduce == "none" else max(1, SCRATCH // (4 * batch * heads * keys))
    for start in range(0, n, step):
        _launched(whole.part(start, start + step), scaling, out if reduce == "none" else out[:, start:], reduce)
    return out


def _launched(given: Attended, scaling: float, out: torch.Tensor, reduce: str) -> None:
    """Both launches, for queries whose scratch memory fits."""
    (batch, heads, n, head), (_, shared, keys, _) = given.query.shape, given.key.shape
    width = power_of_two(head, 16) if head <= WIDEST else 64
    # The addresses of a mask and the factors that no tensor core takes fill registers, too.
    narrow = given.kind or head > WIDEST or given.key.dtype == torch.float32
    block = BLOCK if narrow else max(BLOCK, min(128, 2**14 // width))
    if given.key.dtype == torch.float32:
        width = 16
    key_blocks, rows = blocks(keys, block), heads // shared * n
    weights = out if reduce == "none" else out.new_empty(batch, heads, n, keys)
    maxima = out.new_empty(batch, heads, n, key_blocks)
    sums = torch.empty_like(maxima)
    _block_softmax.launch(
        (batch * shared * key_blocks,),
        *given[:5], weights, maxima, sums,
        scaling, rows, n, heads // shared, shared, keys, key_blocks, *given.strides(),
        HEAD=head, WIDTH=width, ROWS=16 if rows <= 16 else 32, KEYS=block, MASK=given.kind, UNIT=given.unit,
        WIDEN=_block_softmax.interpreted,
    )  # fmt: skip
    _heads_reduced.launch(
        (batch * n * blocks(keys, BLOCK),),
        weights, maxima, sums, out, float(heads if reduce == "mean" else 1), n, heads, keys, key_blocks, block,
        out.stride(0), HEADS=32, BLOCK=BLOCK, CHUNK=32, REDUCE={"max": 1, "none": 2}.get(reduce, 0),
    )  # fmt: skip


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make shipped launches, for ``make kernels-compile``: masks and reductions go round over the widths."""
    kinds = ((), ("stop",), ("first", "stop", "bool"), ("first", "stop", "float"))
    for turn, (dtype, head) in enumerate((dtype, head) for dtype in FLOATS for head in (64, 72, 80, 128)):
        query, key = torch.zeros(1, 8, 1 + turn % 3, head, dtype=dtype), torch.zeros(1, 2, 200, head, dtype=dtype)
        limit = torch.zeros(1, query.shape[2], dtype=torch.int32)
        kind = kinds[(turn + turn // 4) % 4]
        flags = torch.zeros(1, 1, 1, 200, dtype=torch.bool if "bool" in kind else dtype) if len(kind) == 3 else None

        def call(
            query: torch.Tensor = query,
            key: torch.Tensor = key,
            first: torch.Tensor | None = limit if "first" in kind else None,
            stop: torch.Tensor | None = limit if "stop" in kind else None,
            mask: torch.Tensor | None = flags,
            reduce: str = ("mean", "max", "none")[turn % 3],
        ) -> object:
            return attention_rows_triton(query, key, 0.125, first, stop, mask, reduce)

        yield f"{dtype} heads of {head}, {' '.join(kind) or 'all visible'}", call
