"""How much the frames of a video have to do with a question: one protocol, and scorers by name.

``load_scorer("clip:FOLDER_OR_NAME")`` and ``load_scorer("vlm:FOLDER_OR_NAME")`` load the scorers of
:mod:`~vlm_budget.video.frames.clip` and :mod:`~vlm_budget.video.frames.yes_no`; whatever has a ``score`` method works
as well. Scores are read as ratios of each other, so scorers need not agree on a scale within [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from vlm_budget.errors import FrameScoreError, OptionError
from vlm_budget.registry import Registry

from .queries import Query, as_query

if TYPE_CHECKING:
    from PIL import Image

Progress = Callable[[int, int], None]
"""Told how many of how many frames are scored."""


@runtime_checkable
class FrameScorer(Protocol):
    """What scores frames.

    A scorer that reads a whole query better than its clues one by one also has
    ``relevance(frames, query, progress=None) -> [T]``.
    """

    def score(self, frames: Sequence[Image.Image], clues: Sequence[str], progress: Progress | None = None) -> Any:
        """[T, C] in [0, 1], how much each of T frames shows of each of C texts."""
        ...


SCORERS = Registry(
    "frame scorer",
    "vlm_budget.video.frames.scorers:FrameScorer",
    {
        "clip": "vlm_budget.video.frames.clip:ClipScorer",
        "vlm": "vlm_budget.video.frames.yes_no:YesNoScorer",
    },
)


def load_scorer(spec: str, device: str = "cpu") -> FrameScorer:
    """A scorer by name.

    Args:
        spec: ``"clip:FOLDER"`` or ``"clip:ARCHITECTURE/PRETRAINED"`` (open_clip), ``"vlm:FOLDER_OR_HUB_ID"``; or
            another registered kind.
        device: Where to run it.

    Raises:
        OptionError: Nothing is named behind the kind.
        UnknownNameError: No such kind.
        ModelLoadError: The model is not there or cannot be loaded.
        MissingExtraError: A library is not installed.
    """
    kind, colon, name = spec.partition(":")
    scorer: Any = SCORERS.get(kind)
    if not colon or not name:
        raise OptionError(f"a scorer is named as {kind}:NAME_OR_FOLDER, got {spec!r}")
    return scorer.load(name, device)


def relevance(
    scorer: FrameScorer, frames: Sequence[Image.Image], query: Query | str, progress: Progress | None = None
) -> torch.Tensor:
    """[T] float32, how much every frame has to do with a query.

    The scorer's own ``relevance`` where it has one, else the best score over the query's clues.

    Raises:
        FrameScoreError: The scorer gave scores of another shape, outside [0, 1], or not finite.
        OptionError: The query is no usable question.
    """
    query = as_query(query)
    own = getattr(scorer, "relevance", None)
    if own is not None:
        return check_scores(own(frames, query, progress), (len(frames),), type(scorer).__name__)
    shape = (len(frames), len(query.clues))
    return check_scores(scorer.score(frames, query.clues, progress), shape, type(scorer).__name__).amax(1)


def check_scores(scores: Any, shape: tuple[int, ...], who: str = "the scores") -> torch.Tensor:
    """Scores as float32 on the CPU.

    Args:
        scores: A tensor, an array or nested numbers.
        shape: What shape they must have.
        who: Whose they are, for messages.

    Raises:
        FrameScoreError: Another shape, outside [0, 1], or not finite.
    """
    try:
        found = torch.as_tensor(scores).detach().to("cpu", torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise FrameScoreError(f"{who}: not numbers: {error}") from error
    if found.shape != shape:
        raise FrameScoreError(f"{who}: expected scores of shape {list(shape)}, got {list(found.shape)}")
    broken = (~found.isfinite()).nonzero()
    if len(broken):
        at = ", ".join(map(str, broken[0].tolist()))
        raise FrameScoreError(
            f"{who}: {len(broken)} of {found.numel()} scores are NaN or infinite, the first at [{at}]"
        )
    if found.numel() and (found.min() < 0 or found.max() > 1):
        raise FrameScoreError(
            f"{who}: scores lie in [0, 1], got {found.min():.4g} to {found.max():.4g}. Give probabilities, or divide "
            "by the largest."
        )
    return found


class GivenScores:
    """Scores worked out before, one per frame in the order of the frames.

    Args:
        scores: [T] in [0, 1].

    Raises:
        FrameScoreError: Not a list of finite numbers in [0, 1].
    """

    def __init__(self, scores: Any) -> None:
        try:
            length = len(scores)
        except TypeError as error:
            raise FrameScoreError(f"given scores are one number per frame, got {scores!r:.80}") from error
        self.scores = check_scores(scores, (length,), "given scores")

    def score(
        self, frames: Sequence[Image.Image], clues: Sequence[str], progress: Progress | None = None
    ) -> torch.Tensor:
        """[T, C]: every clue gets what was given.

        Raises:
            FrameScoreError: There are not as many frames as scores.
        """
        if len(frames) != len(self.scores):
            raise FrameScoreError(f"{len(self.scores)} scores were given for {len(frames)} frames")
        if progress is not None:
            progress(len(frames), len(frames))
        return self.scores[:, None].expand(-1, len(clues)).clone()
