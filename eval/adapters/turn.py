"""One question as a harness puts it: text, pictures and videos in the order in which they are to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_budget.eval.sample import Clip, Picture
from vlm_budget.prompts import encode_prompts, image_token

if TYPE_CHECKING:
    from PIL import Image

MARKER = "<image>"
"""What harnesses write where a picture belongs."""


@dataclass(frozen=True, eq=False)
class Turn:
    """A question.

    Attributes:
        parts: Text, pictures and videos in order.
    """

    parts: tuple[str | Picture | Clip, ...]

    @classmethod
    def marked(cls, text: str, visuals: Sequence[Picture | Clip]) -> Turn:
        """Text with its pictures at its markers, if there is one for each; else all of them in front."""
        pieces = text.split(MARKER)
        if len(pieces) - 1 != len(visuals) or not visuals:
            return cls((*visuals, "".join(pieces)))
        parts: list[str | Picture | Clip] = [pieces[0]]
        for visual, piece in zip(visuals, pieces[1:], strict=True):
            parts += [visual, piece]
        return cls(tuple(part for part in parts if part != ""))

    @property
    def visuals(self) -> list[Picture | Clip]:
        """Its pictures and videos."""
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def length(self) -> int:
        """About how long its prompt is, to answer like with like: letters, and a lot for every picture."""
        return sum(len(part) if isinstance(part, str) else _LETTERS[type(part)] for part in self.parts)

    def kind(self, videos: bool) -> str:
        """What the processor is given for it: ``"text"``, ``"image"`` or ``"video"``.

        Args:
            videos: The processor knows videos. One that does not gets their frames as pictures, and so does one that is
                asked about several, or about pictures, too.
        """
        visuals = self.visuals
        if not visuals:
            return "text"
        return "video" if videos and len(visuals) == 1 and isinstance(visuals[0], Clip) else "image"


_LETTERS: dict[type, int] = {Picture: 1_000, Clip: 10_000}


@dataclass(frozen=True, eq=False)
class Prompts:
    """Questions of one kind, ready for the processor.

    Attributes:
        texts: Whole prompts, as the model was trained to see them.
        pictures: Per prompt, its pictures, or the frames of its video.
        kind: ``"text"``, ``"image"`` or ``"video"``.
    """

    texts: list[str]
    pictures: list[list[Image.Image]]
    kind: str

    @classmethod
    def of(
        cls, processor: Any, turns: Sequence[Turn], kind: str, frames: Callable[[Clip], list[Image.Image]]
    ) -> Prompts:
        """Read what the questions show, and write their prompts.

        Args:
            processor: The model's processor.
            turns: Questions of one kind.
            kind: That kind.
            frames: Reads a video.

        Raises:
            ImageError, DataError: A picture or video cannot be read.
        """
        texts, pictures = [], []
        for turn in turns:
            content: list[dict[str, str]] = []
            shown: list[Image.Image] = []
            for part in turn.parts:
                if isinstance(part, str):
                    content.append({"type": "text", "text": _harmless(processor, part)})
                    continue
                own = frames(part) if isinstance(part, Clip) else [part.load()]
                content += [{"type": kind}] * (1 if kind == "video" else len(own))
                shown += own
            texts.append(_text(processor, content))
            pictures.append(shown)
        return cls(texts, pictures, kind)

    def inputs(self, processor: Any, model: Any) -> Any:
        """The processor's tensors, padded on the left, on the model's device and in its number format."""
        if self.kind != "video":
            return encode_prompts(processor, self.texts, self.pictures, model)
        clips = [np.stack([np.asarray(frame) for frame in own]) for own in self.pictures]
        return encode_prompts(processor, self.texts, clips, model, videos=True)


def _harmless(processor: Any, text: str) -> str:
    """Text without what stands for a picture, which would be taken for one."""
    for token in (MARKER, image_token(processor), image_token(processor, "video")):
        text = text.replace(token, "")
    return text


def _text(processor: Any, content: Sequence[dict[str, str]]) -> str:
    if getattr(processor, "chat_template", None):
        turn = [{"role": "user", "content": list(content)}]
        text: str = processor.apply_chat_template(turn, add_generation_prompt=True)
        return text
    return "".join(part["text"] if part["type"] == "text" else image_token(processor, part["type"]) for part in content)
