"""Tokens per frame for models that take pictures of any size (Qwen-VL): every frame is resized to its own token grid.

The tower then makes as many tokens as the frame was given, and positions (M-RoPE), windows and time stamps stay the
model's own: nothing is cut out behind it. A frame is a picture of its own with its time as text (Qwen2-VL, Qwen2.5-VL),
or a video of its own whose time the processor writes (Qwen3-VL).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from vlm_budget.errors import OptionError, UnsupportedModelError

from .prompting import frames_text

_REACH = 48  # tokens above its count that a frame may take over from others

Grid = tuple[int, int]


@dataclass(frozen=True)
class FittedGrids:
    """Token grids for frames.

    Attributes:
        grids: Rows and columns of every frame.
        budget: Tokens that were to be spent.
    """

    grids: tuple[Grid, ...]
    budget: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of every frame."""
        return tuple(rows * cols for rows, cols in self.grids)

    @property
    def gap(self) -> int:
        """Tokens of the budget that no grids of these shapes could take."""
        return self.budget - sum(self.tokens)


def fit_grids(counts: Sequence[int], sizes: Sequence[tuple[int, int]], cap: int | None = None) -> FittedGrids:
    """Grids whose tokens are as near to given counts as products of two whole numbers of that shape are.

    Every frame gets at least the largest grid within its count. What is left over goes to frames for which a slightly
    larger grid takes it, such that the sum is met exactly where it can be, and never exceeded, with the least change of
    the shares.

    Args:
        counts: Tokens of every frame, at least 1.
        sizes: Width and height of every frame.
        cap: The most tokens a frame may have when it takes over those of others, if any.

    Raises:
        OptionError: A count is below 1, or there are other frames than counts.
    """
    if len(counts) != len(sizes) or any(count < 1 for count in counts):
        raise OptionError(f"every frame needs at least 1 token, got {list(counts)} for {len(sizes)} frames")
    shapes = [_shapes(width / height, max(counts) + _REACH) for width, height in sizes]
    start = [max(area for area in own if area <= count) for own, count in zip(shapes, counts, strict=True)]
    left = sum(counts) - sum(start)
    options = [
        [area for area in own if area > low and area <= (cap or area) and area <= count + min(left, _REACH)]
        for own, low, count in zip(shapes, start, counts, strict=True)
    ]
    areas = _spend(left, start, options, counts)
    return FittedGrids(tuple(own[area] for own, area in zip(shapes, areas, strict=True)), sum(counts))


