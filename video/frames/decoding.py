"""The decoder behind :class:`~vlm_budget.video.frames.reader.Video`: which frame a player shows at a time.

Frames are decoded onwards from where the decoder stands, or from the key frame before the wanted time, whichever is
less work. No more than two decoded frames are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from vlm_budget.errors import MissingExtraError, VideoError

# Seconds that are sooner decoded than jumped over, as long as it is not known how close the key frames stand.
_SEEK = 4.0

# Seconds before a wanted time within which every frame is decoded; further away those that no other refers to are left
# out, in formats that mark them for certain (of HEVC's, pictures of a higher layer may refer to them).
_NEAR = 0.5
_MARKED = ("h264",)


class Decoder:
    """The first video stream of a file, by time.

    Times are seconds from the stream's own start, exact to the file's clock.

    Attributes:
        duration: Seconds, as the file tells it; what its packets add up to where it tells nothing.
        loose: Seconds by which the frames may end earlier than told and be whole nevertheless.
        rate: Frames per second on average; 0.0 where the file does not tell.
        first: The first frame that can be decoded.
        bad: Time stamps of packets and frames that could not be decoded.
        behind: The time shown last lay behind the last frame, though the video should go on there.
        cut_off: The frames were found to end before the duration is over.
        closed: Nothing can be read any more.

    Raises:
        VideoError: No video stream, damaged, too large, without a clock, or without a frame that can be decoded.
        MissingExtraError: PyAV is not installed.
    """

    _shown: Any  # the frame shown last, and the one that follows it
    _coming: Any
    _key: float | None  # when the last key frame came by
    _left_out: int | None  # the latest packet of which a frame may have been left out

    def __init__(self, path: Path, name: str, strict: bool = False) -> None:
        self.path, self.name, self.strict = path, name, strict
        self.closed = False
        self._av = _pyav()
        self._scout: tuple[Any, Any] | None = None
        self._container, self._stream = self._opened()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _opened(self) -> tuple[Any, Any]:
        try:
            # Playlists that pose as a video may name addresses elsewhere: nothing but files is read.
            container = self._av.open(str(self.path), options={"protocol_whitelist": "file"})
        except (self._av.error.FFmpegError, ValueError, EOFError) as error:
            raise VideoError(f"video {self.name} is damaged, or no video that PyAV reads: {error}") from error
        for stream in container.streams.video:
            if not _is_cover(stream):
                if stream.codec_context is None:
                    container.close()
                    raise VideoError(f"this PyAV has no decoder for video {self.name}; encode it anew, as H.264")
                stream.thread_type = "AUTO"
                return container, stream
        container.close()
        raise VideoError(f"{self.name} holds no video stream: it may be sound alone. Pass a file with pictures")

    def _prepare(self) -> None:
        stream = self._stream
        _require_size(stream, self.name)
        self._tick = Fraction(stream.time_base or 0)
        if not self._tick:
            raise self._clockless()
        self.rate = float(stream.average_rate or 0)
        self.bad: set[int | None] = set()
        self.behind = self.cut_off = False
        self._skims = False  # how the decoder is set now
        self._marked = stream.codec_context.name in _MARKED
        self._aim: int | None = None  # ticks up to which frames may be left out that no other refers to
        self._reach = _SEEK  # seconds that are sooner decoded than jumped over
        self._zero = stream.start_time
        self._start()
        self.duration, self.loose = self._seconds()
        self._frames = self._decoded()
        self._coming = self._next()
        if self._coming is None:
            raise VideoError(f"video {self.name} is damaged: it holds no frame that can be decoded")
        if self._zero is None:
            self._zero = self._stamp(self._coming)
        # Half a tick, since a file rounds its frames' times to its own clock; of a coarse clock no more than 1 ms.
        self._slack = min(float(self._tick) / 2, 1e-3) + 1e-9
        self.first = self._coming

    def _start(self) -> None:
        """Forget everything about where the decoder stands."""
        self._shown = self._coming = self._key = self._left_out = None

    def close(self) -> None:
        """Close the file."""
        self.closed = True
        self._shown = self._coming = None
        self._frames = iter(())
        self._container.close()
        if self._scout is not None:
            self._scout[0].close()

    def time(self, frame: Any) -> float:
        """When a frame is shown first, in seconds."""
        return self._in_seconds(self._stamp(frame))

    def _in_seconds(self, stamp: int) -> float:
        # Of whole numbers, hence rounded once; the same with fractions takes ten times as long, for every frame.
        return (stamp - self._zero) * self._tick.numerator / self._tick.denominator

    def _in_ticks(self, time: float) -> int:
        return self._zero + int(time / self._tick)

    def show(self, time: float) -> Any:
        """The frame that a player shows at a time: the last one that began until then, or the first of all.

        Behind the last frame, that one stays as long as the file says that the video goes on (see ``cut_off``).

        Raises:
            VideoError: The video has ended before; in strict mode also: cut off, or damaged where it was read.
        """
        if time > 2 * self.duration + 60:  # not worth looking whether it goes on for longer than it tells
            raise self._over(time, self.duration)
        wanted = time + self._slack
        self._aim = self._in_ticks(time - _NEAR) if self._marked else None
        if (self._shown is not None and wanted < self.time(self._shown)) or self._should_jump(wanted):
            self._jump(wanted)
        self._forward(wanted)
        if self._left_out is not None and self._stamp(self._shown) <= self._left_out:
            # The wanted one may have been left out: frames of this video are held for long, or it ends here.
            self._marked, self._aim = False, None
            self._jump(wanted)
            self._forward(wanted)
        self.behind = self._coming is None and self._ended_before(time)
        if self.strict and self._shown.is_corrupt:
            raise VideoError(
                f"video {self.name} is damaged: its frame at {self.time(self._shown):.2f} s cannot be decoded"
            )
        return self._shown

    def _forward(self, wanted: float) -> None:
        while self._coming is not None and (self._shown is None or self.time(self._coming) <= wanted):
            self._shown, self._coming = self._coming, self._next()

    def onwards(self, time: float) -> Iterator[Any]:
        """Every frame from the one shown at a time on."""
        yield self.show(time)
        while self._coming is not None:
            self._shown, self._coming = self._coming, self._next()
            yield self._shown

    def _ended_before(self, time: float) -> bool:
        last = self.time(self._shown)
        own = float((getattr(self._shown, "duration", 0) or 0) * self._tick)
        end = last + max(own, 1 / self.rate if self.rate else 0.0) + self.loose
        if time <= end:
            return False
        if time > self.duration + self.loose:
            raise self._over(time, max(self.duration, last + own))
        self.cut_off = True
        if self.strict:
            raise VideoError(
                f"video {self.name} is cut off: its frames end at {last:.2f} s, one of {time:.2f} s is wanted"
            )
        return True

    def _over(self, time: float, end: float) -> VideoError:
        return VideoError(f"video {self.name} lasts {end:.2f} s: it shows nothing at {time:g} s")

    def _should_jump(self, wanted: float) -> bool:
        if self._coming is None or wanted - self.time(self._coming) <= self._reach:
            return False
        return self._scout is None or self._key_before(wanted) > self.time(self._coming)

    def _jump(self, wanted: float) -> None:
        """To the last key frame before a time, or further back where the file's index leads astray.

        It does so past the time in streams whose packets are sorted by when they are decoded, at key frames whose
        leading pictures cannot be decoded without what came before, and behind the end of a file that was cut off.
        """
        before = self.time(self._coming) if self._coming is not None else math.inf
        back = 0.0
        while True:
            self._seek(max(wanted - back, 0.0))
            self._start()
            self._coming = self._next()
            if wanted - back <= 0 or (self._coming is not None and self.time(self._coming) <= wanted):
                break
            back = max(2 * back, 1.0)
        if self._coming is None or self.time(self._coming) > max(wanted, self.time(self.first)):
            # Not even the start was found, as in transport streams whose first packet is decoded before it is shown.
            self._reopen()
            self._start()
            self._frames = self._decoded()
            self._coming = self._next()
        if self._coming is None:
            raise VideoError(f"video {self.name} can be read no more: has the file changed since it was opened?")
        if self.time(self._coming) <= before <= wanted and self._scout is None:
            self._scout = self._opened()  # key frames stand far apart: look where they are before the next jump

    def _seek(self, time: float) -> None:
        try:
            self._container.seek(self._in_ticks(time), stream=self._stream, backward=True)
        except self._av.error.FFmpegError:
            if time:  # as good as landing nowhere
                self._frames = iter(())
                return
            self._reopen()
        self._frames = self._decoded()

    def _reopen(self) -> None:
        self._container.close()
        self._container, self._stream = self._opened()
        self._skims = False

    def _key_before(self, time: float) -> float:
        """When the key frame is shown to which a jump would lead; -inf where that cannot be told."""
        assert self._scout is not None
        container, stream = self._scout
        try:
            container.seek(self._in_ticks(time), stream=stream, backward=True)
            packet = next(container.demux(stream))
        except (self._av.error.FFmpegError, StopIteration):
            return -math.inf
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None or not packet.is_keyframe:
            return -math.inf
        found = self._in_seconds(stamp)
        return found if found <= time else -math.inf

    def _next(self) -> Any:
        frame = next(self._frames, None)
        if frame is not None and frame.key_frame:
            now = self.time(frame) if self._zero is not None else 0.0
            if self._key is not None and now > self._key:
                self._reach = min(_SEEK, 2 * (now - self._key))
            self._key = now
        return frame

    def _decoded(self) -> Iterator[Any]:
        """Frames from where the file stands, in the order they are shown; bad ones are counted and left out."""
        failure = self._av.error.FFmpegError
        packets, codec = self._container.demux(self._stream), self._stream.codec_context
        while True:
            try:
                packet = next(packets, None)
            except failure as error:  # the rest of the file is gone; the decoder may still hold frames
                self._count(None, error)
                packet = None
            self._choose(packet)
            try:
                frames = codec.decode(packet)
            except EOFError:  # drained before
                return
            except failure as error:
                self._count(packet.dts if packet is not None else None, error)
                frames = []
            for frame in frames:
                if frame.is_corrupt and not self.strict:
                    self.bad.add(self._stamp(frame))
                else:
                    yield frame
            if packet is None:
                return

    def _choose(self, packet: Any) -> None:
        """Let the decoder leave out what no other frame refers to, far before the wanted time."""
        far = self._aim is not None and packet is not None and packet.pts is not None and packet.pts < self._aim
        if far:
            self._left_out = packet.pts if self._left_out is None else max(packet.pts, self._left_out)
        if far != self._skims:
            self._stream.codec_context.skip_frame = "NONREF" if far else "DEFAULT"
            self._skims = far

    def _count(self, stamp: int | None, error: Exception) -> None:
        if self.strict:
            raise VideoError(f"video {self.name} is damaged: {error}") from error
        self.bad.add(stamp)

    def _stamp(self, frame: Any) -> int:
        stamp = frame.dts if frame.pts is None else frame.pts
        if stamp is None:
            raise self._clockless()
        return stamp

    def _clockless(self) -> VideoError:
        return VideoError(
            f"video {self.name} does not say when its frames are shown, as bare streams do. Put it into a container "
            "that does: ffmpeg -r RATE -i FILE -c copy NEW.mp4"
        )

    def _seconds(self) -> tuple[float, float]:
        """How long the pictures last, and by how much less they may without being cut off."""
        stream, container = self._stream, self._container
        if stream.duration and stream.duration > 0:
            return float(stream.duration * self._tick), 0.2
        if container.duration and container.duration > 0:  # also of the sound, which may go on for a while
            told = container.duration / 1_000_000
            begins = float((self._zero or 0) * self._tick)
            # Matroska's goes from 0 on where FFmpeg wrote it, and from the first frame on where others did.
            lasts = told if begins <= 1 else self._end_before(begins + told) - begins
            return (lasts, 0.2) if 0 < lasts < told else (told, 1 + 0.05 * told)
        first, behind = self._packet_times()
        self._reopen()
        if first is None or behind <= first:
            raise self._clockless()
        return float((behind - first) * self._tick), 0.2

    def _end_before(self, time: float) -> float:
        """When the last packet ends, in seconds on the file's own clock; read from the key frame before a time on."""
        try:
            self._container.seek(int(time / self._tick), stream=self._stream, backward=True)
        except self._av.error.FFmpegError:  # read from the start
            self._reopen()
        _, behind = self._packet_times()
        self._reopen()
        return float(behind * self._tick)

    def _packet_times(self) -> tuple[int | None, int]:
        """When the first packet begins and the last one ends, in ticks; read through, none decoded."""
        first, behind = None, 0
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is not None:
                    first = packet.pts if first is None else min(first, packet.pts)
                    behind = max(behind, packet.pts + (packet.duration or 0))
        except self._av.error.FFmpegError as error:
            self._count(None, error)
        return first, behind


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("reading videos needs PyAV: pip install 'vlm-budget[video]'") from error
    return av


def _is_cover(stream: Any) -> bool:
    """A picture of an album's cover, which sound files carry as a video stream; the oldest PyAV does not tell."""
    return bool(getattr(getattr(stream, "disposition", None), "value", 0) & 0x400)


def _require_size(stream: Any, name: str) -> None:
    from PIL import Image

    width, height, most = stream.codec_context.width, stream.codec_context.height, Image.MAX_IMAGE_PIXELS
    if not width or not height:
        raise VideoError(f"video {name} is damaged: its frames have {width} x {height} pixels")
    if most is not None and width * height > most:
        raise VideoError(
            f"video {name} is too large: {width} x {height} pixels a frame, more than {most} "
            "(PIL.Image.MAX_IMAGE_PIXELS). Scale it down, or raise the limit if you trust the file."
        )
