"""Clips beside each other, as files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_budget.errors import MissingExtraError, OptionError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MOVING = (".gif", ".webp")
FILMS = (".mp4", ".mkv", ".webm")
STILL = (".png", ".jpg")
_GAP, _HEAD, _SIDE = 8, 22, 240
_DIFFERENCE = 4


def check_out(path: Path) -> None:
    """Refuse a place that cannot be written, before any work is done.

    Raises:
        OptionError: It is a folder, in no folder, or no kind of file that is written here.
        MissingExtraError: A film without PyAV.
    """
    if path.is_dir():
        raise OptionError(f"--out {str(path)!r} is a directory; name a file in it, such as clip.gif")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"--out {str(path)!r}: there is no folder {str(path.parent)!r}")
    kinds = (*MOVING, *STILL, *FILMS)
    if path.suffix.lower() not in kinds:
        raise OptionError(f"--out {str(path)!r}: expected a file that ends in one of {', '.join(kinds)}")
    if path.suffix.lower() in FILMS:
        _av()


def side_by_side(dense: np.ndarray, sparse: np.ndarray, titles: tuple[str, str]) -> list[Image.Image]:
    """Frames of the dense clip, the sparse one and their difference four times, side by side.

    Args:
        dense: [F, H, W, 3] in [0, 1].
        sparse: The same.
        titles: What stands above the two.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    difference = (0.5 + _DIFFERENCE / 2 * (sparse - dense)).clip(0, 1)
    font = ImageFont.load_default(13)
    scale = max(1, _SIDE // dense.shape[1])
    width, height = dense.shape[2] * scale, dense.shape[1] * scale
    width, height = width + width % 2, height + height % 2
    found = []
    for parts in zip(dense, sparse, difference, strict=True):
        sheet = Image.new("RGB", (3 * width + 2 * _GAP, height + _HEAD), "white")
        draw = ImageDraw.Draw(sheet)
        for place, (part, title) in enumerate(zip(parts, (*titles, f"difference x {_DIFFERENCE}"), strict=True)):
            left = place * (width + _GAP)
            pixels = Image.fromarray((part * 255).round().astype(np.uint8))
            sheet.paste(pixels.resize((width, height), Image.Resampling.NEAREST), (left, _HEAD))
            draw.text((left + 2, 2), title, fill="black", font=font)
        found.append(sheet)
    return found


def save(path: Path, frames: Sequence[Image.Image], fps: int = 6) -> None:
    """Write frames: a film, a moving picture, or for ``.png`` and ``.jpg`` up to six of them below each other.

    The file is written beside its place and moved there, so that nobody finds half of one.

    Raises:
        OptionError: It cannot be written.
        MissingExtraError: A film without PyAV.
    """
    kind = path.suffix.lower()
    part = None
    try:
        handle, name = tempfile.mkstemp(suffix=kind, prefix=f".{path.stem}-", dir=path.absolute().parent)
        os.close(handle)
        part = Path(name)
        if kind in FILMS:
            _film(part, frames, fps)
        elif kind in MOVING:
            frames[0].save(part, save_all=True, append_images=list(frames[1:]), duration=1000 // fps, loop=0)
        else:
            _strip(frames).save(part)
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # a temporary file is private, and what a user asked for is not
        part.replace(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"--out {str(path)!r} cannot be written: {reason}") from error
    finally:
        if part is not None:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()


def _strip(frames: Sequence[Image.Image], rows: int = 6) -> Image.Image:
    """Up to six frames, evenly spread, below each other."""
    from PIL import Image

    count = min(rows, len(frames))
    chosen = [frames[round(place * (len(frames) - 1) / max(1, count - 1))] for place in range(count)]
    sheet = Image.new("RGB", (chosen[0].width, sum(frame.height + _GAP for frame in chosen) - _GAP), "white")
    for place, frame in enumerate(chosen):
        sheet.paste(frame, (0, place * (frame.height + _GAP)))
    return sheet


def _film(path: Path, frames: Sequence[Image.Image], fps: int) -> None:
    av = _av()
    with av.open(str(path), "w") as container:
        wanted = "libvpx-vp9" if path.suffix.lower() == ".webm" else "libx264"
        codec = wanted if wanted in av.codecs_available else "mpeg4"  # builds of PyAV differ
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = (side - side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            cropped = picture.crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_image(cropped)))
        container.mux(stream.encode(None))


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError(
            "films need PyAV: pip install 'vlm-budget[video]', or name a .gif or .png file"
        ) from error
    return av
