"""Procedural posters: coloured digits on a cluttered page, with the owner of every pixel.

A scene is a 96 x 96 page that carries two to eight distinct digits. A share of the scenes is *hard* on
purpose, in ways that make salience a poor guide to what will be asked:

* ``distractor``: large saturated letters and discs that no question is about;
* ``faint``: the digits that are asked about have a third of the usual contrast, beside others in full
  contrast;
* ``texture``: the digits lie on stripes, checks or coarse noise of strong contrast;
* ``dense``: more and smaller digits.

Glyphs come from the TrueType font embedded in Pillow, so no system font is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CANVAS = 96
COLORS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 215, 40),
    "magenta": (225, 60, 215),
    "cyan": (50, 215, 225),
    "white": (245, 245, 245),
}
COLOR_NAMES = tuple(COLORS)
HARD_KINDS = ("distractor", "faint", "texture", "dense")
HARD_SHARE = 0.36
MARK = 16  # owner values from here on are marks (letters, discs) that no question is about
_RGB = np.array(list(COLORS.values()), np.float32)
_LETTERS = "ACEFHKMNPRTUVWXY"
_ANGLES = (-8, 0, 8)


@dataclass(frozen=True)
class Item:
    """One digit; ``x``, ``y`` is the centre of its box in pixels, ``color`` an index into `COLOR_NAMES`."""

    digit: int
    color: int
    x: int
    y: int
    height: int
    faint: bool = False


@dataclass(frozen=True)
class Scene:
    """One page.

    Attributes:
        pixels: uint8 ``[96, 96, 3]``.
        owner: int8 ``[96, 96]``: -1 background, ``i`` the item ``i``, ``MARK + i`` the mark ``i``.
        items: the digits, each at most once.
        marks: colour index of every mark.
        hard_kind: one of `HARD_KINDS`, or None for a clean page.
    """

    pixels: np.ndarray
    owner: np.ndarray
    items: tuple[Item, ...]
    marks: tuple[int, ...]
    hard_kind: str | None


@cache
def glyph(char: str, height: int, angle: int) -> np.ndarray:
    """Coverage of a bold glyph, float32 in [0, 1], ``[height, W]``."""
    page = Image.new("L", (128, 128))
    ImageDraw.Draw(page).text(
        (64, 64), char, font=ImageFont.load_default(size=64), fill=255, anchor="mm", stroke_width=3
    )
    page = page.rotate(angle, resample=Image.Resampling.BICUBIC)
    page = page.crop(page.getbbox())
    width = max(3, round(page.width * height / page.height))
    return np.asarray(page.resize((width, height), Image.Resampling.LANCZOS), np.float32) / 255


@cache
def _disc(size: int) -> np.ndarray:
    page = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(page).ellipse((0, 0, 4 * size - 1, 4 * size - 1), fill=255)
    return np.asarray(page.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _smooth_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Unit-variance noise of ``cells`` x ``cells`` knots, interpolated to the canvas: ``[96, 96]``."""
    knots = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(knots.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator) -> np.ndarray:
    """A tinted, uneven page with low-contrast ghost letters and bars: float32 ``[96, 96, 3]``."""
    cells = int(rng.integers(3, 9))
    page = np.stack([_smooth_noise(rng, cells) for _ in range(3)], -1) * rng.uniform(4, 14)
    page += rng.uniform(55, 120) + rng.normal(0, 8, 3)
    for _ in range(rng.integers(2, 7)):
        ghost = glyph(str(rng.choice(list(_LETTERS))), int(rng.choice((12, 18, 26))), int(rng.choice((-30, 15))))
        h, w = ghost.shape
        y, x = rng.integers(0, CANVAS - h), rng.integers(0, CANVAS - w)
        page[y : y + h, x : x + w] += ghost[..., None] * (rng.choice((-1, 1)) * rng.uniform(10, 26))
    for _ in range(rng.integers(1, 5)):
        y, x = rng.integers(0, CANVAS, 2)
        thick, value = rng.integers(1, 3), rng.choice((-1, 1)) * rng.uniform(10, 24)
        if rng.random() < 0.5:
            page[y : y + thick, x : x + 40] += value
        else:
            page[y : y + 40, x : x + thick] += value
    return page.astype(np.float32)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Stripes, checks or coarse noise of strong contrast, tinted: float32 ``[96, 96, 3]``."""
    yy, xx = np.mgrid[:CANVAS, :CANVAS].astype(np.float32)
    period, angle = rng.uniform(4, 11), rng.uniform(0, np.pi)
    u = np.sin(2 * np.pi * (np.cos(angle) * xx + np.sin(angle) * yy) / period + rng.uniform(0, 6))
    v = np.sin(2 * np.pi * (np.cos(angle) * yy - np.sin(angle) * xx) / period)
    wave = (u, np.sign(u * v), _smooth_noise(rng, int(rng.integers(16, 33))))[rng.integers(3)]
    return (wave[..., None] * rng.uniform(22, 38) * rng.uniform(0.6, 1.0, 3)).astype(np.float32)


def _place(
    rng: np.random.Generator, shape: tuple[int, int], boxes: list[tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    """A free corner ``(y, x)`` for a box, two pixels away from all others, or None after 40 tries."""
    h, w = shape
    for _ in range(40):
        y, x = int(rng.integers(1, CANVAS - h - 1)), int(rng.integers(1, CANVAS - w - 1))
        if all(x > x1 + 2 or x + w + 2 < x0 or y > y1 + 2 or y + h + 2 < y0 for y0, x0, y1, x1 in boxes):
            boxes.append((y, x, y + h, x + w))
            return y, x
    return None


class _Painter:
    """Draws items and marks onto one page and keeps the owner map."""

    def __init__(self, rng: np.random.Generator, page: np.ndarray) -> None:
        self.rng, self.page = rng, page
        self.owner = np.full((CANVAS, CANVAS), -1, np.int8)
        self.boxes: list[tuple[int, int, int, int]] = []

    def draw(self, shape: np.ndarray, color: int, alpha: float, owner: int) -> tuple[int, int] | None:
        """Blend ``shape`` in at a free place; returns its centre ``(y, x)``, None when there is no room."""
        corner = _place(self.rng, shape.shape, self.boxes)
        if corner is None:
            return None
        (y, x), (h, w) = corner, shape.shape
        cover = shape[..., None] * alpha
        rgb = _RGB[color] + self.rng.uniform(-12, 12, 3).astype(np.float32)
        self.page[y : y + h, x : x + w] = self.page[y : y + h, x : x + w] * (1 - cover) + rgb * cover
        self.owner[y : y + h, x : x + w][shape > 0.4] = owner
        return y + h // 2, x + w // 2


def _draw_items(rng: np.random.Generator, painter: _Painter, hard_kind: str | None) -> tuple[Item, ...]:
    dense, faint = hard_kind == "dense", hard_kind == "faint"
    count = int(rng.integers(6, 9)) if dense else int(rng.integers(3 if faint else 2, 6))
    heights = (11, 14) if dense else (13, 20)
    palette = rng.permutation(len(COLORS))[: rng.integers(2, 6)]
    items: list[Item] = []
    n_faint = int(rng.integers(1, 3)) if faint else 0
    for digit in rng.permutation(10)[:count]:
        is_faint = len(items) < n_faint
        height, color = int(rng.integers(*heights)), int(rng.choice(palette))
        alpha = rng.uniform(0.32, 0.42) if is_faint else rng.uniform(0.85, 1)
        centre = painter.draw(glyph(str(digit), height, int(rng.choice(_ANGLES))), color, alpha, len(items))
        if centre is not None:
            items.append(Item(int(digit), color, centre[1], centre[0], height, is_faint))
    return tuple(items)


def _draw_marks(rng: np.random.Generator, painter: _Painter) -> tuple[int, ...]:
    marks: list[int] = []
    for _ in range(rng.integers(2, 5)):
        size, color = int(rng.integers(20, 32)), int(rng.integers(len(COLORS)))
        letter = rng.random() < 0.7
        shape = (
            glyph(str(rng.choice(list(_LETTERS))), size, int(rng.choice((-30, 15)))) if letter else _disc(size * 2 // 3)
        )
        if painter.draw(shape, color, rng.uniform(0.9, 1), MARK + len(marks)) is not None:
            marks.append(color)
    return tuple(marks)


def make_scene(rng: np.random.Generator, hard_kind: str | None) -> Scene:
    """Draw one page; the same generator state gives the same page.

    Args:
        rng: source of every choice.
        hard_kind: one of `HARD_KINDS`, or None for a clean page.
    """
    page = _background(rng)
    if hard_kind == "texture":
        page += _texture(rng)
    painter = _Painter(rng, page)
    items = _draw_items(rng, painter, hard_kind)
    marks = _draw_marks(rng, painter) if hard_kind == "distractor" else ()
    page += rng.normal(0, 4, (CANVAS, CANVAS, 1)).astype(np.float32)
    return Scene(np.clip(page, 0, 255).astype(np.uint8), painter.owner, items, marks, hard_kind)


def random_scene(rng: np.random.Generator) -> Scene:
    """A page that is hard with probability `HARD_SHARE`, all kinds alike."""
    hard = rng.random() < HARD_SHARE
    return make_scene(rng, str(rng.choice(HARD_KINDS)) if hard else None)
