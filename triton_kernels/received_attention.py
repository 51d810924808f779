"""The attention every key receives, mean over heads and queries, without the attention map: memory grows with O(N).

Two launches. The first walks over the keys with a running maximum and sum, and leaves both for every query. The second
holds a block of keys, walks over the queries that may see it, and adds up what they give. Keys and queries that no
limit lets meet are not read. Sums over heads are made at the end, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch

from vlm_budget.errors import KernelInputError

from ._launch import Config, blocks, kernel, power_of_two, tl
from .attention_rows import WIDEST, attended, attention_rows_reference, products, require_sense

Over = Literal["mean", "sum"]

CHUNK = 256
"""Queries whose rows the reference holds at a time."""


def received_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: str = "mean",
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.received_attention`.

    Raises:
        KernelInputError: No heads, or a mask of integers.
    """
    require_sense(query, mask)
    n = query.shape[2]
    sums = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    for start in range(0, n, CHUNK):
        cut = slice(start, start + CHUNK)
        begin, end = (None if limit is None else limit[:, cut] for limit in (first, stop))
        part = mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., cut, :]
        sums += attention_rows_reference(query[:, :, cut], key, scaling, begin, end, part, "none").sum(2).mean(1)
    return sums if reduce == "sum" else sums / max(n, 1)


SIZES = (
    *("queries", "keys", "group", "heads", "query_blocks"),
    *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row"),
    *("first_batch", "stop_batch", "m_batch", "m_head", "m_row", "m_key"),
)


