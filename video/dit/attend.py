"""Computing a call as its blocks say, with text beside them.

The video's tokens are put into the blocks' order; text follows as one more block of queries and one more of keys, its
valid tokens first, and those two are always dense. Padding ends up behind all blocks, where keys are never read. No
matrix of all pairs is ever built, and the host never waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlm_budget.errors import SelectionError
from vlm_budget.ops import block_sparse_attention, permute_tokens, unpermute_tokens
from vlm_budget.ops.block_sparse_attention import Backend

from .call import Blocks, Call

ENTRIES = 2**23
"""Numbers held at a time while pairs are counted."""


class Layout(NamedTuple):
    """A call's L tokens in blocks.

    Attributes:
        query_order: [B|1, H|1, L] int32; None: as they come.
        query_sizes: [B|1, H|1, Cq (+ 1 with text)] int32.
        key_order: [B|1, H|1, L] int32; None: as they come.
        key_sizes: [B|1, H|1, Ck (+ 1)] int32.
        kept: [B|1, H|1, Cq (+ 1), Ck (+ 1)] bool.
    """

    query_order: torch.Tensor | None
    query_sizes: torch.Tensor
    key_order: torch.Tensor | None
    key_sizes: torch.Tensor
    kept: torch.Tensor


def attend(call: Call, blocks: Blocks, backend: Backend = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a call over the pairs of blocks that are kept.

    Args:
        call: Whose tokens.
        blocks: What a method chose.
        backend: See :func:`vlm_budget.ops.block_sparse_attention`.

    Returns:
        [B, H, L, D] in the order of the call's tokens, and [B, H, L] float32 natural logarithms of the softmax
        denominators, for who merges parts (ring and sequence parallel). Padding gets zeros and ``-inf`` with
        ``empty_rows``.
    """
    full = layout(call, blocks)
    query, key, value = _permuted(call, full)
    out, lse = block_sparse_attention(
        query,
        key,
        value,
        full.query_sizes,
        full.key_sizes,
        full.kept,
        scale=call.scale,
        mean_keys=blocks.mean_keys,
        mean_values=blocks.mean_values,
        tile=blocks.tile,
        backend=backend,
    )
    if full.query_order is None:
        return out, lse
    place = full.query_order.long().expand(lse.shape)
    return unpermute_tokens(out, full.query_order), torch.empty_like(lse).scatter_(2, place, lse)


def check(call: Call, blocks: Blocks) -> None:
    """Refuse blocks that are none of the call's tokens; for the CPU, as it reads them.

    Raises:
        SelectionError: Sizes do not add up to the video's tokens, or an order is no permutation of them.
    """
    tokens = call.grid.tokens
    sides = ("query", blocks.query_order, blocks.query_sizes), ("key", blocks.key_order, blocks.key_sizes)
    for side, order, sizes in sides:
        if bool((sizes < 0).any()) or bool((sizes.sum(-1) != tokens).any()):
            raise SelectionError(f"{side}_sizes of a method must add up to the video's {tokens} tokens, got {sizes}")
        if order is not None and not bool((order.sort(-1).values == torch.arange(tokens, device=order.device)).all()):
            raise SelectionError(f"{side}_order of a method must name each of the video's {tokens} tokens once")


def layout(call: Call, blocks: Blocks) -> Layout:
    """The blocks of a call with its text behind them."""
    if not call.text:
        return Layout(blocks.query_order, blocks.query_sizes, blocks.key_order, blocks.key_sizes, blocks.kept)
    behind, valid = _text(call)
    rows = valid if call.empty_rows else torch.full_like(valid, call.text)
    in_place = call.first == 0 and call.valid is None
    return Layout(
        None if blocks.query_order is None and in_place else _with_text(call, blocks.query_order, behind),
        _beside(blocks.query_sizes, rows),
        None if blocks.key_order is None and in_place else _with_text(call, blocks.key_order, behind),
        _beside(blocks.key_sizes, valid),
        torch.nn.functional.pad(blocks.kept, (0, 1, 0, 1), value=True),
    )


