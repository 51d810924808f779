"""Which times of a video to look at, from how long it lasts."""

from __future__ import annotations

import math

from vlm_budget.errors import OptionError, VideoError

MOST_FRAMES = 512


def dynamic_frames(duration: float, base: int = 96, extra: int = 64, cap: int = MOST_FRAMES) -> int:
    """How many frames a video of that length is given (QuoTA, arXiv 2503.08689): ``base + int(hours * extra)``.

    The cap is ours: the paper's count grows without end, and 512 frames are reached after six and a half hours.

    Args:
        duration: Seconds.
        base: Frames of the shortest video.
        extra: Further frames for every hour.
        cap: The most there are.

    Raises:
        VideoError: The duration is no number of seconds.
        OptionError: ``base`` or ``cap`` is below 1, or ``extra`` below 0.
    """
    seconds(duration, "the duration")
    for name, value, least in (("base", base, 1), ("extra", extra, 0), ("cap", cap, 1)):
        whole(value, name, least)
    return min(base + int(duration / 3600 * extra), cap)


def spread_times(duration: float, count: int, start: float = 0.0) -> list[float]:
    """The middles of ``count`` equal pieces of ``duration`` seconds that begin at ``start``, in seconds.

    Raises:
        VideoError: The duration is no number of seconds, or is 0.
        OptionError: ``count`` is below 1.
    """
    whole(count, "the count of frames", 1)
    seconds(start, "the start")
    if not seconds(duration, "the duration"):
        raise VideoError("no frames can be spread over 0 seconds: pass a duration above 0")
    piece = duration / count
    return [start + (number + 0.5) * piece for number in range(count)]


def seconds(value: float, name: str) -> float:
    """A time or a duration, checked: a finite number from 0 on.

    Raises:
        VideoError: It is none.
    """
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if isinstance(value, (bool, str)) or not math.isfinite(found) or found < 0:
        raise VideoError(f"{name} must be a number of seconds from 0 on, got {value!r}")
    return found


def whole(value: int, name: str, least: int) -> int:
    """A whole number from ``least`` on.

    Raises:
        OptionError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be a whole number from {least} on, got {value!r}")
    return value
