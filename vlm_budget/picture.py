"""Drawing which visual tokens stayed: one panel per thumbnail, crop, tile or frame, beside the picture itself.

Kept cells show the picture, dropped cells are dimmed and lose their colour, cells without a token (padding) are plain
grey. Pure Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .panels import DROPPED, GAP, KEPT, NO_TOKEN, Block, Panel, arrange

if TYPE_CHECKING:
    from .report import KeptItem

_PAGE, _BLANK, _RAIL = (16, 18, 24), (44, 48, 58), (36, 40, 50)
_TEXT, _MUTED, _ACCENT = (234, 237, 243), (139, 147, 163), (255, 190, 60)
_DIM = 0.5  # what is left of a dropped cell's brightness
_MARGIN, _TITLE, _HEADING, _LEGEND = 32, 46, 44, 46
_SMOOTH = Image.Resampling.BICUBIC

Source = Image.Image | Sequence[Image.Image]


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
    blocks = place([pictures[0].size for pictures in frames], kept, titled=bool(title))
    top = blocks[-1].end[1] + GAP if blocks else _MARGIN
    texts = [_text_width(title, 24), *(_text_width(name + summary, 17) + 24 for name, summary in headings), 420]
    right = max([_MARGIN + max(texts), *(block.end[0] for block in blocks)])
    page = Image.new("RGB", (right + _MARGIN, top + _LEGEND), _PAGE)
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


def place(sizes: Sequence[tuple[int, int]], kept: Sequence[KeptItem], titled: bool) -> list[Block]:
    """Where on the page :func:`draw_kept` puts every panel.

    Args:
        sizes: Width and height of each item's picture.
        kept: The items.
        titled: There is a title on top.
    """
    blocks: list[Block] = []
    top = _MARGIN + (_TITLE if titled else 0)
    for size, entry in zip(sizes, kept, strict=True):
        blocks.append(arrange(entry, size).moved(_MARGIN, top + _HEADING))
        top = blocks[-1].end[1] + GAP
    return blocks


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
