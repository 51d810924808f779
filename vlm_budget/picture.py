"""Drawing which visual tokens stayed: one panel per thumbnail, crop, tile or frame, beside the picture itself.

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

_PAGE, _BLANK, _RAIL = (16, 18, 24), (44, 48, 58), (36, 40, 50)
_TEXT, _MUTED, _ACCENT = (234, 237, 243), (139, 147, 163), (255, 190, 60)
_DIM = 0.38  # what is left of a dropped cell's brightness
_MARGIN, _GAP, _CAPTION, _HEADING = 32, 12, 28, 44
# Pixels along the long side: the picture and its thumbnail, a picture that is one panel, all crops, a frame.
_ASIDE, _ALONE, _MOSAIC, _FRAME = 330, 640, 640, 260
_SMALLEST_CELL, _FRAMES_PER_LINE = 7, 5

_SMOOTH = Image.Resampling.BICUBIC

Source = Image.Image | Sequence[Image.Image]


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
        return right, max(self.top + picture[1], *(panel.top + panel.size[1] for panel in self.panels)) + _CAPTION

    def moved(self, right: int, down: int) -> Block:
        """The block elsewhere."""
        panels = tuple(replace(panel, left=panel.left + right, top=panel.top + down) for panel in self.panels)
        return Block(panels, self.picture, self.left + right, self.top + down)


# --- what stands where -----------------------------------------------------------------------------------------------


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
    aside, beside = shape[0] + 2 * _GAP, targets.get("image", 0) == _ALONE
    if not beside:
        aside = max([aside, *(panel.size[0] + 2 * _GAP for panel in panels if panel.partition.kind != "crop")])
    top, arranged = 0 if beside else shape[1] + _CAPTION, []
    for panel in panels:
        if panel.partition.kind == "crop":
            col, row = _places(grids, 0, panel.partition)[0], _places(grids, 1, panel.partition)[0]
            place = aside + col * (panel.size[0] + _GAP), row * (panel.size[1] + _CAPTION)
        else:
            place = aside if beside else 0, top
            top += panel.size[1] + _CAPTION
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
        yield bytes(states[index]), name, f"{kept[index]}/{totals[index]}"


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
            left += panel.size[0] + _GAP
        top += max(panel.size[1] for panel in line) + _CAPTION


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
    frames = [[source] if isinstance(source, Image.Image) else list(source) for source in sources]
    headings = [
        (names[index] if names else f"{entry.item.modality} {index + 1}", _summary(entry))
        for index, entry in enumerate(kept)
    ]
    blocks: list[Block] = []
    top = _MARGIN + (46 if title else 0)
    for pictures, entry in zip(frames, kept, strict=True):
        blocks.append(arrange(entry, pictures[0].size).moved(_MARGIN, top + _HEADING))
        top = blocks[-1].end[1] + _GAP
    texts = [_text_width(title, 24), *(_text_width(name + summary, 17) + 24 for name, summary in headings), 420]
    right = max([_MARGIN + max(texts), *(block.end[0] for block in blocks)])
    page = Image.new("RGB", (right + _MARGIN, top + 46), _PAGE)
    pen = ImageDraw.Draw(page)
    pen.text((_MARGIN, _MARGIN - 6), title, font=_font(24), fill=_TEXT)
    for pictures, entry, block, heading in zip(frames, kept, blocks, headings, strict=True):
        _draw_heading(pen, block, right, heading, entry)
        if block.picture:
            page.paste(pictures[0].convert("RGB").resize(block.picture, _SMOOTH), (block.left, block.top))
            _draw_caption(pen, block.left, block.top + block.picture[1], block.picture[0], "the picture", "")
        for panel in block.panels:
            _draw_panel(page, panel, pictures[min(panel.partition.time, len(pictures) - 1)])
    _draw_legend(pen, _MARGIN, top + 8)
    return page


def _summary(entry: KeptItem) -> str:
    summary = f"{len(entry.positions)} of {entry.item.size} tokens kept"
    ends = set(entry.item.separators.tolist())
    return summary + (f", {len(ends.intersection(entry.positions))} of {len(ends)} row ends among them" if ends else "")


def _draw_heading(
    pen: ImageDraw.ImageDraw, block: Block, right: int, heading: tuple[str, str], entry: KeptItem
) -> None:
    """The item's name and counts over a bar that shows the kept share."""
    left, top = block.left, block.top - _HEADING
    pen.text((left, top), heading[0], font=_font(17), fill=_TEXT)
    pen.text((left + _text_width(heading[0], 17) + 14, top), heading[1], font=_font(17), fill=_MUTED)
    share = (right - left) * len(entry.positions) / entry.item.size
    pen.rectangle((left, top + 27, right - 1, top + 29), _RAIL)
    pen.rectangle((left, top + 27, left + round(share) - 1, top + 29), _ACCENT)


