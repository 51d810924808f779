"""What every operation of :mod:`vlm_budget.ops` is timed on: one entry per operation.

An entry makes, for a number of tokens, a call of the public function with inputs of real widths, and says how many
bytes and FLOPs the call must move at the least: every input read once, every output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vlm_budget import ops

from .op_work import TOLERANCE, Bound, OpCase, Sizes, Work, parts_of, weight

LENGTHS = (2880, 5760, 16384)
"""Tokens: LLaVA-NeXT's five tiles, twice as many, and a long video."""

CASES: list[OpCase] = []


def case(op: str, what: str, bound: Bound, lists: bool = False) -> Callable[[Any], Any]:
    """Add a function as an entry."""

    def add(make: Callable[[Sizes, int, torch.Generator], Work]) -> Any:
        CASES.append(OpCase(op, what, bound, make, lists))
        return make

    return add


# --- the table -------------------------------------------------------------------------------------------------------


@case("segmented_topk", "five crops, a fifth of each", "latency")
def _segmented_topk(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    lengths = parts_of(tokens, 5)
    scores = torch.rand(tokens, generator=draw, device=sizes.device)
    segment = torch.arange(5).repeat_interleave(torch.tensor(lengths)).to(sizes.device)
    counts = torch.tensor([length // sizes.keep for length in lengths], dtype=torch.int32)
    total = int(counts.sum())
    counts = counts.to(sizes.device)
    moved = weight(scores, segment, counts) + 8 * total
    return Work(lambda: ops.segmented_topk(scores, segment, counts, total), moved)


@case("quota", "one share per 48 tokens", "latency")
def _quota(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    shares = max(1, tokens // 48)
    weights = torch.rand(shares, generator=draw, device=sizes.device)
    caps = torch.full((shares,), 48, dtype=torch.int32, device=sizes.device)
    return Work(lambda: ops.quota(tokens // sizes.keep, weights, caps), weight(weights, caps) + 4 * shares)


@case("compaction_index", "a fifth kept, eight prompts", "latency")
def _compaction_index(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    keep, slots = _kept(sizes, 8, tokens, draw)
    moved = weight(keep) + 8 * (9 * slots + 8 * tokens)
    return Work(lambda: ops.compaction_index(keep, slots, False), moved, tolerance=0)


@case("compact", "a fifth kept", "memory")
def _compact(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    return _compacted(sizes, 1, tokens, draw)


@case("compact", "a fifth kept, eight prompts", "memory")
def _compact_batch(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    return _compacted(sizes, 8, tokens, draw)


@case("take_columns", "a fifth grown to all", "memory")
def _grow(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    keep, slots = _kept(sizes, 1, tokens, draw)
    source = ops.compaction_index(keep, slots, False)[2]
    values = _states(sizes, draw, 1, slots, sizes.width)
    moved = weight(values, source) + tokens * sizes.width * values.element_size()
    return Work(lambda: ops.take_columns(values, source), moved, tolerance=0)


@case("greedy_diversity", "a ninth by cosine", "latency")
def _greedy_diversity(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    features, k = _states(sizes, draw, tokens, sizes.width), max(1, tokens // 9)
    moved, flops = weight(features) + 8 * k, 2 * tokens * tokens * sizes.width
    call = partial(ops.greedy_diversity, features, k)
    return Work(call, moved, flops, 1e-5, lambda chosen: _short_of_farthest(_distance(features), chosen))


@case("greedy_diversity", "a ninth by cosine and place", "latency")
def _greedy_fused(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    features, k = _states(sizes, draw, tokens, sizes.width), max(1, tokens // 9)
    xyz = torch.rand(tokens, 3, generator=draw, device=sizes.device)
    moved, flops = weight(features, xyz) + 8 * k, 2 * tokens * tokens * sizes.width

    def judge(chosen: torch.Tensor) -> torch.Tensor:
        place = torch.cdist(xyz.double(), xyz.double(), compute_mode="donot_use_mm_for_euclid_dist")
        fused = 0.5 * place / place[0].max() + 0.5 * _distance(features)
        return _short_of_farthest(fused, chosen, seeded=True) + (chosen[0] != 0)

    return Work(lambda: ops.greedy_diversity(features, k, xyz=xyz, seed=0), moved, flops, 1e-5, judge)


@case("greedy_dpp", "a ninth", "latency")
def _greedy_dpp(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    features, k = _states(sizes, draw, tokens, sizes.width), max(1, tokens // 9)
    quality = torch.randn(tokens, generator=draw, device=sizes.device)
    moved, flops = weight(features, quality) + 8 * k, 2 * tokens * tokens * sizes.width + tokens * k * k
    call = partial(ops.greedy_dpp, features, quality, k)
    return Work(call, moved, flops, 1e-4, partial(_short_of_largest, features, quality))


@case("nearest", "four neighbours of a fifth", "matrix")
def _nearest(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    keys, anchors = _states(sizes, draw, tokens, sizes.width // 4), _some(sizes, tokens, draw)
    moved, flops = weight(keys, anchors) + 48 * len(anchors), 2 * tokens * len(anchors) * keys.shape[1]
    call = partial(ops.nearest, keys, anchors, min(4, tokens))

    def judge(found: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        index, similarity = found
        cosine = _cosines(keys, anchors)
        best = cosine.topk(index.shape[1]).values
        own = cosine.gather(1, index.clamp_min(0))
        twice = (index.sort(1).values.diff(dim=1) == 0).any()
        return torch.maximum((best - own).abs().max(), (own - similarity).abs().max()) + twice

    return Work(call, moved, flops, 1e-5, judge)


@case("assign", "all to a fifth", "matrix")
def _assign(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    keys, anchors = _states(sizes, draw, tokens, sizes.width // 4), _some(sizes, tokens, draw)
    moved, flops = weight(keys, anchors) + 8 * tokens, 2 * tokens * len(anchors) * keys.shape[1]

    def judge(owner: torch.Tensor) -> torch.Tensor:
        cosine = _cosines(keys, anchors).T
        return (cosine.amax(1) - cosine.gather(1, owner[:, None]).squeeze(1)).max()

    return Work(partial(ops.assign, keys, anchors), moved, flops, 1e-5, judge)


@case("weighted_merge", "five tokens into each of a fifth", "memory")
def _weighted_merge(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    values, each = _states(sizes, draw, tokens, sizes.width), min(sizes.keep, tokens)
    order = torch.randperm(tokens, generator=draw, device=sizes.device)
    index = order[: tokens // each * each].view(-1, each)
    weights = torch.rand(index.shape, generator=draw, device=sizes.device)
    moved = index.numel() * sizes.width * values.element_size() * (1 + 1 / each) + weight(index, weights)
    call = partial(ops.weighted_merge, values, index, weights)
    return Work(call, int(moved), 2 * index.numel() * sizes.width, TOLERANCE[sizes.dtype])


@case("assigned_merge", "all into a fifth", "memory")
def _assigned_merge(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    values, count = _states(sizes, draw, tokens, sizes.width), max(1, tokens // sizes.keep)
    owner = torch.randint(count, (tokens,), generator=draw, device=sizes.device)
    weights = torch.rand(tokens, generator=draw, device=sizes.device)
    moved = weight(values, owner, weights) + count * sizes.width * values.element_size()
    call = partial(ops.assigned_merge, values, owner, weights, count)
    return Work(call, moved, 2 * tokens * sizes.width, TOLERANCE[sizes.dtype])


@case("softmax_merge", "all into a fifth", "matrix")
def _softmax_merge(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    values, keys = (_states(sizes, draw, tokens, width) for width in (sizes.width, sizes.width // 4))
    anchors = _some(sizes, tokens, draw)
    moved = weight(values, keys, anchors) + len(anchors) * sizes.width * values.element_size()
    flops = 2 * tokens * len(anchors) * (sizes.width + keys.shape[1])
    call = partial(ops.softmax_merge, values, keys, anchors, 0.1)
    return Work(call, moved, flops, TOLERANCE[sizes.dtype])


@case("attention_rows", "the last query", "memory")
def _last_query(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    return _rows(sizes, draw, (1, sizes.heads, 1), tokens, sizes.heads, sizes.head_dim)


@case("attention_rows", "class tokens of five crops", "memory")
def _class_tokens(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    heads = max(1, sizes.heads // 2)
    return _rows(sizes, draw, (5, heads, 1), max(1, tokens // 5), heads, sizes.head_dim // 2)


@case("attention_rows", "32 text queries, four to a key head", "memory")
def _text_queries(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    return _rows(sizes, draw, (1, sizes.heads, 32), tokens, max(1, sizes.heads // 4), sizes.head_dim)


@case("received_attention", "every query, causal", "matrix")
def _received_attention(sizes: Sizes, tokens: int, draw: torch.Generator) -> Work:
    query, key = (_states(sizes, draw, 1, sizes.heads, tokens, sizes.head_dim) for _ in range(2))
    stop = torch.arange(1, tokens + 1, device=sizes.device)[None]
    call = partial(ops.received_attention, query, key, sizes.head_dim**-0.5, stop=stop)
    # Every logit twice: for the denominators, then for the sums.
    flops = 2 * 2 * sizes.heads * sizes.head_dim * (tokens * (tokens + 1) // 2)
    return Work(call, weight(query, key, stop) + 4 * tokens, flops, _summed(sizes))


# --- inputs and judges -----------------------------------------------------------------------------------------------


def _states(sizes: Sizes, draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=draw, device=sizes.device).to(sizes.dtype)


def _rows(
    sizes: Sizes, draw: torch.Generator, asked: tuple[int, int, int], keys: int, key_heads: int, width: int
) -> Work:
    """Rows of so many queries ([B, H, n]) over all keys, mean over heads."""
    query = _states(sizes, draw, *asked, width)
    key = _states(sizes, draw, asked[0], key_heads, keys, width)
    call = partial(ops.attention_rows, query, key, width**-0.5)
    moved = weight(query, key) + 4 * asked[0] * asked[2] * keys
    return Work(call, moved, 2 * query.numel() * keys, _summed(sizes))


def _summed(sizes: Sizes) -> float:
    """Tolerance of what is added up and given in float32."""
    return TOLERANCE[torch.float32 if sizes.dtype == torch.float32 else torch.float16]


def _some(sizes: Sizes, tokens: int, draw: torch.Generator) -> torch.Tensor:
    """A fifth of the tokens, ascending."""
    order = torch.randperm(tokens, generator=draw, device=sizes.device)
    return order[: max(1, tokens // sizes.keep)].sort().values


def _kept(sizes: Sizes, batch: int, tokens: int, draw: torch.Generator) -> tuple[torch.Tensor, int]:
    """[B, L] flags of a fifth of the columns of every row, and how many that are."""
    slots = max(1, tokens // sizes.keep)
    order = torch.rand(batch, tokens, generator=draw, device=sizes.device).argsort(1)
    return order < slots, slots


def _compacted(sizes: Sizes, batch: int, tokens: int, draw: torch.Generator) -> Work:
    """Embeddings, positions of three axes and flags of visual columns of a batch."""
    keep, slots = _kept(sizes, batch, tokens, draw)
    index, valid, _ = ops.compaction_index(keep, slots, False)
    embeds = _states(sizes, draw, batch, tokens, sizes.width)
    positions = torch.arange(tokens, device=sizes.device).expand(3, batch, tokens).contiguous()
    visual = torch.rand(batch, tokens, generator=draw, device=sizes.device) < 0.9
    column = sizes.width * embeds.element_size() + 3 * 8 + 1
    moved = 2 * batch * slots * column + weight(index, valid)
    call = partial(ops.compact, embeds, index, valid, keep, positions, visual)
    return Work(call, moved, tolerance=0)


def _cosines(keys: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """[m, n] in float64."""
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    return unit[anchors] @ unit.T


def _distance(features: torch.Tensor) -> torch.Tensor:
    """[n, n] one minus the cosine, in float64."""
    return 1 - _cosines(features, torch.arange(len(features), device=features.device))


def _short_of_farthest(distance: torch.Tensor, chosen: torch.Tensor, seeded: bool = False) -> torch.Tensor:
    """By how much, at most, a chosen token is nearer to those before it than the farthest one was."""
    alone = distance.clone().fill_diagonal_(float("inf")).amin(1)
    short = torch.zeros_like(alone[0]) if seeded else alone.max() - alone[chosen[0]]
    running = distance[chosen[0]].clone()
    running[chosen[0]] = -1
    for token in chosen[1:]:
        short = torch.maximum(short, running.max() - running[token])
        running = torch.minimum(running, distance[token])
        running[token] = -1
    return short


def _short_of_largest(features: torch.Tensor, log_quality: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """By how much, at most, the logarithm of a chosen token's gain was below the largest."""
    similar = _cosines(features, torch.arange(len(features), device=features.device))
    factor = similar.new_zeros(len(similar), len(chosen))
    left, level = torch.ones_like(log_quality, dtype=torch.float64), 2 * log_quality.double()
    short = left.new_zeros(())
    for step, token in enumerate(chosen):
        gain = level + left.clamp_min(1e-300).log()
        short = torch.maximum(short, gain.max() - gain[token])
        row = (similar[token] - factor[:, :step] @ factor[token, :step]) / left[token].sqrt()
        factor[:, step] = row
        left = left - row.square()
        level = level.scatter(0, token[None], -float("inf"))
    return short
