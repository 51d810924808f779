"""Max-min diversity: each next token is the one farthest from its nearest chosen one.

Each choice depends on the one before, so one program per group of tokens makes all of them in one launch, and the host
is never asked. What a step needs of the similarities is one row, which lies in the L2 cache for the sizes that vision
towers make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from vlm_budget.errors import KernelInputError

from ._cosines import CosineRows, inner_products, require_choices, require_groups
from ._launch import (
    FLOATS,
    Config,
    blocks,
    device_function,
    kernel,
    power_of_two,
    require_dtype,
    require_same_device,
    require_shape,
    tl,
)

LEAST_REACH = 1e-6
"""The least that coordinates are divided by: all tokens may lie in one place."""

MOST = 16384
"""Tokens per group whose running minimum fits into the registers of one program."""

MOST_DIMENSIONS = 4

# --- reference -------------------------------------------------------------------------------------------------------


def apart(xyz: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[1, n] Euclidean distance of the point at ``index`` ([1] int64) to all of ``xyz`` ([n, d] float32 or wider).

    A distance that is no finite number counts as 0: what has no coordinates is far from nothing.
    """
    squared = (xyz - xyz.index_select(0, index)).square().unbind(-1)
    total = squared[0]
    for more in squared[1:]:
        total = total + more
    distance = total.sqrt()[None]
    return torch.where(distance < float("inf"), distance, 0.0)


