"""The inner loops of sparse attention: one tile of query rows over its list of key tiles."""

from __future__ import annotations

from ._launch import device_function, tl


@device_function
def _product(a, b, before, WIDEN: tl.constexpr):
    """``before + a @ b`` on tensor cores, float32 by three products; ``WIDEN`` in the interpreter."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, before, input_precision="tf32x3")


@device_function
def _online(q, k, v, extra, scale, total, peak, before, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDEN: tl.constexpr):
    """One step of the online softmax; ``extra`` is added to the logits of a column, -inf where there is none."""
    logits = _product(q, tl.trans(k), tl.zeros((ROWS, KEYS), tl.float32), WIDEN)
    if extra is None:
        highest = tl.maximum(peak, tl.max(logits, 1) * scale)  # scale is not negative
        weights = tl.exp2(logits * scale - highest[:, None])
        factor = tl.exp2(peak - highest)
    else:
        logits = logits * scale + extra[None, :]
        highest = tl.maximum(peak, tl.max(logits, 1))
        level = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - level[:, None])
        factor = tl.exp2(peak - level)
    total = total * factor + tl.sum(weights, 1)
    return total, highest, _product(weights.to(v.dtype), v, before * factor[:, None], WIDEN)


SIZES = (
    *("heads", "tiles", "keys", "slots", "query_blocks", "corrected"),
    *("tile_batch", "tile_head", "list_batch", "list_head", "count_batch", "count_head"),
    *("size_batch", "size_head", "kept_batch", "kept_head", "kept_row", "lse_batch", "lse_head"),
    *("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row"),
    *("m_batch", "m_head", "m_row", "o_batch", "o_head", "o_row"),
)


def attended_tile(
    query, key, value, mean_keys, mean_values, sizes, kept, firsts, packed, lists, counts, out, lse,
    scale, heads, tiles, keys, slots, query_blocks, corrected,
    tile_batch, tile_head, list_batch, list_head, count_batch, count_head,
    size_batch, size_head, kept_batch, kept_head, kept_row, lse_batch, lse_head,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, m_batch, m_head, m_row,
    o_batch, o_head, o_row,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MEANS: tl.constexpr,
    UNIT: tl.constexpr, SHIFT: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of the rows of one query block: full tiles of keys, then smaller ones, then means of dropped blocks.

    ``scale`` includes log2(e). Strides of rows come divided by ``UNIT``, so that the compiler knows that rows are
    aligned.
    """
    pair = tl.program_id(0) // tiles
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    place = batch * tile_batch + head * tile_head + tl.program_id(0) % tiles
    own = tl.load(packed + place)
    if own == 0:
        return
    block = own // SHIFT
    row = tl.load(firsts + place).to(tl.int64)
    line = tl.arange(0, ROWS)
    live = line < own % SHIFT
    wide = tl.arange(0, WIDTH)
    at = tl.arange(0, KEYS)
    known = (wide < HEAD)[None, :]
    query += (batch * q_batch + head * q_head + row * q_row) * UNIT
    key += (batch * k_batch + head * k_head) * UNIT
    value += (batch * v_batch + head * v_head) * UNIT
    key_at = (at * k_row)[:, None] * UNIT + wide[None, :]
    value_at = (at * v_row)[:, None] * UNIT + wide[None, :]
    q = tl.load(query + (line * q_row)[:, None] * UNIT + wide[None, :], mask=live[:, None] & known, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    counts += batch * count_batch + head * count_head + block * 2
    lists += batch * list_batch + head * list_head + tl.minimum(block, query_blocks - 1).to(tl.int64) * slots
    full = tl.load(counts)
    tails = tl.load(counts + 1)
    if TMA:
        of_keys = tl.make_tensor_descriptor(
            key, shape=[keys, HEAD], strides=[(k_row * UNIT).to(tl.int64), 1], block_shape=[KEYS, WIDTH]
        )
        of_values = tl.make_tensor_descriptor(
            value, shape=[keys, HEAD], strides=[(v_row * UNIT).to(tl.int64), 1], block_shape=[KEYS, WIDTH]
        )
    ahead = tl.load(lists)  # one tile ahead, so that no address waits for it
    for turn in range(0, full):
        start = ahead // SHIFT
        ahead = tl.load(lists + turn + 1)
        if TMA:
            k = of_keys.load([start, 0])
            v = of_values.load([start, 0])
        elif HEAD == WIDTH:
            k = tl.load(key + start.to(tl.int64) * k_row * UNIT + key_at)
            v = tl.load(value + start.to(tl.int64) * v_row * UNIT + value_at)
        else:
            k = tl.load(key + start.to(tl.int64) * k_row * UNIT + key_at, mask=known, other=0.0)
            v = tl.load(value + start.to(tl.int64) * v_row * UNIT + value_at, mask=known, other=0.0)
        total, peak, found = _online(q, k, v, None, scale, total, peak, found, ROWS, KEYS, WIDEN)
    for turn in range(0, tails):
        tile = tl.load(lists + slots - 1 - turn)
        start = (tile // SHIFT).to(tl.int64)
        inside = at < tile % SHIFT
        k = tl.load(key + start * k_row * UNIT + key_at, mask=inside[:, None] & known, other=0.0)
        v = tl.load(value + start * v_row * UNIT + value_at, mask=inside[:, None] & known, other=0.0)
        extra = tl.where(inside, 0.0, float("-inf"))
        total, peak, found = _online(q, k, v, extra, scale, total, peak, found, ROWS, KEYS, WIDEN)
    if mean_keys is not None:
        means = (batch * m_batch + head * m_head) * UNIT
        kept += batch * kept_batch + head * kept_head + block * kept_row
        sizes += batch * size_batch + head * size_head
        some = tl.arange(0, MEANS)
        for start in range(0, tl.where(block < query_blocks, corrected, 0), MEANS):
            inside = start + some < corrected
            mean_at = means + ((start + some) * m_row)[:, None] * UNIT + wide[None, :]
            k = tl.load(mean_keys + mean_at, mask=inside[:, None] & known, other=0.0)
            v = tl.load(mean_values + mean_at, mask=inside[:, None] & known, other=0.0)
            several = tl.load(sizes + start + some, mask=inside, other=0)
            dropped = (tl.load(kept + start + some, mask=inside, other=1) == 0) & (several > 0)
            extra = tl.where(dropped, tl.log2(tl.maximum(several, 1).to(tl.float32)), float("-inf"))
            total, peak, found = _online(q, k, v, extra, scale, total, peak, found, ROWS, MEANS, WIDEN)
    seen = total != 0.0
    found = found / tl.where(seen, total, 1.0)[:, None]
    natural = (peak + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453
    out += (batch * o_batch + head * o_head + row * o_row) * UNIT
    out_at = (line * o_row)[:, None] * UNIT + wide[None, :]
    tl.store(out + out_at, found.to(out.dtype.element_ty), mask=live[:, None] & known)
    lse += batch * lse_batch + head * lse_head + row
    tl.store(lse + line, tl.where(seen, natural, float("-inf")), mask=live)
