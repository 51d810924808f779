"""VLMEvalKit with a budget: ``partial(VLMBudget, model_path=..., method="hired", budget=0.2)`` in its ``config.py``.

The kit is imported only where it is installed; without it the class has the same interface on its own.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vlm_budget.errors import TaskError
from vlm_budget.eval.adapters.answerer import Answerer, Setting
from vlm_budget.eval.adapters.decoding import Decoding, sampling
from vlm_budget.eval.adapters.meter import check_report, write_report
from vlm_budget.eval.adapters.turn import Turn
from vlm_budget.eval.sample import Clip, Picture

_VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class _Interface:
    """What the kit asks of a model, where the kit is not installed."""

    def set_dump_image(self, dump_image_func: Any) -> None:
        """Take the function that writes a record's pictures to files."""
        self.dump_image_func = dump_image_func

    def dump_image(self, line: Any, dataset: Any) -> Any:
        """Paths of a record's pictures."""
        return self.dump_image_func(line)

    def generate(self, message: Any, dataset: str | None = None) -> str:
        """Answer text, a list of texts and files, or a message."""
        answer: str = self.generate_inner(_message(message), dataset)  # type: ignore[attr-defined]
        return answer


def _base() -> Any:
    if importlib.util.find_spec("vlmeval") is None:
        return _Interface
    from vlmeval.vlm.base import BaseModel

    return BaseModel


class VLMBudget(_base()):  # type: ignore[misc]
    """Any model that this library supports, under any of its methods.

    Args:
        model_path: ``nano``, a local folder or a hub id.
        method: ``hired``, ``hired+fastv``, ``hired(alpha=0.3)``, or ``unpatched`` for the model as it is. None takes
            the default for the model.
        budget: What each prompt may spend: ``0.2``, ``128``, ``"40% flops"``, …
        plan: A recipe's file, instead of method and budget.
        positions: ``"packed"`` or ``"original"``, to override the method's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        max_new_tokens: Longest answer.
        nframe: Frames that are taken of a video; the kit sets it to the dataset's.
        report: A file for tokens and times, as JSON, written after every answer.
        temperature: Above 0 to draw answers.
        top_p: For drawn answers.
        options: Fields of the method.

    Raises:
        VLMBudgetError: The model, or one of the others, cannot be used; the message says which.
    """

    is_api = False
    INTERLEAVE = True
    allowed_types = ["text", "image", "video"]

    def __init__(
        self,
        model_path: str = "nano",
        method: str | None = None,
        budget: str | float | None = None,
        plan: str | None = None,
        positions: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int = 2048,
        nframe: int = 32,
        report: str | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_report(report)
        self.model_path, self.report, self.nframe, self.fps = model_path, report, nframe, None
        self.answerer = Answerer(Setting(model_path, method, budget, plan, positions, options, device, dtype, nframe))
        # The kit cuts videos into pictures for models without this mark.
        self.VIDEO_LLM = self.answerer.videos
        self._decoding = Decoding(max_new_tokens, (), sampling({"temperature": temperature, "top_p": top_p}))

    def use_custom_prompt(self, dataset: Any) -> bool:
        """Never: the dataset writes the prompt, so that methods are compared on the kit's own."""
        return False

    def build_prompt(self, line: Any, dataset: Any = None) -> NoReturn:
        """Not supported.

        Raises:
            TaskError: Always.
        """
        raise TaskError("VLMBudget has no prompts of its own; ask the dataset's build_prompt")

    def generate_inner(self, message: Any, dataset: str | None = None) -> str:
        """The answer to a message of text, pictures and videos in order.

        Args:
            message: Parts as ``{"type": "text" | "image" | "video", "value": ...}``.
            dataset: Name of the dataset; it changes nothing.

        Raises:
            ImageError: A picture or video cannot be read.
            TaskError: A part is none of these.
        """
        turn = Turn(tuple(_part(part) for part in _message(message)))
        answer = self.answerer.answer([turn], self._decoding, frames=self.nframe)[0]
        logging.getLogger("vlm_budget").info("%s", self.answerer.meter.line())
        if self.report is not None:
            write_report(self.report, self.answerer.facts())
        return answer

    def chat_inner(self, message: Any, dataset: str | None = None) -> NoReturn:
        """Not supported.

        Raises:
            TaskError: Always.
        """
        raise TaskError("VLMBudget answers single questions; a dataset of dialogues (type MT) needs another model")


def _message(given: Any) -> list[Mapping[str, Any]]:
    """A message as the kit writes it, from text, a list of texts and files, or one part."""
    parts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return [_named(part) if isinstance(part, str) else part for part in parts]


def _named(text: str) -> dict[str, str]:
    """A string of a list: the path of a picture or video that is there, or text."""
    suffix = Path(text).suffix.lower() if len(text) < 1024 and "\n" not in text else ""
    kind = "image" if suffix in _IMAGES else "video" if suffix in _VIDEOS else "text"
    return {"type": kind if kind != "text" and Path(text).is_file() else "text", "value": text}


def _part(part: Any) -> str | Picture | Clip:
    kind: Any = part.get("type") if isinstance(part, Mapping) else None
    value: Any = part.get("value") if isinstance(part, Mapping) else part
    if kind == "text":
        return str(value)
    if kind == "image":
        path = str(value).removeprefix("file://")
        return Picture(Path(path).name, Path(path)) if isinstance(value, str | Path) else Picture("picture", value)
    if kind == "video" and isinstance(value, str | Path):
        path = str(value).removeprefix("file://")
        return Clip(Path(path).name, Path(path))
    raise TaskError(
        f"a part of a message is {{'type': 'text' | 'image' | 'video', 'value': ...}}, got type {kind!r} with a "
        f"{type(value).__name__}"
    )