def pairs(call: Call, blocks: Blocks) -> torch.Tensor:
    """Share of a call's pairs that are computed, on the device.

    Of all pairs of a valid row and a valid token, over all samples and heads. Text is dense, and a correction counts
    one pair per video row and key block, also where the block is kept or empty.

    Returns:
        Scalar float64.
    """
    batch, heads = call.query.shape[:2]
    rows = blocks.query_sizes.long()
    video = (_seen(blocks.kept, blocks.key_sizes) * rows).sum(-1).double()
    if blocks.mean_keys is not None:
        video = video + (rows.sum(-1) * blocks.mean_keys.shape[2]).double()
    video = video.expand(batch, heads).sum(-1)
    tokens = call.grid.tokens
    text = torch.zeros(1, dtype=torch.float64, device=video.device)
    if call.text:
        valid = _valid_text(call)
        text = text + call.text if valid is None else valid.sum(1).double()
    beside = heads * (2.0 * tokens * text + text * text).expand(batch)
    everything = heads * ((tokens + text) ** 2).expand(batch)
    return (video + beside).sum() / everything.sum()


def _seen(kept: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """[B|1, H|1, Cq] int64, keys that each block of queries sees; in whole numbers, which no mode of matmuls rounds."""
    total = max(kept.shape[1], sizes.shape[1])
    step = max(1, ENTRIES // max(1, kept.shape[0] * kept.shape[2] * kept.shape[3]))
    found = []
    for first in range(0, total, step):
        own = [side[:, first : first + step] if side.shape[1] > 1 else side for side in (kept, sizes)]
        found.append((own[0] * own[1][:, :, None]).sum(-1))
    return torch.cat(found, dim=1) if total > step else found[0]


def _permuted(call: Call, full: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values in their orders, in one launch where all have one."""
    query, key, value = call.query, call.key, call.value
    if full.query_order is not None and full.key_order is not None:
        query, key, value = permute_tokens([query, key, value], [full.query_order, full.key_order, full.key_order])
    elif full.query_order is not None:
        (query,) = permute_tokens([query], [full.query_order])
    elif full.key_order is not None:
        key, value = permute_tokens([key, value], [full.key_order, full.key_order])
    return query, key, value


def _text(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """[B|1, T] int64, where the text's tokens are, valid ones first; [B|1, 1, 1] int32, how many of them are valid."""
    device, end = call.query.device, call.video.stop
    before = torch.arange(call.first, device=device)
    places = torch.cat([before, torch.arange(end, call.query.shape[2], device=device)])[None]
    valid = _valid_text(call)
    if valid is None:
        return places, torch.full((1, 1, 1), call.text, dtype=torch.int32, device=device)
    ranked = (~valid).int().argsort(dim=1, stable=True)
    places = places.expand(ranked.shape).gather(1, ranked)
    return places, valid.sum(1, dtype=torch.int32)[:, None, None]


def _valid_text(call: Call) -> torch.Tensor | None:
    """[B, T] bool, which of the text's tokens are no padding; None where all are."""
    if call.valid is None:
        return None
    return torch.cat([call.valid[:, : call.first], call.valid[:, call.video.stop :]], dim=1)


def _with_text(call: Call, order: torch.Tensor | None, behind: torch.Tensor) -> torch.Tensor:
    """[B|1, H|1, L] int32: the video in its order, then the text."""
    if order is None:
        order = torch.arange(call.grid.tokens, dtype=torch.int32, device=behind.device)[None, None]
    batch, heads = max(order.shape[0], behind.shape[0]), order.shape[1]
    video = (order + call.first).expand(batch, heads, -1)
    return torch.cat([video, behind.int()[:, None].expand(batch, heads, -1)], dim=2)


def _beside(sizes: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B|1, H|1, C + 1] int32: sizes of the video's blocks, then the text's."""
    batch, heads = max(sizes.shape[0], text.shape[0]), sizes.shape[1]
    return torch.cat([sizes.expand(batch, heads, -1), text.expand(batch, heads, 1)], dim=2)
