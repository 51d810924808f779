"""Drawing which visual tokens stayed: one panel per thumbnail, crop, tile or frame.

Kept cells show the picture, dropped cells are dimmed and lose their colour, cells without a token (padding) are plain
grey. Crops stand where they lie in the picture. Pure Pillow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

if TYPE_CHECKING:
    from .layout import Partition, VisualItem
    from .report import KeptItem

NO_TOKEN, DROPPED, KEPT = 0, 1, 2

_PAGE, _BLANK, _LINE = (16, 18, 24), (44, 48, 58), (0, 0, 0)
_TEXT, _MUTED, _ACCENT = (234, 237, 243), (139, 147, 163), (255, 190, 60)
_DIM = 0.30  # what is left of a dropped cell's brightness
_MARGIN, _GAP, _CAPTION = 32, 12, 26
# Pixels along the long side: a picture that is one panel, one beside its crops, all crops together, a frame.
_ALONE, _THUMBNAIL, _MOSAIC, _FRAME = 640, 360, 640, 260
_SMALLEST_CELL, _FRAMES_PER_LINE = 7, 5

Source = Image.Image | Sequence[Image.Image]


@dataclass(frozen=True)
class Panel:
    """One partition on the page.

    Attributes:
        partition: What it shows.
        cells: One of ``NO_TOKEN``, ``DROPPED``, ``KEPT`` per cell of the grid, row by row.
        caption: Kind and counts, such as ``"thumbnail  12/36"``.
        cell: Width and height of a cell in pixels.
        left: Where the panel begins, in pixels.
        top: Where the panel begins, in pixels.
    """

    partition: Partition
    cells: bytes
    caption: str
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


# --- what there is to draw -------------------------------------------------------------------------------------------


def panels_of(kept: KeptItem, size: tuple[int, int]) -> list[Panel]:
    """Panels of one item, arranged with their first corner at (0, 0): whole pictures left, crops in their grid right.

    Args:
        kept: The item and its kept positions.
        size: Width and height of the picture (of one frame, for a video) in pixels.
    """
    item = kept.item
    crops = [grid for grid in item.partitions if grid.kind == "crop"]
    found = [
        Panel(grid, cells, caption, _cell_size(grid, size, _target(grid, crops)))
        for grid, (cells, caption) in zip(item.partitions, _cells(item, kept.positions), strict=True)
    ]
    whole = [panel for panel in found if panel.partition.kind in ("image", "thumbnail")]
    frames = [panel for panel in found if panel.partition.kind == "frame"]
    arranged = list(_in_lines(whole, len(whole))) + list(_in_lines(frames, _FRAMES_PER_LINE))
    start = max((panel.left + panel.size[0] + 2 * _GAP for panel in arranged), default=0)
    arranged += _in_mosaic([panel for panel in found if panel.partition.kind == "crop"], start)
    return arranged


def _cells(item: VisualItem, positions: Sequence[int]) -> Iterator[tuple[bytes, str]]:
    """Per partition, the state of its cells and its caption."""
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
        yield bytes(states[index]), f"{name}  {kept[index]}/{totals[index]}"


def _target(grid: Partition, crops: Sequence[Partition]) -> float:
    """Pixels for the long side of a panel."""
    if grid.kind == "crop":
        across = len({round(crop.box[0], 6) for crop in crops}), len({round(crop.box[1], 6) for crop in crops})
        return _MOSAIC / max(across)
    return {"thumbnail": _THUMBNAIL, "frame": _FRAME}.get(grid.kind, _THUMBNAIL if crops else _ALONE)


def _cell_size(grid: Partition, size: tuple[int, int], target: float) -> tuple[int, int]:
    left, top, right, bottom = grid.box
    width, height = max((right - left) * size[0], 1e-6), max((bottom - top) * size[1], 1e-6)
    scale = target / max(width, height)
    cell = scale * width / grid.cols, scale * height / grid.rows
    grow = max(1.0, _SMALLEST_CELL / max(min(cell), target / 200))  # a sliver of a picture is not blown up for ever
    return max(2, round(cell[0] * grow)), max(2, round(cell[1] * grow))


def _in_lines(panels: Sequence[Panel], per_line: int) -> Iterator[Panel]:
    top = 0
    for start in range(0, len(panels), max(per_line, 1)):
        line, left = panels[start : start + per_line], 0
        for panel in line:
            yield replace(panel, left=left, top=top)
            left += panel.size[0] + _GAP
        top += max(panel.size[1] for panel in line) + _CAPTION


def _in_mosaic(panels: Sequence[Panel], start: int) -> Iterator[Panel]:
    lefts = sorted({round(panel.partition.box[0], 6) for panel in panels})
    tops = sorted({round(panel.partition.box[1], 6) for panel in panels})
    width = max((panel.size[0] for panel in panels), default=0)
    height = max((panel.size[1] for panel in panels), default=0)
    for panel in panels:
        col, row = lefts.index(round(panel.partition.box[0], 6)), tops.index(round(panel.partition.box[1], 6))
        yield replace(panel, left=start + col * (width + _GAP), top=row * (height + _CAPTION))


# --- drawing it ------------------------------------------------------------------------------------------------------


def draw_kept(
    sources: Sequence[Source], kept: Sequence[KeptItem], title: str = "", names: Sequence[str] = ()
) -> Image.Image:
    """Draw the kept tokens of a prompt.

    Args:
        sources: Per item its picture; for a video its frames as the model saw them.
        kept: The items, as :meth:`vlm_budget.PatchHandle.kept` gives them.
        title: A line on top.
        names: Names of the items; "image 1" and so on by default.

    Returns:
        The page, RGB.

    Raises:
        ValueError: Not as many sources as items.
    """
    if len(sources) != len(kept):
        raise ValueError(f"{len(kept)} items need as many pictures, got {len(sources)}")
    blocks: list[tuple[Sequence[Image.Image], list[Panel], str]] = []
    top, width = _MARGIN + (44 if title else 0), 0
    for index, (source, entry) in enumerate(zip(sources, kept, strict=True)):
        frames = [source] if isinstance(source, Image.Image) else list(source)
        heading = _heading(names[index] if names else f"{entry.item.modality} {index + 1}", entry)
        panels = [
            replace(panel, left=panel.left + _MARGIN, top=panel.top + top + 34)
            for panel in panels_of(entry, frames[0].size)
        ]
        blocks.append((frames, panels, heading))
        top = max(panel.top + panel.size[1] for panel in panels) + _CAPTION + _GAP
        width = max(width, _text_width(heading, 17), *(panel.left + panel.size[0] - _MARGIN for panel in panels))
    width = max(width, _text_width(title, 24), 420)
    page = Image.new("RGB", (width + 2 * _MARGIN, top + 44), _PAGE)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN - 6), title, font=_font(24), fill=_TEXT)
    for frames, panels, heading in blocks:
        pen.text((_MARGIN, panels[0].top - 31), heading, font=_font(17), fill=_MUTED)
        for panel in panels:
            _draw_panel(page, panel, frames[min(panel.partition.time, len(frames) - 1)])
    _draw_legend(pen, _MARGIN, top + 6)
    return page


def _heading(name: str, entry: KeptItem) -> str:
    total, kept = entry.item.size, len(entry.positions)
    heading = f"{name}:  {kept} of {total} tokens kept"
    ends = set(entry.item.separators.tolist())
    if ends:
        heading += f", {len(ends.intersection(entry.positions))} of {len(ends)} row ends among them"
    return heading


def _draw_panel(page: Image.Image, panel: Panel, picture: Image.Image) -> None:
    grid, size = panel.partition, panel.size
    bright = _region(picture, grid.box, size)
    dim = ImageOps.grayscale(bright).point(lambda value: round(value * _DIM)).convert("RGB")
    for state, look in ((DROPPED, dim), (NO_TOKEN, Image.new("RGB", size, _BLANK))):
        mask = Image.frombytes("L", (grid.cols, grid.rows), bytes(255 * (cell == state) for cell in panel.cells))
        bright.paste(look, (0, 0), mask.resize(size, Image.Resampling.NEAREST))
    _draw_grid(bright, panel)
    page.paste(bright, (panel.left, panel.top))
    pen = ImageDraw.Draw(page)
    _draw_outline(pen, panel)
    pen.text((panel.left, panel.top + size[1] + 5), _fitting(panel.caption, size[0]), font=_font(14), fill=_TEXT)


def _region(picture: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """The part of the picture under ``box``; what lies beyond the picture stays blank."""
    left, top, right, bottom = box
    inner = max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)
    panel = Image.new("RGB", size, _BLANK)
    if inner[0] >= inner[2] or inner[1] >= inner[3]:
        return panel
    x, y = size[0] / (right - left), size[1] / (bottom - top)
    place = [round((inner[i] - (left, top)[i % 2]) * (x, y)[i % 2]) for i in range(4)]
    part = tuple(inner[i] * picture.size[i % 2] for i in range(4))
    shape = max(place[2] - place[0], 1), max(place[3] - place[1], 1)
    panel.paste(picture.convert("RGB").resize(shape, Image.Resampling.BICUBIC, part), (place[0], place[1]))  # type: ignore[arg-type]
    return panel


def _draw_grid(image: Image.Image, panel: Panel) -> None:
    lines = Image.new("L", image.size)
    pen = ImageDraw.Draw(lines)
    strength = 70 if min(panel.cell) >= 12 else 40
    for col in range(1, panel.partition.cols):
        pen.line((col * panel.cell[0], 0, col * panel.cell[0], image.height), strength)
    for row in range(1, panel.partition.rows):
        pen.line((0, row * panel.cell[1], image.width, row * panel.cell[1]), strength)
    image.paste(_LINE, (0, 0, *image.size), lines)


def _draw_outline(pen: ImageDraw.ImageDraw, panel: Panel) -> None:
    """A line around every patch of kept cells."""
    rows, cols = panel.partition.rows, panel.partition.cols
    wide = 2 if min(panel.cell) >= 12 else 1

    def stays(row: int, col: int) -> bool:
        return 0 <= row < rows and 0 <= col < cols and panel.cells[row * cols + col] == KEPT

    for index in range(rows * cols):
        row, col = divmod(index, cols)
        if not stays(row, col):
            continue
        left, top, right, bottom = panel.cell_box(row, col)
        for beside, bar in (
            ((row - 1, col), (left, top, right - 1, top + wide - 1)),
            ((row + 1, col), (left, bottom - wide, right - 1, bottom - 1)),
            ((row, col - 1), (left, top, left + wide - 1, bottom - 1)),
            ((row, col + 1), (right - wide, top, right - 1, bottom - 1)),
        ):
            if not stays(*beside):
                pen.rectangle(bar, _ACCENT)


def _draw_legend(pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
    for fill, edge, text in (
        ((196, 160, 120), _ACCENT, "kept"),
        ((52, 52, 52), None, "dropped"),
        (_BLANK, None, "no token: padding"),
    ):
        pen.rectangle((left, top, left + 15, top + 15), fill, edge, 2 if edge else 0)
        pen.text((left + 23, top), text, font=_font(14), fill=_MUTED)
        left += 23 + _text_width(text, 14) + 24


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 1


def _fitting(caption: str, width: int) -> str:
    """The caption, or its counts alone where a panel is too narrow."""
    return caption if _text_width(caption, 14) <= width else caption.rsplit("  ", 1)[-1]
