"""Frame scores of a small VLM: how much it leans to yes over no.

As QuoTA (arXiv 2503.08689) asks, with the probability renormalised: the release takes the softmax over the whole
vocabulary at one token, so that whatever goes to other spellings of the answer lowers a score. Here it is
``sigmoid(logsumexp(yes) - logsumexp(no))`` over sets of tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlm_budget.errors import FrameScoreError, OptionError
from vlm_budget.prompts import build_inputs

from .prompting import plain
from .queries import Query, scorer_question, yes_no

if TYPE_CHECKING:
    from PIL import Image

    from .scorers import Progress

YES = ("A", "Yes", "yes", "YES")
NO = ("B", "No", "no", "NO")


class YesNoScorer:
    """A transformers VLM that is asked about every frame by itself.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        yes: Spellings of yes; of each, with and without a space before it, the first token counts.
        no: Spellings of no.
        batch: Frames per forward.
        max_pixels: Larger frames are made smaller first; the default is 256 tokens of Qwen2-VL. None leaves them.

    Raises:
        FrameScoreError: The tokenizer has no token that is in one set alone.
        OptionError: ``batch`` or ``max_pixels`` is below 1.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        yes: Sequence[str] = YES,
        no: Sequence[str] = NO,
        batch: int = 8,
        max_pixels: int | None = 256 * 28 * 28,
    ) -> None:
        if batch < 1 or (max_pixels is not None and max_pixels < 1):
            raise OptionError(f"frames per forward and pixels must be at least 1, got {batch} and {max_pixels}")
        self.model, self.processor = model, processor
        self.batch, self.max_pixels = batch, max_pixels
        self.yes, self.no = answer_tokens(processor.tokenizer, yes, no)
        self._lean = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def load(cls, name: str, device: str = "cpu", **options: Any) -> YesNoScorer:
        """Load a model of a supported family.

        Args:
            name: A shipped model, a folder, or a hub id.
            device: Where to run it.
            options: Of the scorer.

        Raises:
            ModelLoadError: There is no such model, or it cannot be loaded.
            UnsupportedModelError: No family knows its class; give other models as ``YesNoScorer(model, processor)``.
        """
        from vlm_budget.cli.loading import load

        kind, _, number = device.partition(":")
        loaded = load(name, kind, "auto", lambda step: None)
        return cls(loaded.model.to(device) if number else loaded.model, loaded.processor, **options)

    def score(
        self, frames: Sequence[Image.Image], clues: Sequence[str], progress: Progress | None = None
    ) -> torch.Tensor:
        """[T, C] float32 in [0, 1] on the CPU, asking whether a frame shows each of the clues."""
        done: Callable[[int], None] | None = None
        total = len(frames) * len(clues)
        columns = []
        for number, clue in enumerate(clues):
            if progress is not None:
                done = _behind(progress, number * len(frames), total)
            columns.append(self.ask(frames, yes_no(f"Does this picture show this: {clue}?"), done))
        return torch.stack(columns, dim=1) if columns else torch.zeros(len(frames), 0)

    def relevance(self, frames: Sequence[Image.Image], query: Query, progress: Progress | None = None) -> torch.Tensor:
        """[T] float32 in [0, 1] on the CPU, asking once about all that the query looks for."""
        done = None if progress is None else _behind(progress, 0, len(frames))
        return self.ask(frames, scorer_question(query), done)

    @torch.no_grad()
    def ask(
        self, frames: Sequence[Image.Image], question: str, done: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        """[T] float32, the probability of yes over no.

        Args:
            frames: The pictures.
            question: One question for all of them.
            done: Told how many are answered.

        Raises:
            OptionError: The question holds a token that stands for pictures.
        """
        plain(self.processor, question)
        chances = []
        for start in range(0, len(frames), self.batch):
            part = [[self._small(frame)] for frame in frames[start : start + self.batch]]
            inputs = build_inputs(self.processor, [question] * len(part), part, self.model)
            lean = {"logits_to_keep": 1} if self._lean else {}
            last = self.model(**inputs, use_cache=False, **lean).logits[:, -1].float()  # prompts are padded on the left
            lead = last[:, list(self.yes)].logsumexp(1) - last[:, list(self.no)].logsumexp(1)
            chances.append(lead.sigmoid().cpu())
            if done is not None:
                done(start + len(part))
        return torch.cat(chances) if chances else torch.zeros(0)

    def _small(self, frame: Image.Image) -> Image.Image:
        frame = frame.convert("RGB")
        if self.max_pixels is None or frame.width * frame.height <= self.max_pixels:
            return frame
        scale = math.sqrt(self.max_pixels / (frame.width * frame.height))
        return frame.resize((max(1, int(frame.width * scale)), max(1, int(frame.height * scale))))


def answer_tokens(tokenizer: Any, yes: Sequence[str], no: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first tokens of all spellings, with and without a space before them; what begins both answers is left out.

    Raises:
        FrameScoreError: Nothing is left of a set.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    first: list[set[int]] = []
    for spellings in (yes, no):
        texts = [space + word for word in spellings for space in ("", " ")]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        first.append({own[0] for own in ids if own and own[0] != unknown})
    for mine, other, spellings in ((first[0], first[1], yes), (first[1], first[0], no)):
        if not mine - other:
            raise FrameScoreError(
                f"no token of {type(tokenizer).__name__} begins one of {', '.join(spellings)} and none of the other "
                "answers; name spellings it knows with yes=... and no=..."
            )
    return tuple(sorted(first[0] - first[1])), tuple(sorted(first[1] - first[0]))


def _behind(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda count: progress(before + count, total)
