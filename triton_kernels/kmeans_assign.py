"""The nearest centroid of every token, without the matrix of all distances.

A program holds a tile of tokens and walks over the centroids with a running maximum of ``x . c - |c|^2 / 2``, which is
largest where the Euclidean distance is smallest. Centroids are rounded to the points' element type first, the halved
squares of their lengths after that: products of both are exact in float32, and a token's centroid is truly the nearest
of those compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn.functional import pad

from vlm_budget.errors import KernelInputError

from ._heads import require_launchable, require_tokens
from ._launch import (
    FLOATS,
    Config,
    blocks,
    kernel,
    power_of_two,
    require_dtype,
    require_same_device,
    tl,
)

MOST_CLUSTERS = 4096
WIDEST = 128
"""Channels that the kernel takes; the reference takes any number."""
MOST_COLUMNS = 128
"""Centroids are padded to a multiple of it, which those of every configuration's tiles divide."""
ENTRIES = 2**22
"""Distances that the reference holds at a time."""


def kmeans_assign_reference(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.kmeans_assign`."""
    batch, heads, length, _ = points.shape
    rounded, half = rounded_centroids(points, centroids)
    rounded = rounded.float()
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=points.device)
    step = max(1, ENTRIES // max(half.numel(), 1))
    for first in range(0, length, step):
        gain = points[:, :, first : first + step].float() @ rounded.mT - half[:, :, None]
        gain = gain.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        labels[:, :, first : first + step] = gain.argmax(-1)
    return labels


def rounded_centroids(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids [B, H, C, D] in the points' element type, and [B, H, C] float32 halves of their squared lengths."""
    rounded = centroids.to(points.dtype)
    return rounded, rounded.float().square().sum(-1) / 2


def require_points(points: torch.Tensor, centroids: torch.Tensor) -> None:
    """Refuse what neither half can assign.

    Raises:
        KernelInputError: Shapes, element types, devices or numbers of clusters.
    """
    require_tokens(points=points, centroids=centroids)
    require_dtype((torch.float32,), centroids=centroids)
    require_same_device(points=points, centroids=centroids)
    batch, heads, _, width = points.shape
    clusters = centroids.shape[2]
    if centroids.shape != (batch, heads, clusters, width) or not 1 <= clusters <= MOST_CLUSTERS:
        raise KernelInputError(
            f"centroids must have shape [{batch}, {heads}, C, {width}], as the points have, with C from 1 to "
            f"{MOST_CLUSTERS}, got {list(centroids.shape)}"
        )


# fmt: off
def labelled(
    points, centroids, halves, labels, length, padded, heads, width, sample_stride, head_stride, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):
    # fmt: on
    """The nearest centroids of one tile of tokens of one head."""
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    column = tl.arange(0, COLUMNS)
    inside = first + row < length
    points += (group // heads) * sample_stride + (group % heads) * head_stride + first * row_stride
    cells = inside[:, None] & (channel < width)[None, :]
    mine = tl.load(points + row[:, None] * row_stride + channel[None, :], mask=cells, other=0.0)
    centroids += group * padded * WIDTH
    halves += group * padded
    # A maximum per column of the tile, and across the columns only once at the end: fewer steps per pair.
    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    found = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, padded, COLUMNS):
        theirs = tl.load(centroids + (start + column)[None, :] * WIDTH + channel[:, None])
        half = tl.load(halves + start + column)
        if WIDEN:  # the interpreter's own product misreads bfloat16
            product = tl.dot(mine.to(tl.float32), theirs.to(tl.float32), input_precision=PRECISION)
        else:
            product = tl.dot(mine, theirs, input_precision=PRECISION)
        gain = product - half[None, :]
        better = gain > best  # never, where it is not a number
        best = tl.where(better, gain, best)
        found = tl.where(better, start, found)
    highest = tl.max(best, 1)
    label = tl.where(best == highest[:, None], found + column[None, :], padded)
    tl.store(labels + group * length + first + row, tl.min(label, 1), mask=inside)


_SIZES = ("length", "padded", "heads")
_halves = kernel(
    Config(warps=8, stages=3, meta={"ROWS": 128, "COLUMNS": 64}),
    Config(warps=4, stages=3, meta={"ROWS": 64, "COLUMNS": 64}),
    Config(warps=4, stages=2, meta={"ROWS": 64, "COLUMNS": 128}),
    Config(warps=8, stages=2, meta={"ROWS": 128, "COLUMNS": 128}),
    key=("width",),
    sizes=_SIZES,
)(labelled)
_singles = kernel(Config(warps=4, stages=1, meta={"ROWS": 64, "COLUMNS": 16}), sizes=_SIZES)(labelled)
"""For float32, whose products take three passes of tensor cores: 32 columns spill registers on sm_80."""


def kmeans_assign_triton(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.kmeans_assign`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_dtype(FLOATS, points=points)
    require_points(points, centroids)
    require_launchable(points)
    batch, heads, length, width = points.shape
    if width > WIDEST:
        raise KernelInputError(
            f"the kernel takes heads of up to {WIDEST} channels, got {width}. Set VLM_BUDGET_KERNELS=auto, which takes "
            "the reference for more."
        )
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=points.device)
    if not labels.numel():
        return labels
    rounded, half = rounded_centroids(points, centroids)
    whole = power_of_two(width, 16)
    behind = -centroids.shape[2] % MOST_COLUMNS
    rounded = pad(rounded, (0, whole - width, 0, behind)).contiguous()
    half = pad(half, (0, behind), value=torch.inf)  # never the nearest
    launched = _singles if points.dtype == torch.float32 else _halves
    launched.launch(
        lambda meta: (blocks(length, meta["ROWS"]), batch * heads),
        *(points, rounded, half, labels, length, half.shape[2], heads, width, *points.stride()[:3]),
        WIDTH=whole,
        PRECISION="tf32x3" if points.dtype == torch.float32 else "ieee",
        WIDEN=launched.interpreted,
    )
    return labels


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    for dtype in FLOATS:
        for width in (16, 64, 128):
            points, centroids = torch.zeros(1, 2, 300, width, dtype=dtype), torch.zeros(1, 2, 10, width)
            yield f"{width} wide, {dtype}", partial(kmeans_assign_triton, points, centroids)
