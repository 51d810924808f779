"""Where visual tokens are.

A prompt (one batch row) holds *items*: images and videos, in the order of the text. An item is made of *partitions*,
each a grid of tokens over a region of the source: the thumbnail and the crops of an any-resolution image, the tiles of
a tiled one, the frames of a video. The layout is computed by the family from the processor's inputs alone, by the
model's own packing code, so row ends, unpadding and tile order are exact.

The torch import is for annotations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PartitionKind = Literal["image", "thumbnail", "crop", "frame"]
Modality = Literal["image", "video"]


@dataclass(frozen=True)
class Partition:
    """One grid of tokens over a region of the source image or frame.

    Attributes:
        kind: ``"image"`` (the whole picture at its only scale), ``"thumbnail"`` (the whole picture beside crops),
            ``"crop"`` or ``"frame"``.
        rows: Grid height in tokens, padding included.
        cols: Grid width in tokens, padding included.
        box: ``(left, top, right, bottom)`` of the grid in the source, whose own corners are (0, 0) and (1, 1). A crop
            that reaches into padding has a box that leaves [0, 1].
        time: Index of the frame (or of the first of the merged frames) within a video; 0 for images.
    """

    kind: PartitionKind
    rows: int
    cols: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    time: int = 0


@dataclass(frozen=True, eq=False)
class VisualItem:
    """The tokens of one image or video, in the order the language model sees them.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        partitions: The grids the tokens come from. A partition whose tokens were all unpadded away stays listed.
        partition: [n] int64 (CPU), index into ``partitions``; -1 for separators (newline tokens).
        patch: [n] int64 (CPU), ``row * cols + col`` within the partition's grid; -1 for separators.
        line: [n] int64 (CPU), for tokens of a mosaic the index of the text-line they stand in, which the separator at
            the line's end shares; -1 where no separator follows.
        resampled: Tokens were interpolated between patches behind the projector. Each is named after the patch nearest
            to its centre, but is not that patch's projection.
        picture: Height and width of the picture in pixels, where the model is told.
    """

    modality: Modality
    partitions: tuple[Partition, ...]
    partition: torch.Tensor
    patch: torch.Tensor
    line: torch.Tensor
    resampled: bool = False
    picture: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Number of tokens, separators included."""
        return int(self.partition.shape[0])

    @property
    def frames(self) -> int:
        """Frames of a video; a picture counts as one."""
        return len(self.partitions) if self.modality == "video" else 1

    @cached_property
    def candidates(self) -> torch.Tensor:
        """[m] int64, positions in the item of the tokens that show something: no separators, no padding."""
        return (self.partition >= 0).nonzero().flatten()

    @cached_property
    def separators(self) -> torch.Tensor:
        """[n - m] int64, positions in the item of the separator (newline) tokens."""
        return (self.partition < 0).nonzero().flatten()

    @cached_property
    def place(self) -> torch.Tensor:
        """[n] int64, the place of every token among those of all grids, grid after grid; any for separators."""
        starts = self.partition.new_tensor([0, *(grid.rows * grid.cols for grid in self.partitions)]).cumsum(0)
        return (starts[self.partition] + self.patch).clamp_min(0)

    @cached_property
    def shown(self) -> list[int]:
        """Candidates of every partition."""
        counts: list[int] = self.partition[self.candidates].bincount(minlength=len(self.partitions)).tolist()
        return counts


@dataclass(frozen=True)
class VisualLayout:
    """All items of a batch.

    Attributes:
        rows: Per batch row, its items in the order of their tokens. A row without images is empty.
    """

    rows: tuple[tuple[VisualItem, ...], ...]

    @property
    def total(self) -> int:
        """Visual tokens in the whole batch."""
        return sum(item.size for row in self.rows for item in row)

    def row_sizes(self) -> list[list[int]]:
        """Token counts per row and item."""
        return [[item.size for item in row] for row in self.rows]


def group_rows(items: Sequence[VisualItem], counts: Sequence[int]) -> list[list[VisualItem]] | None:
    """Hand a flat list of items out to rows whose visual token counts are known.

    Args:
        items: Items in placeholder order over the batch.
        counts: Visual tokens of the same modality per row.

    Returns:
        Items per row, or None when no split fits.
    """
    rows: list[list[VisualItem]] = []
    queue = list(items)
    for count in counts:
        row: list[VisualItem] = []
        while count > 0 and queue:
            count -= queue[0].size
            row.append(queue.pop(0))
        if count:
            return None
        rows.append(row)
    return None if queue else rows
