"""Frames of a video: N pictures, uniformly spaced in time, as :class:`~vlm_budget.eval.sample.Clip` names it.

The part between ``start`` and ``end`` is cut into N equal pieces, and of each the frame is taken that a player shows in
the middle of the piece. A folder of pictures counts as a video whose frames are its files, in natural order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_budget.errors import ImageError, MissingExtraError, OptionError
from vlm_budget.eval.sample import Clip
from vlm_budget.images import load_image

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_SEEK = 4.0  # seconds that are cheaper decoded than jumped over: key frames stand about that far apart
_SLACK = 1e-3  # seconds: times are sums of floats, and files round them


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
    name = repr(str(clip.name))
    if not (math.isfinite(clip.start) and clip.start >= 0 and (clip.end is None or clip.start < clip.end)):
        raise ImageError(f"video {name}: its part from {clip.start} s to {clip.end} s is empty or makes no sense")
    try:
        is_folder, size = clip.path.is_dir(), clip.path.stat().st_size
    except (OSError, ValueError) as error:
        raise ImageError(f"there is no video {name}: {getattr(error, 'strerror', None) or error}") from error
    if is_folder:
        return _from_folder(clip, count)
    if not clip.path.is_file():
        raise ImageError(f"video {name} is not a regular file")
    if not size:
        raise ImageError(f"video {name} is empty: 0 bytes")
    return _from_file(clip, count)


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


def _from_file(clip: Clip, count: int) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("reading videos needs PyAV: pip install 'vlm-budget[video]'") from error
    name = repr(str(clip.name))
    try:
        with av.open(str(clip.path)) as container:
            if not container.streams.video:
                raise ImageError(f"{name} holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            length, loose = _seconds(container, stream)
            end = length if clip.end is None else min(clip.end, length)
            if end <= clip.start:
                raise ImageError(f"video {name} lasts {length:.2f} s: there is nothing from {clip.start} s on")
            piece = (end - clip.start) / count
            times = [clip.start + (number + 0.5) * piece for number in range(count)]
            return _shown(container, stream, times, loose, name)
    except (av.error.FFmpegError, ValueError, EOFError) as error:  # ImageError passes: see below
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"video {name} is damaged, or no video that PyAV reads: {error}") from error


def _seconds(container: Any, stream: Any) -> tuple[float, float]:
    """How long the pictures last, and by how much less they may without being cut off."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base), 0.2
    if container.duration:  # also of the sound, which may go on for a while
        return float(container.duration / 1_000_000), 1 + 0.05 * float(container.duration / 1_000_000)
    last = first = None
    for packet in container.demux(stream):
        if packet.pts is not None:
            time = float(packet.pts * packet.time_base)
            first = time if first is None else min(first, time)
            behind = time + float((packet.duration or 0) * packet.time_base)
            last = behind if last is None else max(last, behind)
    container.seek(0)
    if first is None or last is None or last <= first:
        raise ImageError("the video says neither how long it lasts nor when its frames are shown")
    return last - first, 0.2


def _shown(container: Any, stream: Any, times: list[float], loose: float, name: str) -> list[Image.Image]:
    """The frames a player shows at some times, each once."""
    base = float(stream.start_time * stream.time_base) if stream.start_time is not None else 0.0
    found: list[Any] = []
    frames: Iterator[Any] = container.decode(stream)
    shown, coming = None, next(frames, None)
    for time in times:
        wanted = time + base + _SLACK
        if coming is not None and wanted - _clock(coming, name) > _SEEK:
            container.seek(int(wanted / stream.time_base), stream=stream, backward=True)
            frames = container.decode(stream)
            jumped = next(frames, None)
            if jumped is not None and _clock(jumped, name) > wanted:  # the index points past it: read on from the start
                container.seek(0)
                frames = container.decode(stream)
                jumped = next(frames, None)
            coming = jumped
        while coming is not None and (_clock(coming, name) <= wanted or shown is None):
            shown, coming = coming, next(frames, None)
        if shown is None:
            raise ImageError(f"video {name} holds no frame that can be decoded")
        if coming is None and wanted - _clock(shown, name) > _lasts(shown, stream) + loose:
            raise ImageError(
                f"video {name} is cut off: its frames end at {_clock(shown, name) - base:.2f} s, "
                f"one of {time:.2f} s is wanted"
            )
        if not found or shown is not found[-1]:
            found.append(shown)
    return [_picture(frame, name) for frame in found]


def _lasts(frame: Any, stream: Any) -> float:
    told = float(frame.duration * frame.time_base) if frame.duration else 0.0
    return max(told, float(1 / stream.average_rate) if stream.average_rate else 0.0)


def _clock(frame: Any, name: str) -> float:
    if frame.time is None:
        raise ImageError(f"video {name} does not say when its frames are shown")
    return float(frame.time)


def _picture(frame: Any, name: str) -> Image.Image:
    if frame.is_corrupt:
        raise ImageError(f"video {name} is damaged: its frame at {float(frame.time):.2f} s cannot be decoded")
    image: Image.Image = frame.to_image().convert("RGB")
    turn = int(getattr(frame, "rotation", 0) or 0)  # counter-clockwise, from the display matrix
    return image.rotate(turn, expand=True) if turn else image
