"""What was seen of a video, drawn: scores and tokens over time, and the frames that got the most. Pure Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from .watch import Watched

_PAGE, _RAIL = (16, 18, 24), (36, 40, 50)
_TEXT, _MUTED, _ACCENT, _QUIET = (234, 237, 243), (139, 147, 163), (255, 190, 60), (86, 94, 112)
_WIDTH, _MARGIN, _GUTTER = 1280, 40, 92
_BAND, _GAP = 110, 34
_PICTURES, _TALLEST = 8, 130
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)


def draw_timeline(watched: Watched) -> Image.Image:
    """Draw what :func:`~vlm_budget.video.frames.watch.watch` saw.

    Args:
        watched: Its result.

    Returns:
        The page, RGB: the question and the answer, the frames with the most tokens, their place on the time axis, and
        over it a band of scores (where there are any) and one of tokens.
    """
    bands = [("tokens", [float(count) for count in watched.tokens])]
    if watched.scores is not None:
        bands.insert(0, ("score", list(watched.scores)))
    pictures = _pictures(watched)
    tall = max((picture.height for _, _, picture in pictures), default=0)
    top = 118
    axis = top + tall + (58 if pictures else 0) + len(bands) * (_BAND + _GAP)
    page = Image.new("RGB", (_WIDTH, axis + 24), _PAGE)
    pen = ImageDraw.Draw(page)
    _write(pen, (_MARGIN, 24), watched.query.text, 24, _TEXT)
    _write(pen, (_MARGIN, 58), f"“{watched.answer}”", 20, _ACCENT)
    _write(pen, (_MARGIN, 88), summary(watched), 16, _MUTED)
    _draw_pictures(page, pen, pictures, watched, top, tall)
    start = top + tall + (58 if pictures else 0)
    for number, (name, values) in enumerate(bands):
        _draw_band(pen, name, values, watched, start + number * (_BAND + _GAP))
    _draw_axis(pen, watched.duration, axis - _GAP + 6)
    return page


def summary(watched: Watched) -> str:
    """Tokens and frames in a line."""
    shown = sum(count > 0 for count in watched.tokens)
    looked = f"{shown} of {len(watched.tokens)} frames shown"
    return f"{watched.method}: {watched.spent:,} of {watched.dense:,} visual tokens, {looked}"


def clock_time(seconds: float) -> str:
    """``1:02:03``, or ``2:03.5`` where it matters."""
    tenths = round(seconds * 10)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600
    whole = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 and not hours else "")
    return f"{hours}:{minutes:02d}:{whole}" if hours else f"{minutes}:{whole}"


def _x(time: float, duration: float) -> int:
    left, right = _MARGIN + _GUTTER, _WIDTH - _MARGIN
    return round(left + (right - left) * min(max(time / duration, 0.0), 1.0)) if duration > 0 else left


def _pictures(watched: Watched) -> list[tuple[float, int, Image.Image]]:
    """Time, tokens and thumbnail of the shown frames that have the most, in order of time."""
    counts = [count for count in watched.tokens if count]
    times = [time for time, count in zip(watched.times, watched.tokens, strict=True) if count]
    best = sorted(sorted(range(len(counts)), key=lambda index: -counts[index])[:_PICTURES])
    width = (_WIDTH - 2 * _MARGIN) // _PICTURES - 12
    found = []
    for index in best:
        picture = watched.frames[index].image.convert("RGB")
        scale = min(width / picture.width, _TALLEST / picture.height)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        found.append((times[index], counts[index], picture.resize(size, Image.Resampling.BICUBIC)))
    return found


def _draw_pictures(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    pictures: Sequence[tuple[float, int, Image.Image]],
    watched: Watched,
    top: int,
    tall: int,
) -> None:
    """Thumbnails side by side, each tied to its place on the time axis."""
    step = (_WIDTH - 2 * _MARGIN) / max(len(pictures), 1)
    for number, (time, count, picture) in enumerate(pictures):
        left = round(_MARGIN + number * step + (step - picture.width) / 2)
        page.paste(picture, (left, top + tall - picture.height))
        middle, below = left + picture.width // 2, top + tall
        caption = f"{clock_time(time)}, {count} tokens"
        pen.text((middle, below + 4), caption, font=_font(14), fill=_TEXT, anchor="ma")
        pen.line((middle, below + 24, _x(time, watched.duration), below + 52), _QUIET)


def _draw_band(pen: ImageDraw.ImageDraw, name: str, values: Sequence[float], watched: Watched, top: int) -> None:
    """One bar per frame; frames without tokens are quiet."""
    floor, highest = top + _BAND, max(values, default=0.0)
    pen.text((_MARGIN, top + _BAND / 2), name, font=_font(17), fill=_TEXT, anchor="lm")
    label = f"{highest:.2f}" if name == "score" else f"{highest:.0f}"
    pen.text((_MARGIN + _GUTTER - 10, top), label, font=_font(14), fill=_MUTED, anchor="rm")
    pen.line((_x(0, 1), floor, _WIDTH - _MARGIN, floor), _RAIL)
    room = (_WIDTH - _MARGIN - _x(0, 1)) / max(len(values), 1)
    half = max(0, min(round(room / 2) - 1, 8))
    for time, value, count in zip(watched.times, values, watched.tokens, strict=True):
        height = round(_BAND * value / highest) if highest > 0 else 0
        middle, color = _x(time, watched.duration), _ACCENT if count else _QUIET
        if height:
            pen.rectangle((middle - half, floor - height, middle + half, floor - 1), color)


def _draw_axis(pen: ImageDraw.ImageDraw, duration: float, top: int) -> None:
    """Times under the bands."""
    step = next((step for step in _STEPS if duration / step <= 12), _STEPS[-1])
    for number in range(int(duration / step) + 1):
        at = _x(number * step, duration)
        pen.line((at, top - 6, at, top), _QUIET)
        pen.text((at, top + 6), clock_time(number * step), font=_font(14), fill=_MUTED, anchor="ma")


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, color: tuple[int, int, int]) -> None:
    """A line of text, cut where the page ends."""
    text, font = " ".join(text.split()), _font(size)
    room = _WIDTH - _MARGIN - place[0]
    if font.getlength(text) > room:
        while text and font.getlength(text + "…") > room:
            text = text[: max(0, min(len(text) - 1, int(len(text) * room / font.getlength(text + "…"))))]
        text += "…"
    pen.text(place, text, font=font, fill=color)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]
