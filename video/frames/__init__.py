"""Frames of videos: reading them by time, scoring and searching them.

>>> with Video.open("film.mp4", max_pixels=512 * 512) as video:
...     frames = video.spread(32)
>>> frames[0].image, frames[0].time
"""

from .reader import Frame, Video
from .sampling import dynamic_frames, spread_times

__all__ = ["Frame", "Video", "dynamic_frames", "spread_times"]
