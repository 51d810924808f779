"""Reading frames of a video file by time, upright and RGB, without holding more of the file than is asked for."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vlm_budget.errors import OptionError, VideoError

from .decoding import Decoder
from .sampling import seconds, spread_times, whole

if TYPE_CHECKING:
    from PIL import Image

MOST_FRAMES = 2048

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame of a video.

    Attributes:
        image: RGB, upright.
        time: Seconds from the video's start at which it is shown first, exact to the file's clock.
    """

    image: Image.Image
    time: float


class Video:
    """A video file that is open for reading; made by :meth:`open`, and closed at the end of a ``with``.

    Times are seconds from the start of the video stream. At a time, the frame is given that a player shows then: the
    last one that began until that time, also where the frame rate varies; the first one before it begins.

    Packets and frames that cannot be decoded are left out, the frame before them stays, and ``corrupt`` counts them. A
    file that was cut off is read as far as it goes: behind its end its last frame stays, and ``cut_off`` says so.
    Non-square pixels are given as they are stored.
    """

    def __init__(self, decoder: Decoder, name: str, max_pixels: int | None, max_frames: int) -> None:
        self.name, self.max_pixels, self.max_frames = name, max_pixels, max_frames
        self._decoder = decoder
        self._turn = _Turn(decoder.first)
        self._reformatter: Any = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        max_pixels: int | None = None,
        max_frames: int = MOST_FRAMES,
        strict: bool = False,
        name: str | None = None,
    ) -> Video:
        """Open a video file and decode its first frame.

        Args:
            path: The file, in any format that PyAV reads.
            max_pixels: The most pixels of a frame; larger ones are scaled down, their aspect ratio kept.
            max_frames: The most frames that one call hands out: they are held in memory at once.
            strict: Damage is an error: packets that cannot be decoded, an asked frame that is flawed, and frames that
                end before the video does.
            name: What messages call it; its path by default.

        Raises:
            VideoError: Missing, a folder, empty, no video, sound alone, damaged or too large, without a clock, or
                without a single frame that can be decoded.
            OptionError: ``max_pixels`` or ``max_frames`` is below 1.
            MissingExtraError: PyAV is not installed.
        """
        if max_pixels is not None:
            whole(max_pixels, "max_pixels", 1)
        whole(max_frames, "max_frames", 1)
        name = repr(os.fspath(path) if name is None else name)
        return cls(Decoder(_file(path, name), name, strict), name, max_pixels, max_frames)

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading on is an error."""
        self._decoder.close()

    @property
    def duration(self) -> float:
        """Seconds that the pictures last, as the file tells it, or its packets where it does not."""
        return self._decoder.duration

    @property
    def rate(self) -> float:
        """Frames per second on average, as the file tells it; 0.0 where it does not."""
        return self._decoder.rate

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames that are given: upright, and within ``max_pixels``."""
        first = self._decoder.first
        width, height = fitted(first.width, first.height, self.max_pixels)
        return (height, width) if self._turn.swaps else (width, height)

    @property
    def rotation(self) -> int:
        """Degrees counter-clockwise by which the stored frames are turned to be upright."""
        return self._turn.degrees

    @property
    def corrupt(self) -> int:
        """Packets and frames that could not be decoded, among those met so far."""
        return len(self._decoder.bad)

    @property
    def cut_off(self) -> bool:
        """Whether the frames were found to end before the duration that the file tells."""
        return self._decoder.cut_off

    def at(self, times: Iterable[float], progress: Progress | None = None) -> list[Frame]:
        """The frames that a player shows at some times.

        Args:
            times: Seconds, in any order; twice the same, or two that one frame covers, give the same object twice.
            progress: Called after every time with how many are done and how many there are.

        Returns:
            A frame for every time, in the order of the times.

        Raises:
            VideoError: A time is negative, no number, or behind the end of the video; damage, if ``strict``.
            OptionError: More times than ``max_frames``.
        """
        self._open_decoder()
        asked = [seconds(time, f"video {self.name}: a time") for time in _listed(times)]
        self._require_few(len(asked))
        found: dict[float, Frame] = {}
        ascending = sorted(asked)
        for done, (time, frame) in enumerate(zip(ascending, self._shown(ascending), strict=True), 1):
            found[time] = frame
            if progress is not None:
                progress(done, len(asked))
        return [found[time] for time in asked]

    def spread(
        self, count: int, start: float = 0.0, end: float | None = None, progress: Progress | None = None
    ) -> list[Frame]:
        """Frames spread evenly: those shown in the middles of ``count`` equal pieces.

        No frame is given twice. A part with no more than ``count`` frames gives each of them once, and one whose frames
        are held for so long that two middles show the same gives fewer than ``count``.

        Args:
            count: Frames that are wanted.
            start: Seconds; where the part begins.
            end: Seconds; None for the end of the video, which it may not be behind of.
            progress: Called after every piece with how many are done and how many there are.

        Raises:
            VideoError: The part is empty or makes no sense; damage, if ``strict``.
            OptionError: ``count`` is below 1 or above ``max_frames``.
        """
        decoder = self._open_decoder()
        whole(count, "the count of frames", 1)
        self._require_few(count)
        seconds(start, f"video {self.name}: the start")
        last = decoder.duration if end is None else min(seconds(end, f"video {self.name}: the end"), decoder.duration)
        if end is not None and start >= end:
            raise VideoError(f"video {self.name}: its part from {start:g} s to {end:g} s is empty; end after the start")
        if start >= last:
            raise VideoError(f"video {self.name} lasts {last:.2f} s: there is nothing from {start:g} s on")
        found: list[Frame] = []
        for done, frame in enumerate(self._shown(spread_times(last - start, count, start)), 1):
            if not found or frame is not found[-1]:
                found.append(frame)
            if progress is not None:
                progress(done, count)
        if len(found) < count:
            every = list(itertools.islice(self._part(start, last), count + 1))
            found = every if len(every) <= count else found
        return found

    def every(self, step: float) -> Iterator[Frame]:
        """The frames shown at 0, ``step``, 2 ``step``, ... seconds, one by one; a frame held for long comes again.

        Of a file that was cut off, none behind its last frame.

        Raises:
            OptionError: ``step`` is no number of seconds above 0.
            VideoError: Damage, if ``strict``.
        """
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not (math.isfinite(step) and step > 0):
            raise OptionError(f"the step must be a number of seconds above 0, got {step!r}")
        decoder = self._open_decoder()
        times = (number * step for number in itertools.count())
        frames = self._shown(itertools.takewhile(lambda time: time < decoder.duration, times))
        return itertools.takewhile(lambda _: not decoder.behind, frames)

    def _shown(self, times: Iterable[float]) -> Iterator[Frame]:
        """Frames at times that ascend, each converted once."""
        stamp, frame = None, None
        for time in times:
            decoder = self._open_decoder()
            raw = decoder.show(time)
            if frame is None or decoder.time(raw) != stamp:
                stamp = decoder.time(raw)
                frame = self._converted(raw)
            yield frame

    def _part(self, start: float, end: float) -> Iterator[Frame]:
        decoder = self._open_decoder()
        for number, raw in enumerate(decoder.onwards(start)):
            if number and decoder.time(raw) >= end:
                return
            yield self._converted(raw)

    def _converted(self, raw: Any) -> Frame:
        if self._reformatter is None:
            from av.video.reformatter import VideoReformatter

            self._reformatter = VideoReformatter()
        width, height = fitted(raw.width, raw.height, self.max_pixels)
        image = self._reformatter.reformat(raw, width, height, "rgb24").to_image()
        return Frame(self._turn.applied(image), self._open_decoder().time(raw))

    def _open_decoder(self) -> Decoder:
        if self._decoder.closed:
            raise VideoError(f"video {self.name} is closed: read within the with statement that opened it")
        return self._decoder

    def _require_few(self, count: int) -> None:
        if count > self.max_frames:
            raise OptionError(
                f"{count} frames are more than one call may hold in memory ({self.max_frames}): ask for fewer, use "
                "every(), or open the video with a higher max_frames"
            )


