"""What a drawing of kept tokens shows, and where: one panel per partition, crops as they lie in the picture.

Plain numbers; :mod:`vlm_budget.picture` paints them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layout import Partition, VisualItem
    from .report import KeptItem

NO_TOKEN, DROPPED, KEPT = 0, 1, 2
GAP, CAPTION = 12, 28
# Pixels along the long side: the picture and its thumbnail, a picture that is one panel, all crops, a frame.
_ASIDE, _ALONE, _MOSAIC, _FRAME = 330, 640, 640, 260
_SMALLEST_CELL, _FRAMES_PER_LINE = 7, 5


@dataclass(frozen=True)
class Panel:
    """One partition on the page.

    Attributes:
        partition: What it shows.
        cells: One of ``NO_TOKEN``, ``DROPPED``, ``KEPT`` per cell of the grid, row by row.
        name: ``"thumbnail"``, ``"crop 3"``, …
        counts: Tokens kept of tokens there, such as ``"12/36"``.
        cell: Width and height of a cell in pixels.
        left: Where the panel begins, in pixels.
        top: Where the panel begins, in pixels.
    """

    partition: Partition
    cells: bytes
    name: str
    counts: str
    cell: tuple[int, int]
    left: int = 0
    top: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, without the caption."""
        return self.partition.cols * self.cell[0], self.partition.rows * self.cell[1]

    def cell_box(self, row: int, col: int) -> tuple[int, int, int, int]:
        """Pixels of a cell: left, top, right, bottom (the last two excluded)."""
        width, height = self.cell
        left, top = self.left + col * width, self.top + row * height
        return left, top, left + width, top + height


@dataclass(frozen=True)
class Block:
    """One item on the page.

    Attributes:
        panels: A panel per partition, in the item's order.
        picture: Width and height of the undimmed picture in the block's corner; None for a video.
        left: Where the block begins, in pixels.
        top: Where the block begins, in pixels.
    """

    panels: tuple[Panel, ...]
    picture: tuple[int, int] | None
    left: int = 0
    top: int = 0

    @property
    def end(self) -> tuple[int, int]:
        """Right and bottom in pixels, captions included."""
        picture = self.picture or (0, 0)
        right = max(self.left + picture[0], *(panel.left + panel.size[0] for panel in self.panels))
        return right, max(self.top + picture[1], *(panel.top + panel.size[1] for panel in self.panels)) + CAPTION

    def moved(self, right: int, down: int) -> Block:
        """The block elsewhere."""
        panels = tuple(replace(panel, left=panel.left + right, top=panel.top + down) for panel in self.panels)
        return Block(panels, self.picture, self.left + right, self.top + down)


def arrange(kept: KeptItem, size: tuple[int, int]) -> Block:
    """Lay out one item: the picture and its whole views on the left, its crops in their grid on the right.

    Args:
        kept: The item and its kept positions.
        size: Width and height of the picture (of one frame, for a video) in pixels.
    """
    grids = kept.item.partitions
    across = max((max(_places(grids, 0, grid)[1], _places(grids, 1, grid)[1]) for grid in grids), default=1)
    targets = {"crop": _MOSAIC / across, "frame": _FRAME, "thumbnail": _ASIDE}
    if not any(grid.kind == "crop" for grid in grids):
        targets["image"] = _ALONE
    panels = [
        Panel(grid, cells, name, counts, _cell_size(grid, size, targets.get(grid.kind, _ASIDE)))
        for grid, (cells, name, counts) in zip(grids, _cells(kept.item, kept.positions), strict=True)
    ]
    if kept.item.modality == "video":
        return Block(tuple(_in_lines(panels)), None)
    scale = _ASIDE / max(size)
    shape = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    aside, beside = shape[0] + 2 * GAP, targets.get("image", 0) == _ALONE
    if not beside:
        aside = max([aside, *(panel.size[0] + 2 * GAP for panel in panels if panel.partition.kind != "crop")])
    top, arranged = 0 if beside else shape[1] + CAPTION, []
    for panel in panels:
        if panel.partition.kind == "crop":
            col, row = _places(grids, 0, panel.partition)[0], _places(grids, 1, panel.partition)[0]
            place = aside + col * (panel.size[0] + GAP), row * (panel.size[1] + CAPTION)
        else:
            place = aside if beside else 0, top
            top += panel.size[1] + CAPTION
        arranged.append(replace(panel, left=place[0], top=place[1]))
    return Block(tuple(arranged), shape)