@lru_cache(maxsize=64)
def _shapes(aspect: float, most: int) -> dict[int, Grid]:
    """Area to the grid of that area whose shape is nearest to an aspect ratio (width over height)."""
    found: dict[int, tuple[float, Grid]] = {}
    for rows in range(1, most + 1):
        for cols in range(1, most // rows + 1):
            off = abs(math.log(cols / rows / aspect))
            area = rows * cols
            if (off <= math.log(_stretch(rows, cols)) or area == 1) and off < found.get(area, (math.inf,))[0]:
                found[area] = off, (rows, cols)
    for cells in range(2, min(round(max(aspect, 1 / aspect)), most) + 1):  # a frame longer than so many squares
        found.setdefault(cells, (0.0, (1, cells) if aspect > 1 else (cells, 1)))
    return {area: grid for area, (_, grid) in sorted(found.items())}


def _stretch(rows: int, cols: int) -> float:
    """By which factor a grid's aspect ratio may lie off: by about one row or column, which is much of a small grid."""
    return max(1.1, 1 + 1.25 / math.sqrt(rows * cols), 1 + 0.75 / min(rows, cols))


def _spend(left: int, start: Sequence[int], options: Sequence[Sequence[int]], counts: Sequence[int]) -> list[int]:
    """Raise some of ``start`` to one of their options each, such that the increases are ``left`` or as near below.

    Of all ways to take as much, that of the least sum of squared distances to the counts, relative to them.
    """
    cost = np.full(left + 1, np.inf)
    cost[0] = 0.0
    taken = np.zeros((len(start), left + 1), dtype=np.int32)
    for index, (low, areas, count) in enumerate(zip(start, options, counts, strict=True)):
        best = cost + (low - count) ** 2 / count
        for area in areas:
            more = area - low
            if more > left:
                continue
            other = np.full_like(best, np.inf)
            other[more:] = cost[: left + 1 - more] + (area - count) ** 2 / count
            better = other < best
            best[better], taken[index][better] = other[better], more
        cost = best
    rest = int(np.flatnonzero(np.isfinite(cost))[-1])
    areas_found = list(start)
    for index in reversed(range(len(start))):
        areas_found[index] += int(taken[index][rest])
        rest -= int(taken[index][rest])
    return areas_found


# --- processors ------------------------------------------------------------------------------------------------------


def own_grids(processor: Any) -> bool:
    """Whether a processor's model takes pictures of any grid: it merges patches into tokens itself."""
    images = getattr(processor, "image_processor", None)
    return bool(getattr(images, "merge_size", 0)) and hasattr(images, "temporal_patch_size")


def token_side(processor: Any) -> int:
    """Pixels along a token's side.

    Raises:
        UnsupportedModelError: The processor's model does not take pictures of any grid.
    """
    if not own_grids(processor):
        raise UnsupportedModelError(f"{type(processor).__name__} gives no picture a token grid of its own")
    return int(processor.image_processor.patch_size) * int(processor.image_processor.merge_size)


def native_grid(processor: Any, frame: Image.Image) -> Grid:
    """Rows and columns that the processor by itself gives a picture."""
    _, rows, cols = processor.image_processor(images=[frame], return_tensors="pt")["image_grid_thw"][0].tolist()
    merge = int(processor.image_processor.merge_size)
    return rows // merge, cols // merge


def resized(frame: Image.Image, grid: Grid, side: int) -> Image.Image:
    """A frame at exactly the size of a token grid."""
    rows, cols = grid
    return frame.convert("RGB").resize((cols * side, rows * side), Image.Resampling.BICUBIC)


def pixel_inputs(
    processor: Any,
    question: str,
    frames: Sequence[Image.Image],
    grids: Sequence[Grid],
    model: Any,
    times: Sequence[float] = (),
) -> Any:
    """A prompt in which every frame has the tokens of its grid.

    Args:
        processor: Of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.
        question: The question.
        frames: The frames, in order.
        grids: Rows and columns of tokens of each.
        model: The model, for device and number format.
        times: Seconds at which they are shown; none to say nothing of them (Qwen3-VL then takes them as pictures).

    Returns:
        The processor's tensors.

    Raises:
        OptionError: There are other frames than grids or times, or the question holds a token that stands for pictures.
        UnsupportedModelError: The processor's model does not take pictures of any grid.
    """
    side = token_side(processor)
    if len(frames) != len(grids) or (len(times) and len(times) != len(frames)):
        raise OptionError(f"{len(frames)} frames need as many grids and times, got {len(grids)} and {len(times)}")
    pictures = [resized(frame, grid, side) for frame, grid in zip(frames, grids, strict=True)]
    as_videos = bool(len(times)) and stamps_itself(processor)
    given: dict[str, Any] = {"do_resize": False}
    if as_videos:
        # Both halves of the temporal patch are the frame: its time is their mean.
        given |= {"videos": [[picture] * 2 for picture in pictures], "do_sample_frames": False}
        given["video_metadata"] = [_metadata(time) for time in times]
    else:
        given["images"] = pictures
    kind = "video" if as_videos else "image"
    text = frames_text(processor, question, len(frames), times, kind, stamps=not as_videos)
    return processor(text=[text], return_tensors="pt", **given).to(model.device, model.dtype)


def stamps_itself(processor: Any) -> bool:
    """Whether the processor writes the time before every frame of a video, as that of Qwen3-VL does."""
    return hasattr(processor, "_calculate_timestamps")


def _metadata(time: float) -> dict[str, Any]:
    at = round(time * 1000)
    return {"total_num_frames": at + 1, "fps": 1000.0, "frames_indices": [at, at], "duration": time}
