"""Cosine similarity of keys without the map of all pairs: the nearest tokens of anchors, and the anchor of every token.

Tokens may come in groups (the crops of an image, the frames of a video) that do not see each other: ``among`` lists the
tokens group by group, ``sizes`` says how many each group has, and ``shares`` how many of the anchors, which come in the
same order.

Nearest: a program multiplies a tile of anchors with a block of tokens, and takes the most similar ones out of its
registers, one after the other; a second launch merges the lists of the blocks. Memory is the number of anchors times
that of blocks times that of neighbours. Assign: a program holds a tile of tokens and walks over the anchors with a
running maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.nn.functional import normalize

from vlm_budget.errors import KernelInputError

from ._keys import aligned, channel_block, cosines, lengths_of
from ._launch import (
    FLOATS,
    Config,
    blocks,
    kernel,
    require_dtype,
    require_int32,
    require_rows,
    require_same_device,
    require_shape,
    tl,
)

ANCHORS = 16
TOKENS = 256
OWNED = 64
"""Anchors and tokens of a tile of nearest, tokens of a tile of assign."""
MOST_NEIGHBOURS = 64
"""Beyond, taking them one after the other is slower than sorting."""
ENTRIES = 2**22
"""Similarities that a reference holds at a time."""


# --- references ------------------------------------------------------------------------------------------------------


def nearest_reference(
    keys: torch.Tensor,
    anchors: torch.Tensor,
    count: int,
    among: torch.Tensor,
    sizes: Sequence[int],
    shares: Sequence[int],
    exclude_self: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is right; see :func:`vlm_budget.ops.nearest`."""
    index = anchors.new_full((len(anchors), count), -1)
    similarity = torch.full(index.shape, -torch.inf, device=keys.device)
    start = 0
    for tokens, share in zip(among.split(list(sizes)), shares, strict=True):
        unit, step = normalize(keys[tokens].float(), dim=-1), max(1, ENTRIES // max(len(tokens), 1))
        for first in range(start, start + share, step):
            rows = slice(first, min(first + step, start + share))
            cosine = normalize(keys[anchors[rows]].float(), dim=-1) @ unit.T
            if exclude_self:
                cosine = cosine.masked_fill_(anchors[rows, None] == tokens, -torch.inf)
            cosine = cosine.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            best, place = _stable_topk(cosine, min(count, len(tokens)))
            similarity[rows, : best.shape[1]] = best
            index[rows, : best.shape[1]] = torch.where(best > -torch.inf, tokens[place], -1)
        start += share
    return index, similarity


def _stable_topk(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest of every row, descending; ties go to the lower index, which topk alone does not promise."""
    best, place = scores.topk(count, -1)
    if not count:
        return best, place
    # Where the last of them has equals that were left out, which of these were taken is arbitrary.
    arbitrary = (scores >= best[:, -1:]).sum(-1) > count
    if arbitrary.any():
        rows = arbitrary.nonzero().flatten()
        place[rows] = scores[rows].argsort(dim=-1, descending=True, stable=True)[:, :count]
    place = place.sort(dim=-1).values
    best, order = scores.gather(-1, place).sort(dim=-1, descending=True, stable=True)
    return best, place.gather(-1, order)


def assign_reference(
    keys: torch.Tensor, anchors: torch.Tensor, among: torch.Tensor, sizes: Sequence[int], shares: Sequence[int]
) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.assign`."""
    owner = torch.full(among.shape, -1, dtype=torch.long, device=keys.device)
    start = at = 0
    for tokens, share in zip(among.split(list(sizes)), shares, strict=True):
        own, step = anchors[start : start + share], max(1, ENTRIES // max(share, 1))
        unit = normalize(keys[own].float(), dim=-1)
        for first in range(0, len(tokens) if share else 0, step):
            part = tokens[first : first + step]
            cosine = (unit @ normalize(keys[part].float(), dim=-1).T).nan_to_num_(nan=-2.0)
            cosine = cosine.masked_fill_(own[:, None] == part, torch.inf)
            owner[at + first : at + first + len(part)] = start + cosine.argmax(0)
        start, at = start + share, at + len(tokens)
    return owner


# --- kernels ---------------------------------------------------------------------------------------------------------


@kernel(Config(warps=4, stages=3), sizes=("anchor_count", "token_count", "count", "slots", "exclude"))
def _candidates(
    keys,
    lengths,
    anchors,
    among,
    tiles,
    found,
    similarity,
    anchor_count,
    token_count,
    width,
    stride,
    count,
    slots,
    exclude,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The most similar tokens of one block, for every anchor of one tile."""
    if tiles is None:  # one group
        slot = tl.program_id(0) * TILE + tl.arange(0, TILE)
        real = slot < anchor_count
        first = tl.program_id(1) * BLOCK
        end = token_count
    else:
        tile = tiles + tl.program_id(0) * 4
        slot = tl.load(tile) + tl.arange(0, TILE)
        real = slot < tl.load(tile + 1)
        first = tl.load(tile + 2) + tl.program_id(1) * BLOCK
        end = tl.load(tile + 3)
    at = first + tl.arange(0, BLOCK)
    inside = at < end
    anchor = tl.load(anchors + slot, mask=real, other=0)
    token = tl.load(among + at, mask=inside, other=0)
    cosine = cosines(keys, lengths, anchor, token, real, inside, width, stride, TILE, BLOCK, BLOCK_C, WIDEN)
    valid = inside[None, :] & (cosine == cosine) & ((anchor[:, None] != token[None, :]) | (exclude == 0))
    cosine = tl.where(valid, cosine, float("-inf"))
    place = tl.arange(0, BLOCK)
    row = slot.to(tl.int64) * slots + tl.program_id(1) * count
    for rank in range(count):
        best, taken = tl.max(cosine, 1, return_indices=True)
        tl.store(similarity + row + rank, best, mask=real)
        tl.store(found + row + rank, first + taken, mask=real)
        cosine = tl.where(place[None, :] == taken[:, None], float("-inf"), cosine)


@kernel(Config(warps=1), sizes=("count", "slots"))
def _merged(found, similarity, among, index, best, count, slots, BLOCK: tl.constexpr):
    """The most similar tokens of one anchor, from those of every block; earlier candidates win ties."""
    row = tl.program_id(0).to(tl.int64)
    previous = tl.full((), float("inf"), tl.float32)
    place = tl.full((), -1, tl.int32)
    for rank in range(count):
        top = tl.full((), float("-inf"), tl.float32)
        where = tl.full((), 0, tl.int32)
        for start in range(0, slots, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(similarity + row * slots + at, mask=at < slots, other=float("-inf"))
            behind = (value < previous) | ((value == previous) & (at > place))
            highest, first = tl.max(tl.where(behind, value, float("-inf")), 0, return_indices=True)
            where = tl.where(highest > top, start + first, where)
            top = tl.maximum(top, highest)
        any_left = top > float("-inf")
        listed = tl.load(found + row * slots + where)
        token = tl.load(among + tl.where(any_left, listed, 0), mask=any_left, other=-1)
        tl.store(index + row * count + rank, token)
        tl.store(best + row * count + rank, top)
        previous = top
        place = where


@kernel(Config(warps=4), sizes=("anchor_count", "token_count"))
def _owners(
    keys,
    lengths,
    anchors,
    among,
    tiles,
    owner,
    anchor_count,
    token_count,
    width,
    stride,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The most similar anchor of every token of one tile."""
    if tiles is None:  # one group
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < token_count
        begin = 0
        end = anchor_count
    else:
        tile = tiles + tl.program_id(0) * 4
        at = tl.load(tile) + tl.arange(0, BLOCK)
        inside = at < tl.load(tile + 1)
        begin = tl.load(tile + 2)
        end = tl.load(tile + 3)
    token = tl.load(among + at, mask=inside, other=0)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    chosen = tl.full((BLOCK,), -1, tl.int32)
    for start in range(begin, end, TILE):
        slot = start + tl.arange(0, TILE)
        real = slot < end
        anchor = tl.load(anchors + slot, mask=real, other=0)
        cosine = cosines(keys, lengths, token, anchor, inside, real, width, stride, BLOCK, TILE, BLOCK_C, WIDEN)
        cosine = tl.where(cosine == cosine, cosine, -2.0)
        cosine = tl.where(token[:, None] == anchor[None, :], float("inf"), cosine)
        cosine = tl.where(real[None, :], cosine, float("-inf"))
        highest, first = tl.max(cosine, 1, return_indices=True)
        chosen = tl.where(highest > best, start + first, chosen)
        best = tl.maximum(best, highest)
    tl.store(owner + at, chosen.to(tl.int64), mask=inside)


def _tiles(
    of: Sequence[int], against: Sequence[int], size: int, device: torch.device
) -> tuple[int, torch.Tensor | None]:
    """How many tiles, and [tiles, 4] int32: where each begins, where its group ends, where what it meets lies.

    A single group needs no table: the host copies one for several groups alone, and a CUDA graph cannot hold that.
    """
    if len(of) == 1:
        return blocks(of[0], size), None
    rows, start, other = [], 0, 0
    for own, met in zip(of, against, strict=True):
        rows += [[first, start + own, other, other + met] for first in range(start, start + own, size)]
        start, other = start + own, other + met
    # Towards CUDA alone: other devices read the host's memory late, when this temporary is gone.
    tiles = torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, 4)
    return len(rows), tiles.to(device, non_blocking=device.type == "cuda")


# --- wrappers --------------------------------------------------------------------------------------------------------


def _check(
    keys: torch.Tensor, anchors: torch.Tensor, among: torch.Tensor, sizes: Sequence[int], shares: Sequence[int]
) -> None:
    require_dtype(FLOATS, keys=keys)
    require_dtype((torch.int64,), anchors=anchors, among=among)
    require_same_device(keys=keys, anchors=anchors, among=among)
    require_shape((None, None), keys=keys)
    require_int32(keys=len(keys), width=keys.shape[1], anchors=anchors.numel(), among=among.numel())
    require_shape((sum(shares),), anchors=anchors)
    require_shape((sum(sizes),), among=among)
    require_rows(keys=keys, anchors=anchors, among=among)
    if len(sizes) != len(shares) or min(*sizes, *shares, 0) < 0:
        raise KernelInputError(
            f"sizes and shares must name the same groups, by counts of at least 0, got {sizes} and {shares}"
        )


def nearest_triton(
    keys: torch.Tensor,
    anchors: torch.Tensor,
    count: int,
    among: torch.Tensor,
    sizes: Sequence[int],
    shares: Sequence[int],
    exclude_self: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel; see :func:`vlm_budget.ops.nearest`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    _check(keys, anchors, among, sizes, shares)
    if not 0 <= count <= MOST_NEIGHBOURS:
        raise KernelInputError(
            f"the kernel finds up to {MOST_NEIGHBOURS} neighbours, got count={count}. Set VLM_BUDGET_KERNELS=auto, "
            "which takes the reference for more."
        )
    index = torch.empty(len(anchors), count, dtype=torch.int64, device=keys.device)
    similarity = torch.empty(index.shape, dtype=torch.float32, device=keys.device)
    if not index.numel():
        return index, similarity
    if not len(among):
        return index.fill_(-1), similarity.fill_(-torch.inf)
    block = TOKENS // 2 if keys.dtype == torch.float32 else TOKENS  # no tensor cores: operands lie in registers
    most = blocks(max(sizes), block)
    require_int32(candidates=most * count)
    count_tiles, tiles = _tiles(shares, sizes, ANCHORS, keys.device)
    keys, anchors, among = aligned(keys), aligned(anchors), aligned(among)
    candidates = torch.empty(len(anchors), most * count, dtype=torch.float32, device=keys.device)
    found = torch.empty(candidates.shape, dtype=torch.int32, device=keys.device)
    _candidates.launch(
        (count_tiles, most),
        keys,
        lengths_of(keys),
        anchors,
        among,
        tiles,
        found,
        candidates,
        len(anchors),
        len(among),
        keys.shape[1],
        keys.stride(0),
        count,
        most * count,
        int(exclude_self),
        TILE=ANCHORS,
        BLOCK=block,
        BLOCK_C=channel_block(keys.dtype),
        WIDEN=_candidates.interpreted,
    )
    _merged.launch((len(anchors),), found, candidates, among, index, similarity, count, most * count, BLOCK=512)
    return index, similarity


def assign_triton(
    keys: torch.Tensor, anchors: torch.Tensor, among: torch.Tensor, sizes: Sequence[int], shares: Sequence[int]
) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.assign`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    _check(keys, anchors, among, sizes, shares)
    owner = torch.empty(len(among), dtype=torch.int64, device=keys.device)
    if not len(among):
        return owner
    count_tiles, tiles = _tiles(sizes, shares, OWNED, keys.device)
    keys, anchors, among = aligned(keys), aligned(anchors), aligned(among)
    _owners.launch(
        (count_tiles,),
        keys,
        lengths_of(keys),
        anchors,
        among,
        tiles,
        owner,
        len(anchors),
        len(among),
        keys.shape[1],
        keys.stride(0),
        TILE=ANCHORS,
        BLOCK=OWNED,
        BLOCK_C=channel_block(keys.dtype),
        WIDEN=_owners.interpreted,
    )
    return owner


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    anchors, among = torch.arange(10), torch.arange(64)
    for dtype in FLOATS:
        for width in (1024, 1001):
            keys = torch.zeros(64, width, dtype=dtype)
            for sizes, shares in (([64], [10]), ([60, 4], [8, 2])):
                label = f"{len(sizes)} groups, {width} wide, {dtype}"
                yield f"nearest, {label}", partial(nearest_triton, keys, anchors, 32, among, sizes, shares, True)
                yield f"owners, {label}", partial(assign_triton, keys, anchors, among, sizes, shares)