def _places(grids: Sequence[Partition], axis: int, grid: Partition) -> tuple[int, int]:
    """Column (axis 0) or row (axis 1) of a crop among the crops, and how many there are."""
    starts = sorted({round(crop.box[axis], 6) for crop in grids if crop.kind == "crop"})
    own = round(grid.box[axis], 6)
    return (starts.index(own) if own in starts else 0), max(len(starts), 1)


def _cells(item: VisualItem, positions: Sequence[int]) -> Iterator[tuple[bytes, str, str]]:
    """Per partition the state of its cells, its name and its counts."""
    states = [bytearray(grid.rows * grid.cols) for grid in item.partitions]
    totals, kept = [0] * len(states), [0] * len(states)
    stays = set(positions)
    for token, (part, patch) in enumerate(zip(item.partition.tolist(), item.patch.tolist(), strict=True)):
        if part >= 0:
            totals[part] += 1
            kept[part] += token in stays
            states[part][patch] = max(states[part][patch], KEPT if token in stays else DROPPED)
    numbers: dict[str, int] = {}
    for index, grid in enumerate(item.partitions):
        number = numbers[grid.kind] = numbers.get(grid.kind, 0) + 1
        name = f"{grid.kind} {number}" if grid.kind in ("crop", "frame") else grid.kind
        yield _without_holes(grid, bytes(states[index])), name, f"{kept[index]}/{totals[index]}"


def _without_holes(grid: Partition, cells: bytes) -> bytes:
    """Cells of a shrunk mosaic, where a token stands for more than one cell, filled from the nearest token.

    Grids without a gap between their tokens come back as they are: what is empty there is padding.
    """
    rows = sorted({index // grid.cols for index, cell in enumerate(cells) if cell})
    cols = sorted({index % grid.cols for index, cell in enumerate(cells) if cell})
    if not rows or len(rows) == rows[-1] - rows[0] + 1 and len(cols) == cols[-1] - cols[0] + 1:
        return cells
    left, top, right, bottom = grid.box
    filled = bytearray(cells)
    for index in range(len(cells)):
        row, col = divmod(index, grid.cols)
        x, y = left + (col + 0.5) / grid.cols * (right - left), top + (row + 0.5) / grid.rows * (bottom - top)
        if 0 <= x <= 1 and 0 <= y <= 1:
            near_row = min(rows, key=lambda other: abs(other - row))
            near_col = min(cols, key=lambda other: abs(other - col))
            filled[index] = cells[near_row * grid.cols + near_col]
    return bytes(filled)


def _cell_size(grid: Partition, size: tuple[int, int], target: float) -> tuple[int, int]:
    left, top, right, bottom = grid.box
    width, height = max((right - left) * size[0], 1e-6), max((bottom - top) * size[1], 1e-6)
    scale = target / max(width, height)
    cell = scale * width / grid.cols, scale * height / grid.rows
    grow = max(1.0, _SMALLEST_CELL / max(cell))
    # A side of two pixels at least: the grid of a sliver of a picture is drawn wider than the sliver is.
    return max(2, round(cell[0] * grow)), max(2, round(cell[1] * grow))


def _in_lines(panels: Sequence[Panel]) -> Iterator[Panel]:
    top = 0
    for start in range(0, len(panels), _FRAMES_PER_LINE):
        line, left = panels[start : start + _FRAMES_PER_LINE], 0
        for panel in line:
            yield replace(panel, left=left, top=top)
            left += panel.size[0] + GAP
        top += max(panel.size[1] for panel in line) + CAPTION
