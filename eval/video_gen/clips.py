"""Procedural clips: two shapes that bounce over a mosaic, and the words that say which.

The mosaic is random and stands still, so that a token of one frame can only be told from the same place in other
frames; a shape takes its shading along. A video model trained on these clips must therefore look at few, far away
tokens, which is what sparse attention lives on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vlm_budget.errors import OptionError

SHAPES = ("disc", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
GROUNDS = ("dark", "light", "brown", "green", "blue", "grey")
WORDS = (SHAPES, COLOURS, DIRECTIONS, SHAPES, COLOURS, DIRECTIONS, GROUNDS)
"""What each of the seven words of a prompt may be."""
VOCABULARY = sum(map(len, WORDS))
CELL = 4
"""Pixels along a side of a mosaic's cell, which is a token of the model."""

_PALETTE = torch.tensor(
    [[1, -0.7, -0.7], [-0.7, 0.8, -0.6], [-0.6, -0.3, 1], [1, 0.8, -0.8], [0.8, -0.6, 0.8], [-0.8, 0.8, 0.8]]
)
_GROUND = torch.tensor(
    [[-0.5, -0.5, -0.4], [0.4, 0.4, 0.3], [-0.1, -0.4, -0.6], [-0.6, -0.2, -0.4], [-0.6, -0.5, 0.0], [0.0, 0.0, 0.0]]
)
_CONTRAST = 0.25


@dataclass(frozen=True)
class Size:
    """Extent of a clip in pixels.

    Attributes:
        frames: Frames.
        side: Height and width, a multiple of :data:`CELL`.
    """

    frames: int = 12
    side: int = 40

    @property
    def tokens(self) -> int:
        """Tokens of the model."""
        return self.frames * (self.side // CELL) ** 2


def draw_words(clips: int, generator: torch.Generator) -> torch.Tensor:
    """Indices [clips, 7] of random words."""
    return torch.stack([torch.randint(len(words), (clips,), generator=generator) for words in WORDS], 1)


def embed(words: torch.Tensor) -> torch.Tensor:
    """One-hot text tokens [B, 7, :data:`VOCABULARY`] of word indices [B, 7]."""
    starts = torch.tensor([0, *(len(words) for words in WORDS[:-1])]).cumsum(0)
    return 4.0 * torch.nn.functional.one_hot(words + starts, VOCABULARY).float()


def prompt_of(words: torch.Tensor) -> str:
    """The prompt that word indices [7] stand for."""
    a, b, ground = (
        [names[index] for names, index in zip(WORDS[part], words[part].tolist(), strict=True)]
        for part in (slice(0, 3), slice(3, 6), slice(6, 7))
    )
    return f"a {a[1]} {a[0]} moving {a[2]} and a {b[1]} {b[0]} moving {b[2]} on {ground[0]}"


def read_prompt(prompt: str) -> torch.Tensor:
    """Word indices [7] of a prompt such as ``a red disc moving up and a blue square moving left on grey``.

    Raises:
        OptionError: It does not read like that.
    """
    told = prompt.lower().replace(",", " ").split()
    said = [word for word in told if word not in ("a", "an", "the", "moving", "and", "on", "ground", "background")]
    wanted = [WORDS[1], WORDS[0], WORDS[2], WORDS[4], WORDS[3], WORDS[5], WORDS[6]]
    if len(said) != len(wanted) or any(word not in names for word, names in zip(said, wanted, strict=True)):
        raise OptionError(
            f"cannot read the prompt {prompt!r}. This model knows prompts such as 'a red disc moving up and a blue "
            f"square moving left on grey': shapes {', '.join(SHAPES)}; colours {', '.join(COLOURS)}; directions "
            f"{', '.join(DIRECTIONS)}; grounds {', '.join(GROUNDS)}."
        )
    found = [names.index(word) for word, names in zip(said, wanted, strict=True)]
    return torch.tensor([found[i] for i in (1, 0, 2, 4, 3, 5, 6)])


def draw_clips(words: torch.Tensor, size: Size, generator: torch.Generator) -> torch.Tensor:
    """Clips [B, 3, frames, side, side] in [-1, 1] of word indices [B, 7]."""
    clips = len(words)
    cells = torch.randn(clips, 3, size.side // CELL, size.side // CELL, generator=generator)
    ground = _GROUND[words[:, 6]][:, :, None, None] + _CONTRAST * cells
    still = ground.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
    video = still[:, :, None].expand(-1, -1, size.frames, -1, -1)
    for shape in (words[:, 0:3], words[:, 3:6]):
        alpha, colour = _shape(shape, size, generator)
        video = video * (1 - alpha) + colour * alpha
    return video.clamp(-1, 1)


def _shape(words: torch.Tensor, size: Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Coverage [B, 1, frames, side, side] and colour [B, 3, frames, side, side] of one shape per clip."""
    clips = len(words)
    radius = (0.15 + 0.06 * torch.rand(clips, generator=generator)) * size.side
    speed = (0.025 + 0.025 * torch.rand(clips, generator=generator)) * size.side
    free = (size.side - 2 * radius)[:, None]
    start = torch.rand(clips, 2, generator=generator) * free
    angle = words[:, 2] * (2 * math.pi / len(DIRECTIONS))
    heading = speed[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    way = start[:, None] + heading[:, None] * torch.arange(size.frames)[None, :, None]
    way = way % (2 * free[:, None])  # bounces off the walls
    centre = torch.where(way > free[:, None], 2 * free[:, None] - way, way) + radius[:, None, None]
    pixel = torch.arange(size.side) + 0.5
    x = (pixel - centre[..., 0:1])[:, :, None, :]
    y = (pixel - centre[..., 1:2])[:, :, :, None]
    distance = _distance(words[:, 0].view(-1, 1, 1, 1), x, y, radius.view(-1, 1, 1, 1))
    alpha = (0.5 - distance).clamp(0, 1)[:, None]
    shade = 0.8 + 0.2 * torch.cos(4 * x / radius.view(-1, 1, 1, 1)) * torch.ones_like(y)
    colour = _PALETTE[words[:, 1]].view(-1, 3, 1, 1, 1) * shade[:, None]
    return alpha, colour


def _distance(kind: torch.Tensor, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to the border of a disc, a square or a triangle; negative inside."""
    disc = (x * x + y * y).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    triangle = torch.maximum(y - 0.7 * radius, 0.866 * x.abs() - 0.5 * y - 0.55 * radius)
    return torch.where(kind == 0, disc, torch.where(kind == 1, square, triangle))