def fitted(width: int, height: int, most: int | None) -> tuple[int, int]:
    """The largest size of the same aspect ratio, and no larger than it is, with at most ``most`` pixels."""
    if most is None or width * height <= most:
        return width, height
    scale = math.sqrt(most / (width * height))
    width, height = max(int(width * scale), 1), max(int(height * scale), 1)
    return min(width, most), min(height, most)


class _Turn:
    """How stored frames are made upright: the display matrix of the first frame.

    The matrix moves a point to ``(a x + c y, b x + d y)``, y pointing down (ISO 14496-12, 8.2.2). Phones write right
    angles, of which some are mirrored; others are turned with black corners.
    """

    def __init__(self, frame: Any) -> None:
        a, b, c, d = _display_matrix(frame)
        # av_display_rotation_get, counter-clockwise
        angle = -math.degrees(math.atan2(b, a)) if a or b else 0.0
        self.degrees = round(angle) % 360
        self.mirrored = a * d - b * c < 0
        self.swaps = self.degrees in (90, 270)

    def applied(self, image: Image.Image) -> Image.Image:
        """An upright picture."""
        from PIL import Image

        if self.mirrored:  # the vertical axis first, then the turn
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        return image.rotate(self.degrees, expand=True) if self.degrees else image


def _display_matrix(frame: Any) -> tuple[float, float, float, float]:
    import numpy as np

    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1.0, 0.0, 0.0, 1.0
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return a / 65536, b / 65536, c / 65536, d / 65536


def _listed(times: Iterable[float]) -> list[float]:
    try:
        return list(times)
    except TypeError as error:
        raise VideoError(f"times must be a sequence of seconds, got {times!r}") from error


def _file(path: str | os.PathLike[str], name: str) -> Path:
    """Where a video lies, checked as far as that goes without reading it."""
    try:
        file = Path(path).expanduser()
        size = file.stat().st_size
        if file.is_dir():
            raise VideoError(f"video {name} is a folder: pass a video file")
        if not file.is_file():
            raise VideoError(f"video {name} is not a regular file")
    except VideoError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # missing, not allowed, a NUL byte, no home folder
        raise VideoError(f"there is no video {name}: {getattr(error, 'strerror', None) or error}") from error
    if not size:
        raise VideoError(f"video {name} is empty: 0 bytes")
    return file.absolute()