def _draw_panel(page: Image.Image, panel: Panel, picture: Image.Image) -> None:
    grid, size = panel.partition, panel.size
    shown = _region(picture, grid.box, size)
    dim = ImageOps.grayscale(shown).point(lambda value: round(value * _DIM)).convert("RGB")
    for state, look in ((DROPPED, dim), (NO_TOKEN, Image.new("RGB", size, _BLANK))):
        mask = Image.frombytes("L", (grid.cols, grid.rows), bytes(255 * (cell == state) for cell in panel.cells))
        shown.paste(look, (0, 0), mask.resize(size, Image.Resampling.NEAREST))
    _draw_grid(shown, panel)
    page.paste(shown, (panel.left, panel.top))
    pen = ImageDraw.Draw(page)
    _draw_outline(pen, panel)
    _draw_caption(pen, panel.left, panel.top + size[1], size[0], panel.name, panel.counts)


def _region(picture: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """The part of the picture under ``box``; what lies beyond the picture stays blank."""
    left, top, right, bottom = box
    inner = max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)
    panel = Image.new("RGB", size, _BLANK)
    if inner[0] >= inner[2] or inner[1] >= inner[3]:
        return panel
    x, y = size[0] / (right - left), size[1] / (bottom - top)
    x0, x1 = round((inner[0] - left) * x), round((inner[2] - left) * x)
    y0, y1 = round((inner[1] - top) * y), round((inner[3] - top) * y)
    width, height = picture.size
    part = inner[0] * width, inner[1] * height, inner[2] * width, inner[3] * height
    panel.paste(picture.convert("RGB").resize((max(x1 - x0, 1), max(y1 - y0, 1)), _SMOOTH, part), (x0, y0))
    return panel


def _draw_grid(image: Image.Image, panel: Panel) -> None:
    lines = Image.new("L", image.size)
    pen = ImageDraw.Draw(lines)
    strength = 70 if min(panel.cell) >= 12 else 40
    for col in range(1, panel.partition.cols):
        pen.line((col * panel.cell[0], 0, col * panel.cell[0], image.height), strength)
    for row in range(1, panel.partition.rows):
        pen.line((0, row * panel.cell[1], image.width, row * panel.cell[1]), strength)
    image.paste((0, 0, 0), (0, 0, *image.size), lines)


def _draw_outline(pen: ImageDraw.ImageDraw, panel: Panel) -> None:
    """A line around every group of kept cells."""
    rows, cols = panel.partition.rows, panel.partition.cols
    wide = 2 if min(panel.cell) >= 12 else 1

    def stays(row: int, col: int) -> bool:
        return 0 <= row < rows and 0 <= col < cols and panel.cells[row * cols + col] == KEPT

    for row, col in ((row, col) for row in range(rows) for col in range(cols) if stays(row, col)):
        left, top, right, bottom = panel.cell_box(row, col)
        for beside, bar in (
            ((row - 1, col), (left, top, right - 1, top + wide - 1)),
            ((row + 1, col), (left, bottom - wide, right - 1, bottom - 1)),
            ((row, col - 1), (left, top, left + wide - 1, bottom - 1)),
            ((row, col + 1), (right - wide, top, right - 1, bottom - 1)),
        ):
            if not stays(*beside):
                pen.rectangle(bar, _ACCENT)


def _draw_caption(pen: ImageDraw.ImageDraw, left: int, bottom: int, width: int, name: str, counts: str) -> None:
    """Name and counts below a panel; the counts alone where it is too narrow."""
    place = left
    if not counts or _text_width(name, 14) + 8 + _text_width(counts, 14) <= width:
        pen.text((left, bottom + 5), name, font=_font(14), fill=_MUTED)
        place += _text_width(name, 14) + 8
    pen.text((place, bottom + 5), counts, font=_font(14), fill=_TEXT)


def _draw_legend(pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
    looks = (((196, 160, 120), _ACCENT, "kept"), ((66, 66, 66), None, "dropped"), (_BLANK, None, "no token (padding)"))
    for fill, edge, text in looks:
        pen.rectangle((left, top, left + 15, top + 15), fill, edge, 2 if edge else 0)
        pen.text((left + 23, top), text, font=_font(14), fill=_MUTED)
        left += 23 + _text_width(text, 14) + 24


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    return int(_font(size).getlength(text)) + 1