def max_min_reference(
    rows: CosineRows | None,
    k: int,
    *,
    xyz: torch.Tensor | None = None,
    weight: float = 0.5,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """What is right for one group; see :func:`vlm_budget.ops.greedy_diversity`.

    A running minimum makes a step O(n), O(n C) where rows are not kept.

    Args:
        rows: Similarities, or None where coordinates alone count.
        k: How many, at most n.
        xyz: [n, d] coordinates, or None.
        weight: Share of the coordinates where both count.
        seed: [] int64, the first; None for the token whose nearest neighbour is farthest.

    Returns:
        [k] int64 indices in the order of choice.
    """
    if xyz is not None:
        xyz = xyz.to(torch.promote_types(xyz.dtype, torch.float32))
    if seed is not None:
        size = len(xyz) if rows is None else rows.size  # type: ignore[arg-type]
        first = seed.clamp(0, size - 1)
        distance = (torch.arange(size, device=seed.device) == first).float()[None]
    else:
        assert rows is not None
        distance = rows.nearest()[None]
    share = None
    chosen = torch.empty(1, k, dtype=torch.long, device=distance.device)
    for step in range(k):
        index = torch.argmax(distance, 1, keepdim=True, out=chosen[:, step : step + 1])[0]
        if rows is not None:
            found = 1 - rows.row(index)
        if xyz is not None:
            spatial = apart(xyz, index)
            if share is None:
                reach = spatial.amax(1, keepdim=True).clamp_min(LEAST_REACH)
                share = torch.full_like(reach, weight) / reach
            found = spatial if rows is None else found * (1 - weight) + spatial * share
        distance = torch.minimum(distance, found, out=distance) if step else found
        distance.index_fill_(1, index, float("-inf"))
    return chosen[0]


def greedy_diversity_reference(
    features: torch.Tensor | None, xyz: torch.Tensor | None, seed: torch.Tensor | None, k: int, weight: float
) -> torch.Tensor:
    """What is right for [G, n, C] features, [G, n, d] coordinates and [G] seeds: every group for itself."""
    given = features if features is not None else xyz
    assert given is not None
    found = [
        max_min_reference(
            None if features is None else CosineRows(features[group]),
            k,
            xyz=None if xyz is None else xyz[group],
            weight=weight,
            seed=None if seed is None else seed[group],
        )
        for group in range(len(given))
    ]
    return torch.stack(found) if found else torch.empty(0, k, dtype=torch.long, device=given.device)


# --- kernels ---------------------------------------------------------------------------------------------------------


@kernel(Config(warps=4, meta={"ROWS": 8, "BLOCK": 512}), sizes=("n", "group_stride", "row_stride"))
def _nearest(products, scale, nearest, n, group_stride, row_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The distance ``1 - cos`` of some tokens to the nearest other one; with scales, products become cosines in place.

    Once for all, so that a step has neither scales to load nor registers to keep them in.
    """
    parts = tl.cdiv(n, ROWS)
    group = (tl.program_id(0) // parts).to(tl.int64)
    tokens = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    known = tokens < n
    rows = products + group * group_stride + tokens.to(tl.int64) * row_stride
    if scale is not None:
        scale += group * n
        own = tl.load(scale + tokens, mask=known, other=0.0)[:, None]
    highest = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n
        both = known[:, None] & inside[None, :]
        found = tl.load(rows[:, None] + at[None, :], mask=both, other=0.0)
        if scale is not None:
            others = tl.load(scale + at, mask=inside, other=0.0)[None, :]
            # 0 for rows without a finite direction, whatever their products are.
            found = tl.where(tl.where(own == 0.0, 0.0, others) == 0.0, 0.0, found * own * others)
            tl.store(rows[:, None] + at[None, :], found, mask=both)
        another = inside[None, :] & (at[None, :] != tokens[:, None])
        highest = tl.maximum(highest, tl.where(another, found, float("-inf")))
    tl.store(nearest + group * n + tokens, 1.0 - tl.max(highest, 1), mask=known)


@device_function
def _apart(xyz, index, at, inside, n, DIMENSIONS: tl.constexpr):
    """Euclidean distances from one point to all; not finite counts as 0."""
    total = tl.zeros(at.shape, tl.float32)
    for dimension in tl.static_range(DIMENSIONS):
        values = xyz + dimension * n
        delta = tl.load(values + at, mask=inside, other=0.0) - tl.load(values + index)
        total += delta * delta
    distance = tl.sqrt_rn(total)
    return tl.where(distance < float("inf"), distance, 0.0)


def _farthest(cosines, first, chosen, n, k, group_stride, row_stride, BLOCK: tl.constexpr, ROOMY: tl.constexpr):
    """All choices of one group by cosine; the running minimum stays in registers.

    Per step: one row of cosines, one minimum, one reduction to value and index. Where there is room for it, rows are
    read without masks: of those, too few fit into predicates to load all at once.
    """
    group = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    within = tl.minimum(at, n - 1)
    cosines += group * group_stride
    chosen += group * k
    index = tl.load(first + group).to(tl.int32)
    tl.store(chosen, index.to(tl.int64))
    running = tl.where(inside, float("inf"), float("-inf"))
    for step in range(1, k):
        row = cosines + index.to(tl.int64) * row_stride
        if ROOMY:
            found = tl.load(row + within)
        else:
            found = tl.load(row + at, mask=inside, other=0.0)
        running = tl.where(at == index, float("-inf"), tl.minimum(running, 1.0 - found))
        index = tl.argmax(running, 0)
        tl.store(chosen + step, index.to(tl.int64))


# Warps by padded size: 8 tokens per thread, and 16 where more threads would not be faster or do not exist.
_FARTHEST = {
    block: kernel(Config(warps=warps, meta={"BLOCK": block}), sizes=("n", "k", "group_stride", "row_stride"))(_farthest)
    for block, warps in ((1024, 4), (2048, 16), (4096, 16), (8192, 16), (16384, 32))
}


def _farthest_in_space(
    cosines, xyz, first, running, chosen, n, k, group_stride, row_stride, weight, rest,
    BLOCK: tl.constexpr, DIMENSIONS: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """All choices of one group by coordinates, and by cosine where there are such.

    Coordinates leave no registers for the running minimum of many tokens: it lies in scratch memory.
    """
    group = tl.program_id(0).to(tl.int64)
    running += group * n
    xyz += group * n * DIMENSIONS
    chosen += group * k
    index = tl.load(first + group).to(tl.int32)
    tl.store(chosen, index.to(tl.int64))
    share = weight
    if cosines is not None:
        cosines += group * group_stride
        reach = tl.full((BLOCK,), LEAST, tl.float32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            reach = tl.maximum(reach, tl.where(inside, _apart(xyz, index, at, inside, n, DIMENSIONS), 0.0))
        share = tl.div_rn(weight, tl.max(reach, 0))
    for step in range(1, k):
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        place = tl.full((BLOCK,), 0, tl.int32) + n
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < n
            found = _apart(xyz, index, at, inside, n, DIMENSIONS)
            if cosines is not None:
                cosine = tl.load(cosines + index.to(tl.int64) * row_stride + at, mask=inside, other=0.0)
                found = (1.0 - cosine) * rest + found * share
            found = tl.minimum(tl.load(running + at, mask=inside, other=float("-inf")), found)
            found = tl.where(at == index, float("-inf"), found)
            tl.store(running + at, found, mask=inside)
            better = found > best  # strictly: the earlier block wins ties
            best = tl.where(better, found, best)
            place = tl.where(better, at, place)
        index = tl.min(tl.where(best == tl.max(best, 0), place, n), 0)
        tl.store(chosen + step, index.to(tl.int64))
        tl.debug_barrier()  # the next step may read what other threads wrote


_FARTHEST_IN_SPACE = {
    block: kernel(Config(warps=warps, meta={"BLOCK": block}), sizes=("n", "k", "group_stride", "row_stride"))(
        _farthest_in_space
    )
    for block, warps in ((1024, 8), (4096, 16))
}


# --- wrappers --------------------------------------------------------------------------------------------------------


def greedy_diversity_triton(
    features: torch.Tensor | None, xyz: torch.Tensor | None, seed: torch.Tensor | None, k: int, weight: float
) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.greedy_diversity`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    given = features if features is not None else xyz
    if given is None or (seed is None and xyz is not None):
        raise KernelInputError("give features, or xyz with a seed, or both: without a seed, features choose the first")
    for name, tensor in (("features", features), ("xyz", xyz)):
        if tensor is not None:
            require_groups(name, tensor)
    groups, n = given.shape[:2]
    if xyz is not None:
        require_shape((groups, n, None), xyz=xyz)
        if not 1 <= xyz.shape[-1] <= MOST_DIMENSIONS:
            raise KernelInputError(f"xyz must have 1 to {MOST_DIMENSIONS} coordinates, got shape {list(xyz.shape)}")
    require_same_device(features=features, xyz=xyz, seed=seed)
    if seed is not None:
        require_dtype((torch.int64, torch.int32), seed=seed)
        require_shape((groups,), seed=seed)
    require_choices(groups, n, k)
    if n > MOST:
        raise KernelInputError(
            f"the kernel chooses among at most {MOST} tokens per group, got {n}. Split them, or set "
            "VLM_BUDGET_KERNELS=auto or =reference."
        )
    chosen = torch.empty(groups, k, dtype=torch.int64, device=given.device)
    if not chosen.numel():
        return chosen
    cosines, nearest = (None, None) if features is None else _cosines(features, seed is None)
    strides = cosines.stride()[:2] if cosines is not None else (0, 0)
    # New and of one type whatever was given, so that one compiled kernel serves all.
    first = nearest.argmax(1) if seed is None else seed.clamp(0, n - 1).long()  # type: ignore[union-attr]
    if xyz is None:
        block = power_of_two(n, min(_FARTHEST))
        _FARTHEST[block].launch((groups,), cosines, first, chosen, n, k, *strides, ROOMY=block <= 4096)
        return chosen
    planes = _planes(xyz)
    running = torch.full((groups, n), float("inf"), dtype=torch.float32, device=given.device)
    block = next((size for size in _FARTHEST_IN_SPACE if n <= size), max(_FARTHEST_IN_SPACE))
    _FARTHEST_IN_SPACE[block].launch(
        (groups,), cosines, planes, first, running, chosen, n, k, *strides, float(weight), 1.0 - weight,
        DIMENSIONS=planes.shape[1], LEAST=LEAST_REACH,
    )  # fmt: skip
    return chosen


def _cosines(features: torch.Tensor, rule: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[G, n, n] cosines, and [G, n] distances to the nearest other token if the seed ``rule`` asks for them."""
    products, scale = inner_products(features)
    if scale is None and not rule:
        return products, None
    groups, n = products.shape[:2]
    nearest = torch.empty(groups, n, dtype=torch.float32, device=products.device)
    strides = products.stride()[:2]
    _nearest.launch(lambda meta: (groups * blocks(n, meta["ROWS"]),), products, scale, nearest, n, *strides)
    return products, nearest


def _planes(xyz: torch.Tensor) -> torch.Tensor:
    """[G, 3 or 4, n] float32 coordinates, always new: zeros for those that are not there, which change no distance."""
    groups, n, dimensions = xyz.shape
    planes = torch.empty(groups, max(dimensions, 3), n, dtype=torch.float32, device=xyz.device)
    planes[:, :dimensions].copy_(xyz.transpose(1, 2))
    planes[:, dimensions:].zero_()
    return planes


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every launch there is, for ``make kernels-compile``."""

    def call(n: int, dtype: torch.dtype | None, dimensions: int = 0, seeded: bool = False) -> Callable[[], object]:
        # Without memory: nothing is computed where nothing is launched.
        features = None if dtype is None else torch.empty(1, n, 64, dtype=dtype, device="meta")
        xyz = torch.empty(1, n, dimensions, device="meta") if dimensions else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if seeded else None
        return lambda: greedy_diversity_triton(features, xyz, seed, 64, 0.5)

    for n in _FARTHEST:
        for dtype in FLOATS:
            for seeded in (False, True):
                yield f"cosine, {n} tokens, {dtype}{', seed' if seeded else ''}", call(n, dtype, seeded=seeded)
    for n in _FARTHEST_IN_SPACE:
        for dimensions in range(1, MOST_DIMENSIONS + 1):
            yield f"{dimensions} coordinates, {n} tokens", call(n, None, dimensions, seeded=True)
            for dtype in FLOATS:
                yield f"fused with {dimensions}, {n} tokens, {dtype}", call(n, dtype, dimensions, seeded=True)
