"""Frames of a video: N pictures, uniformly spaced in time, as :class:`~vlm_budget.eval.sample.Clip` names it.

The part between ``start`` and ``end`` is cut into N equal pieces, and of each the frame is taken that a player shows in
the middle of the piece. A folder of pictures counts as a video whose frames are its files, in natural order.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_budget.errors import ImageError, OptionError
from vlm_budget.eval.sample import Clip
from vlm_budget.images import load_image
from vlm_budget.video.frames.reader import Video

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_frames(clip: Clip, count: int) -> list[Image.Image]:
    """Frames of a clip, in order, RGB.

    Args:
        clip: A video file, or a folder of pictures.
        count: Frames that are wanted; a clip that has fewer gives each of its frames once.

    Raises:
        ImageError: The file is missing, empty, no video, damaged or cut off, or has nothing between start and end.
        MissingExtraError: PyAV is not installed.
        OptionError: ``count`` is below 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise OptionError(f"frames must be a number from 1 on, got {count!r}")
    if clip.draw is not None:
        return clip.draw(count)
    if clip.path.is_dir():
        return _from_folder(clip, count)
    with Video.open(clip.path, name=clip.name, max_frames=count, strict=True) as video:
        return [frame.image for frame in video.spread(count, clip.start, clip.end)]


def spread(total: int, count: int) -> list[int]:
    """Which of ``total`` things to take: the middle one of each of ``count`` equal pieces, every one at most once."""
    count = min(total, count)
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def pictures_in(folder: Path) -> list[Path]:
    """Picture files of a folder, ``2.jpg`` before ``10.jpg``; of mixed formats only the most frequent.

    Folders of scans hold colour as JPEG and depth as PNG side by side.

    Raises:
        ImageError: The folder cannot be read.
    """
    found: dict[str, list[Path]] = {}
    try:
        for path in folder.iterdir():
            suffix = path.suffix.lower()
            if suffix in PICTURES and not path.name.startswith("."):
                found.setdefault(".jpg" if suffix == ".jpeg" else suffix, []).append(path)
    except OSError as error:
        raise ImageError(f"cannot read folder {str(folder)!r}: {error.strerror}") from error
    if not found:
        return []
    order = sorted(found, key=lambda suffix: (-len(found[suffix]), suffix))
    return sorted(found[order[0]], key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    parts = re.split(r"([0-9]+)", name)
    return tuple((0, int(part)) if part.isdigit() and part.isascii() else (1, part) for part in parts)


def _from_folder(clip: Clip, count: int) -> list[Image.Image]:
    if clip.start or clip.end is not None:
        raise ImageError(f"video {str(clip.name)!r} is a folder of pictures: it has no clock to cut a part out by")
    paths = pictures_in(clip.path)
    if not paths:
        raise ImageError(f"folder {str(clip.name)!r} holds no pictures ({', '.join(PICTURES)})")
    return [load_image(paths[number]) for number in spread(len(paths), count)]
