"""Keyed pages: "which digit has the colour of the disc?", with what every patch shows.

A page of 96 x 96 pixels carries one disc, the *key*, three to six distinct digits in distinct colours, and on most
pages letters, whose colours mean nothing. The class of a page is the digit in the colour of its key. So the answer
needs evidence from two places (where the key is, where the digit of its colour is) and a detail (which digit it is): a
method that loses either loses the page. The best guess without the key is one of the page's digits.

Glyphs come from the font embedded in Pillow, as in :mod:`vlm_budget.eval.nano.scene`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from vlm_budget.eval.nano.scene import CANVAS, COLOR_NAMES, COLORS, glyph

CLASSES = 10
PATCH = 8
BACKGROUND, LETTER, KEY = 10, 11, 12  # kinds of a patch beside the ten digits
KINDS = 13
NO_COLOR = len(COLOR_NAMES)
VALIDATION_SEED, TEST_SEED = 9_100_001, 9_100_002
_RGB = np.array(list(COLORS.values()), np.float32)
_LETTERS = "ACEFHKMNPRTUVWXY"
_HEIGHTS = (14, 17, 20)
_STEP = PATCH // 2  # marks stand on a lattice: few enough views of a glyph to learn them in minutes
_MIN_PIXELS = 6  # a patch with fewer pixels of a mark says too little about it to be labelled with it


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        pixels: uint8 [96, 96, 3].
        label: The digit in the colour of the key.
        kinds: int64 [144], what each patch of 8 x 8 shows: a digit, or ``BACKGROUND``, ``LETTER``, ``KEY``.
        colors: int64 [144], its colour's index, or ``NO_COLOR``.
        asked: bool [144], the patch shows the digit that is the page's class.
        digits: How many digits the page has.
    """

    pixels: np.ndarray
    label: int
    kinds: np.ndarray
    colors: np.ndarray
    asked: np.ndarray
    digits: int


def _disc(size: int) -> np.ndarray:
    """Coverage of a disc, float32 [size, size]."""
    centre = (size - 1) / 2
    y, x = np.mgrid[:size, :size] - centre
    return np.clip(size / 2 + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Unit-variance noise of ``cells`` x ``cells`` knots, interpolated to [96, 96]."""
    knots = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(knots.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator) -> np.ndarray:
    """A tinted, uneven page: float32 [96, 96, 3]; every other one with coarse noise of strong contrast."""
    coarse = rng.random() < 1 / 2
    cells = int(rng.integers(14, 29)) if coarse else int(rng.integers(3, 9))
    strength = rng.uniform(16, 28) if coarse else rng.uniform(4, 14)
    page = np.stack([_noise(rng, cells) for _ in range(3)], -1) * strength
    return (page + rng.uniform(55, 110) + rng.normal(0, 8, 3)).astype(np.float32)


@dataclass
class _Canvas:
    """A page being drawn, with the owner of every pixel (-1 is background)."""

    rng: np.random.Generator
    pixels: np.ndarray
    owner: np.ndarray
    boxes: list[tuple[int, int, int, int]]

    def draw(self, shape: np.ndarray, color: int, mark: int) -> bool:
        """Blend a mark in at a free place; False where 60 tries find none."""
        h, w = shape.shape
        for _ in range(60):
            y, x = (int(self.rng.integers(0, (CANVAS - side) // _STEP + 1)) * _STEP for side in (h, w))
            if all(x > x1 + 2 or x + w + 2 < x0 or y > y1 + 2 or y + h + 2 < y0 for y0, x0, y1, x1 in self.boxes):
                break
        else:
            return False
        self.boxes.append((y, x, y + h, x + w))
        cover = shape[..., None] * self.rng.uniform(0.3, 1)
        rgb = _RGB[color] + self.rng.uniform(-12, 12, 3).astype(np.float32)
        self.pixels[y : y + h, x : x + w] = self.pixels[y : y + h, x : x + w] * (1 - cover) + rgb * cover
        self.owner[y : y + h, x : x + w][shape > 0.4] = mark
        return True


def _patch_marks(owner: np.ndarray, marks: int) -> np.ndarray:
    """The mark with the most pixels in each patch, int64 [144]; -1 where none has enough."""
    side = CANVAS // PATCH
    cells = owner.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(side * side, -1)
    counts = np.stack([(cells == mark).sum(1) for mark in range(marks)], 1)
    return np.where(counts.max(1) >= _MIN_PIXELS, counts.argmax(1), -1)


def draw_page(rng: np.random.Generator) -> Page:
    """Draw one page; the same generator state gives the same page."""
    while True:
        canvas = _Canvas(rng, _background(rng), np.full((CANVAS, CANVAS), -1), [])
        digits = rng.permutation(10)[: rng.integers(3, 7)]
        colors = rng.permutation(len(_RGB))[: len(digits)]
        letters = int(rng.integers(0, 4))
        # The first digit is the asked one: the key has its colour.
        marks: list[tuple[np.ndarray, int, int]] = [(_disc(int(rng.integers(11, 16))), int(colors[0]), KEY)]
        for digit, color in zip(digits, colors, strict=True):
            shape = glyph(str(digit), int(rng.choice(_HEIGHTS)), 0)
            marks.append((shape, int(color), int(digit)))
        for _ in range(letters):
            letter = str(rng.choice(list(_LETTERS)))
            shape = glyph(letter, int(rng.choice(_HEIGHTS)), 0)
            marks.append((shape, int(rng.integers(len(_RGB))), LETTER))
        if all(canvas.draw(shape, color, index) for index, (shape, color, _) in enumerate(marks)):
            return _finish(canvas, marks, len(digits))


def _finish(canvas: _Canvas, marks: Sequence[tuple[np.ndarray, int, int]], digits: int) -> Page:
    pixels = canvas.pixels + canvas.rng.normal(0, 4, (CANVAS, CANVAS, 1))
    shown = _patch_marks(canvas.owner, len(marks))
    kinds = np.array([kind for _, _, kind in marks] + [BACKGROUND])[shown]
    colors = np.array([color for _, color, _ in marks] + [NO_COLOR])[shown]
    return Page(np.clip(pixels, 0, 255).astype(np.uint8), marks[1][2], kinds, colors, shown == 1, digits)


def pages(count: int, seed: int) -> list[Page]:
    """``count`` pages; page ``i`` depends on ``seed`` and ``i`` alone, so a shorter list begins a longer one."""
    return [draw_page(np.random.default_rng([seed, index])) for index in range(count)]


def images(drawn: Sequence[Page]) -> torch.Tensor:
    """What the model is fed: float32 [n, 3, 96, 96], about in [-2, 2]."""
    stacked = torch.from_numpy(np.stack([page.pixels for page in drawn])).permute(0, 3, 1, 2).float()
    return (stacked - 100) / 55


def labels(drawn: Sequence[Page]) -> torch.Tensor:
    """Classes, int64 [n]."""
    return torch.tensor([page.label for page in drawn])