@kernel(Config(warps=4, stages=3), sizes=SIZES)
def _normalisers(
    query, key, first, stop, mask, peaks, scales, begins, ends,
    scaling, queries, keys, group, heads, query_blocks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, first_batch, stop_batch, m_batch, m_head, m_row, m_key,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    UNIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Of a block of queries of one head: the largest logit, and 1 / softmax denominator or 0 for a row that is zero.

    They stay apart: in the sum of their logarithms the denominator would be lost where masks add the lowest float32 to
    a whole row. Where limits are given, the block's range of visible keys goes to ``begins`` and ``ends``. ``heads``
    counts query heads; ``MASK`` and ``UNIT`` are those of :mod:`.attention_rows`.
    """
    program = tl.program_id(0).to(tl.int64)
    block = program % query_blocks
    pair = program // query_blocks
    batch, head = pair // heads, pair % heads
    index = block * QUERIES + tl.arange(0, QUERIES)
    live = index < queries
    wide = tl.arange(0, WIDTH)
    query += (batch * q_batch + head * q_head) * UNIT
    key += (batch * k_batch + (head // group) * k_head) * UNIT
    query_at = (index * q_row)[:, None] * UNIT + wide[None, :]
    if HEAD <= WIDTH:
        q = tl.load(query + query_at, mask=live[:, None] & (wide < HEAD)[None, :], other=0.0)
    begin, end = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + keys
    if first is not None:
        least = tl.load(first + batch * first_batch + index, mask=live, other=2147483647)
        begin = tl.minimum(tl.maximum(tl.min(least, 0), 0), keys).to(tl.int32)  # clamped while it may have 64 bits
    if stop is not None:
        most = tl.load(stop + batch * stop_batch + index, mask=live, other=0)
        end = tl.minimum(tl.maximum(tl.max(most, 0), 0), keys).to(tl.int32)
    if first is not None or stop is not None:
        if head == 0:
            tl.store(begins + batch * query_blocks + block, begin)
            tl.store(ends + batch * query_blocks + block, end)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(begin // KEYS * KEYS, end, KEYS):
        at = start + tl.arange(0, KEYS).to(tl.int64)
        inside = at < keys
        key_at = (at * k_row)[:, None] * UNIT + wide[None, :]
        if HEAD <= WIDTH:
            k = tl.load(key + key_at, mask=inside[:, None] & (wide < HEAD)[None, :], other=0.0)
            logits = products(q, tl.trans(k), WIDEN)
        else:
            logits = tl.zeros((QUERIES, KEYS), tl.float32)
            for piece in range(0, HEAD, WIDTH):
                left = (piece + wide < HEAD)[None, :]
                q = tl.load(query + piece + query_at, mask=live[:, None] & left, other=0.0)
                k = tl.load(key + piece + key_at, mask=inside[:, None] & left, other=0.0)
                logits += products(q, tl.trans(k), WIDEN)
        logits = logits * scaling
        if MASK == 0:
            visible = inside[None, :]
        else:
            visible = live[:, None] & inside[None, :]
            mask_at = batch * m_batch + head * m_head + (index * m_row)[:, None] + (at * m_key)[None, :]
        if MASK == 1:
            visible = visible & (tl.load(mask + mask_at, mask=visible, other=0) != 0)
        if MASK == 2:
            logits += tl.load(mask + mask_at, mask=visible, other=0.0).to(tl.float32)
        if first is not None:
            visible = visible & (at[None, :] >= least[:, None])
        if stop is not None:
            visible = visible & (at[None, :] < most[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, 1))
        level = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(peak - level) + tl.sum(tl.exp(logits - level[:, None]), 1)
        peak = highest
    # Empty rows have a total of zero, and those with NaN or infinity one that is not a number.
    counts = total > 0
    tl.store(peaks + pair * queries + index, tl.where(counts, peak, 0.0), mask=live)
    tl.store(scales + pair * queries + index, tl.where(counts, 1.0 / tl.where(counts, total, 1.0), 0.0), mask=live)


@kernel(Config(warps=4, stages=3), sizes=(*SIZES, "key_blocks"))
def _given_to_keys(
    query, key, first, stop, mask, peaks, scales, begins, ends, sums,
    scaling, queries, keys, group, heads, query_blocks, key_blocks,
    q_batch, q_head, q_row, k_batch, k_head, k_row, first_batch, stop_batch, m_batch, m_head, m_row, m_key,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, MASK: tl.constexpr,
    UNIT: tl.constexpr, WIDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of a block of keys and one query head: the softmax weights that all queries give them, summed over queries.

    ``query_blocks`` and ``BLOCK`` are those of :func:`_normalisers`; ``QUERIES`` divides ``BLOCK``.
    """
    program = tl.program_id(0).to(tl.int64)
    block = program % key_blocks
    pair = program // key_blocks
    batch, head = pair // heads, pair % heads
    at = block * KEYS + tl.arange(0, KEYS)
    inside = at < keys
    wide = tl.arange(0, WIDTH)
    query += (batch * q_batch + head * q_head) * UNIT
    key += (batch * k_batch + (head // group) * k_head) * UNIT
    key_at = (at * k_row)[:, None] * UNIT + wide[None, :]
    if HEAD <= WIDTH:
        k = tl.load(key + key_at, mask=inside[:, None] & (wide < HEAD)[None, :], other=0.0)
    begin, end = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + queries
    if first is not None or stop is not None:
        begin, end = tl.zeros((), tl.int32) + query_blocks, tl.zeros((), tl.int32)
        for passed in range(0, query_blocks, CHUNK):
            which = passed + tl.arange(0, CHUNK)
            known = which < query_blocks
            earliest = tl.load(begins + batch * query_blocks + which, mask=known, other=2147483647)
            latest = tl.load(ends + batch * query_blocks + which, mask=known, other=0)
            meet = known & (earliest < (block + 1) * KEYS) & (latest > block * KEYS)
            begin = tl.minimum(begin, tl.min(tl.where(meet, which, query_blocks), 0))
            end = tl.maximum(end, tl.max(tl.where(meet, which + 1, 0), 0))
        begin, end = begin * BLOCK, tl.minimum(end * BLOCK, queries)
    result = tl.zeros((KEYS,), tl.float32)
    for start in range(begin, end, QUERIES):
        index = start + tl.arange(0, QUERIES).to(tl.int64)
        live = index < queries
        query_at = (index * q_row)[:, None] * UNIT + wide[None, :]
        peak = tl.load(peaks + pair * queries + index, mask=live, other=0.0)
        scale = tl.load(scales + pair * queries + index, mask=live, other=0.0)
        if HEAD <= WIDTH:
            q = tl.load(query + query_at, mask=live[:, None] & (wide < HEAD)[None, :], other=0.0)
            logits = products(k, tl.trans(q), WIDEN)
        else:
            logits = tl.zeros((KEYS, QUERIES), tl.float32)
            for piece in range(0, HEAD, WIDTH):
                left = (piece + wide < HEAD)[None, :]
                q = tl.load(query + piece + query_at, mask=live[:, None] & left, other=0.0)
                k = tl.load(key + piece + key_at, mask=inside[:, None] & left, other=0.0)
                logits += products(k, tl.trans(q), WIDEN)
        logits = logits * scaling
        visible = (scale > 0)[None, :]
        if MASK != 0:
            there = live[None, :] & inside[:, None]
            mask_at = batch * m_batch + head * m_head + (index * m_row)[None, :] + (at * m_key)[:, None]
        if MASK == 1:
            visible = visible & (tl.load(mask + mask_at, mask=there, other=0) != 0)
        if MASK == 2:
            logits += tl.load(mask + mask_at, mask=there, other=0.0).to(tl.float32)
        if first is not None:
            least = tl.load(first + batch * first_batch + index, mask=live, other=0)
            visible = visible & (at[:, None] >= least[None, :])
        if stop is not None:
            most = tl.load(stop + batch * stop_batch + index, mask=live, other=0)
            visible = visible & (at[:, None] < most[None, :])
        # As in the first launch, so that the compiler rounds products alike: huge logits differ by more than a little.
        logits = tl.where(visible, logits, float("-inf"))
        result += tl.sum(tl.exp(logits - peak[None, :]) * scale[None, :], 1)
    tl.store(sums + pair * keys + at, result, mask=inside)


def received_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: str = "mean",
) -> torch.Tensor:
    """The kernels; see :func:`vlm_budget.ops.received_attention`.

    Raises:
        KernelInputError: Element types, devices, strides, shapes or sizes that they cannot work on.
        KernelUnavailableError: They cannot run here.
    """
    if reduce not in get_args(Over):
        raise KernelInputError(f"reduce must be one of {', '.join(get_args(Over))}, got {reduce!r}")
    given = attended(query, key, first, stop, mask)
    (batch, heads, n, head), keys = query.shape, key.shape[2]
    sums = torch.empty(batch, heads, keys, dtype=torch.float32, device=query.device)
    if not n or not sums.numel():
        return sums.new_zeros(batch, keys)
    width, rows, columns = _tile(head, given.key.dtype, given.kind, first is not None or stop is not None)
    query_blocks = blocks(n, rows)
    peaks = torch.empty(batch, heads, n, dtype=torch.float32, device=query.device)
    scales = torch.empty_like(peaks)
    begins = torch.empty(batch, query_blocks, dtype=torch.int32, device=query.device)
    ends = torch.empty_like(begins)
    group, fixed = heads // key.shape[1], {"HEAD": head, "WIDTH": width, "MASK": given.kind, "UNIT": given.unit}
    _normalisers.launch(
        (batch * heads * query_blocks,),
        *given[:5], peaks, scales, begins, ends,
        scaling, n, keys, group, heads, query_blocks, *given.strides(),
        QUERIES=rows, KEYS=columns, WIDEN=_normalisers.interpreted, **fixed,
    )  # fmt: skip
    key_blocks = blocks(keys, rows)
    _given_to_keys.launch(
        (batch * heads * key_blocks,),
        *given[:5], peaks, scales, begins, ends, sums,
        scaling, n, keys, group, heads, query_blocks, key_blocks, *given.strides(),
        QUERIES=columns, KEYS=rows, WIDEN=_given_to_keys.interpreted, BLOCK=rows, CHUNK=256, **fixed,
    )  # fmt: skip
    received = sums.mean(1)
    return received if reduce == "sum" else received / n


def _tile(head: int, dtype: torch.dtype, mask: int, limited: bool) -> tuple[int, int, int]:
    """Width of a piece of a head, rows that a program holds, and those that it reads per turn."""
    if dtype == torch.float32:  # no tensor core takes it as it is: registers hold both factors of a product
        return 16, 32, 16 if mask or limited else 32
    width = power_of_two(head, 16) if head <= WIDEST else 32
    if mask or head > WIDEST:  # the addresses of a mask fill registers, too
        return width, 64, 32
    return width, 128 if width <= 128 else 64, 64


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make shipped launches, for ``make kernels-compile``: limits and masks go round over the widths."""
    widths = [(torch.bfloat16, head) for head in (64, 72, 80, 128)]
    widths += [(torch.float16, 64), (torch.float16, 128), (torch.float32, 72), (torch.float32, 128)]
    for turn, (dtype, head) in enumerate(widths):
        query, key = torch.zeros(1, 4, 200, head, dtype=dtype), torch.zeros(1, 2, 200, head, dtype=dtype)
        limit = torch.zeros(1, 200, dtype=torch.int32)
        kind = ("limits", "none", "float", "bool")[(turn + turn // 4) % 4]
        mask = torch.zeros(1, 1, 1, 200, dtype=torch.bool if kind == "bool" else dtype)

        def call(
            query: torch.Tensor = query,
            key: torch.Tensor = key,
            limit: torch.Tensor | None = limit if kind in ("limits", "float") else None,
            mask: torch.Tensor | None = mask if kind in ("bool", "float") else None,
        ) -> object:
            return received_attention_triton(query, key, 0.125, limit, limit, mask)

        yield f"{dtype} heads of {head}, {kind}", call
