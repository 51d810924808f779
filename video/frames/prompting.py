"""Prompts about the frames of a video that say truly how many there are and when they are shown.

Frames that got no tokens are not spoken of. The release of QuoTA (arXiv 2503.08689) tells the model of one frame, and
of the moments of frames it has dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_budget.errors import OptionError
from vlm_budget.prompts import image_token, prompt_text


def time_instruction(times: Sequence[float], duration: float | None = None) -> str:
    """What a model of the LLaVA-Video kind is told of the frames it gets; the wording is ours.

    Args:
        times: Seconds at which the frames are shown, in order.
        duration: Seconds that the video lasts, if known.
    """
    lasts = "" if duration is None else f"The video lasts {duration:.2f} seconds. "
    moments = ", ".join(f"{time:.2f}s" for time in times)
    if len(times) == 1:
        return f"{lasts}1 frame of it is given, shown at {moments}."
    return f"{lasts}{len(times)} frames of it are given in order, shown at {moments}."


def stamp(time: float) -> str:
    """The text before a frame, in the form that Qwen3-VL was trained with."""
    return f"<{time:.1f} seconds>"


def video_text(processor: Any, question: str, times: Sequence[float] = (), duration: float | None = None) -> str:
    """The whole prompt of one video, as the processor takes it.

    Args:
        processor: The model's processor.
        question: The question.
        times: Seconds at which the frames that have tokens are shown; none to say nothing of them.
        duration: Seconds that the video lasts, if known.

    Raises:
        OptionError: The question holds a token that stands for pictures.
    """
    plain(processor, question)
    told = f"{time_instruction(times, duration)}\n{question}" if len(times) else question
    return prompt_text(processor, told, 1, "video")


def frames_text(
    processor: Any, question: str, count: int, times: Sequence[float] = (), kind: str = "image", stamps: bool = True
) -> str:
    """The whole prompt of frames that are pictures, or one-frame videos, of their own.

    Args:
        processor: The model's processor.
        question: The question.
        count: Number of frames.
        times: Seconds at which they are shown; none to say nothing of them.
        kind: ``"image"`` or ``"video"``: what each frame is to the processor.
        stamps: Write the times before the frames; without, the processor does it.

    Raises:
        OptionError: The question holds a token that stands for pictures.
    """
    plain(processor, question)
    if not len(times) or not stamps:
        return prompt_text(processor, question, count, kind)
    content = [part for time in times for part in ({"type": "text", "text": stamp(time)}, {"type": kind})]
    if getattr(processor, "chat_template", None):
        content.append({"type": "text", "text": question})
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    token = image_token(processor, kind)
    return "".join(stamp(time) + token for time in times) + question


def plain(processor: Any, text: str) -> str:
    """A text without tokens that stand for pictures.

    Raises:
        OptionError: It holds one; the pictures would be put there.
    """
    for token in dict.fromkeys(image_token(processor, kind) for kind in ("image", "video")):
        if token in text:
            raise OptionError(f"the text holds {token!r}, which stands for a picture in this model's prompts")
    return text
