"""T*: temporal search for the few frames that a question is about, without scoring them all.

Re-thinking Temporal Search for Long-Form Video Understanding, arXiv 2504.02259 (CVPR 2025), written from a restatement
of its algorithm. The paper's are the rounds: draw a batch of frames, score it, spread high scores to their neighbours,
estimate the score of every other frame from those visited, draw the next batch where that is high (the upper quarter),
verify targets at a threshold, stop when all are verified or the budget is spent.

Ours, and why:

* A look is a batch of whole frames under a CLIP-like scorer, instead of one detector call on a mosaic of small frames.
* Estimates are piecewise linear instead of a cubic smoothing spline, and become chances by ``softmax(P / T)``: the
  released sigmoid of values in [0, 1] leaves them all but equal.
* ``explore="cover"``: most of every round goes over a grid of ``stride`` seconds, coarse to fine, until no gap is
  wider. Draws from the upper quarter alone (``explore="percentile"``, the paper's) may miss what lies in long gaps.
* The kept frames are the best ones with temporal non-maximum suppression, the best frame of every target first; the
  released code draws them at random. A frame with a better one close by counts half, so that the shoulder of one event
  does not push out another event.
* Once the grid is covered, the gaps beside the kept frames and beside every target's best are halved first, so that
  a search ends on the tops of events and not on their shoulders.
* The search may also stop when it has settled: the grid is covered, nothing beside the kept frames is left to look at,
  and those at the threshold (all, if none is) have not changed for some rounds. That is the default, since stopping
  once every target has been seen (``stop="verified"``, the paper's) misses where they are seen again.
* Everything is deterministic; ties go to the earlier frame, and where all scores are equal, the kept frames are spread
  evenly.

What no search can do: an event narrower than the gaps of the grid, without context that raises the score around it, is
found as often as the frames visited happen to hold it. Nothing less than looking at all frames finds it surely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vlm_budget.errors import OptionError, VideoError
from vlm_budget.search.checks import whole

from .rounds import Look, Rounds
from .scorers import check_scores

if TYPE_CHECKING:
    from .reader import Video
    from .scorers import FrameScorer

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class TStar:
    """How to search.

    Attributes:
        batch: Frames per round (the paper's g x g mosaic).
        threshold: Confidence in [0, 1] at which a target counts as seen.
        budget: Frames that may be visited: a share in (0, 1], or a number. A share means at least the kept frames.
        target_weight: What a target's confidence counts for a frame's score.
        cue_weight: What a cue's confidence counts.
        percentile: Frames below this percentile of the chances are not drawn.
        spread: Seconds to which a high score spreads, divided by 1 + distance.
        temperature: T of the softmax over estimates.
        apart: Least distance of kept frames, in seconds; halved until enough fit where the video is too short.
        stride: Widest gap of the covering grid, in seconds; wider where the budget does not reach; default 2 x spread.
        patience: Rounds without a change of the kept frames after which the search has settled.
        stop: ``"settled"``, or ``"verified"``: also once every target has been seen.
        explore: ``"cover"`` (ours), or ``"percentile"`` (the paper's); see module text.
        seed: Of the draws.
    """

    batch: int = 16
    threshold: float = 0.6
    budget: int | float = 0.15
    target_weight: float = 1.0
    cue_weight: float = 0.5
    percentile: float = 75.0
    spread: float = 5.0
    temperature: float = 0.1
    apart: float = 3.0
    stride: float | None = None
    patience: int = 2
    stop: Literal["settled", "verified"] = "settled"
    explore: Literal["cover", "percentile"] = "cover"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        for name, least in (("batch", 1), ("patience", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        for name, top in (("threshold", 1), ("target_weight", 1), ("cue_weight", 1), ("percentile", 100)):
            _number(name, getattr(self, name), top)
        for name in ("spread", "apart"):
            _number(name, getattr(self, name))
        for name in ("temperature",) if self.stride is None else ("temperature", "stride"):
            if not _number(name, getattr(self, name)):
                raise OptionError(f"{name} must be above 0, got 0")
        if isinstance(self.budget, int):
            whole("budget", self.budget, 1)
        elif not _number("budget", self.budget, 1):
            raise OptionError("budget must be a share in (0, 1] or a number of frames from 1 on, got 0")
        if self.stop not in ("settled", "verified"):
            raise OptionError(f"stop must be 'settled' or 'verified', got {self.stop!r}")
        if self.explore not in ("cover", "percentile"):
            raise OptionError(f"explore must be 'cover' or 'percentile', got {self.explore!r}")


@dataclass(frozen=True)
class Found:
    """What a search found; frames are numbers of candidates, ascending.

    Attributes:
        kept: The frames to show.
        times: When they are shown, in seconds.
        scores: Their scores in [0, 1]; estimates where a frame was not visited.
        visited: Every frame that was looked at.
        measured: Their scores.
        expected: The score of every candidate: measured where visited, else estimated.
        targets: Per target the visited frame that shows it best, or None where none reached the threshold.
        rounds: Looks that were taken.
        verified: Frames that were looked at a second time, by ``verify``.
        why: What ended the search: ``"verified"``, ``"settled"`` or ``"budget"`` (spent).
    """

    kept: tuple[int, ...]
    times: tuple[float, ...]
    scores: tuple[float, ...]
    visited: tuple[int, ...]
    measured: tuple[float, ...]
    expected: tuple[float, ...]
    targets: tuple[int | None, ...]
    rounds: int
    verified: int
    why: str


def search(
    look: Look,
    frames: int,
    *,
    targets: int,
    cues: int = 0,
    keep: int = 8,
    times: Sequence[float] | None = None,
    verify: Look | None = None,
    settings: TStar | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search candidates for the frames that show the targets.

    Args:
        look: Gives the confidences [m, targets + cues] in [0, 1] of m candidates, whose numbers come ascending; no
            candidate is asked for twice.
        frames: Number of candidates.
        targets: Things to find, at least one; the first columns of a look.
        cues: Things that stand near them; the last columns of a look.
        keep: Frames to keep; all candidates where there are no more, visited or not.
        times: When every candidate is shown, in seconds, increasing; default one per second.
        verify: A finer look [m, targets]. It is asked for frames at which a target not yet seen reaches the threshold,
            and its answer counts instead. Without it, reaching the threshold is enough.
        settings: Default ``TStar()``.
        progress: Is told the visited frames and the budget after every round.

    Raises:
        FrameScoreError: A look gave another shape, or something that is not a confidence.
        OptionError: An argument that makes no sense: no frames, no targets, a budget below ``keep``.
    """
    whole("frames", frames, 1)
    whole("targets", targets, 1)
    whole("cues", cues, 0)
    whole("keep", keep, 1)
    settings = settings or TStar()
    shown = _clock(times, frames)
    budget, keep = settings.budget, min(keep, frames)
    if isinstance(budget, int):
        if budget < keep:
            raise OptionError(f"a budget of {budget} visited frames cannot keep {keep}: raise it, or keep fewer")
        budget = min(budget, frames)
    else:
        budget = max(min(math.ceil(budget * frames - 1e-9), frames), keep)
    run = Rounds(settings, shown, targets, cues, keep, budget)
    why = None
    while why is None:
        run.round(look, verify)
        if progress is not None:
            progress(int(run.seen.sum()), budget)
        why = run.reason_to_stop()
    kept, visited = run.kept, np.flatnonzero(run.seen)
    return Found(
        kept=tuple(kept),
        times=tuple(shown[kept].tolist()),
        scores=tuple(run.expected[kept].tolist()),
        visited=tuple(visited.tolist()),
        measured=tuple(run.score[visited].tolist()),
        expected=tuple(run.expected.tolist()),
        targets=tuple(run.best()),
        rounds=run.rounds,
        verified=run.verified,
        why=why,
    )


def look_from(
    video: Video,
    scorer: FrameScorer,
    times: Sequence[float],
    clues: Sequence[str],
    batch: int = 32,
    progress: Callable[[int], None] | None = None,
) -> Look:
    """A look at a video's frames: reads them by time, and has them scored.

    Args:
        video: An open :class:`~vlm_budget.video.frames.reader.Video`.
        scorer: Gives [frames, clues] in [0, 1].
        times: When every candidate is shown, in seconds.
        clues: Targets first, then cues, as text.
        batch: Frames read and scored at once.
        progress: Is told the frames scored so far after every batch.

    Raises:
        OptionError: No clues, or ``batch`` is below 1.
        VideoError: From the look: the reader gave fewer frames than it was asked for.
        FrameScoreError: From the look: the scorer gave another shape.
    """
    whole("batch", batch, 1)
    if isinstance(clues, str) or not clues:
        raise OptionError(f"a look needs a list of clues to score frames by, got {clues!r}")
    clues, done = list(clues), 0

    def look(indices: Sequence[int]) -> torch.Tensor:
        nonlocal done
        parts = []
        for start in range(0, len(indices), batch):
            asked = [times[index] for index in indices[start : start + batch]]
            read = video.at(asked)
            if len(read) != len(asked):
                raise VideoError(f"{len(asked)} frames were asked for, and {len(read)} could be read")
            found = scorer.score([frame.image for frame in read], clues)
            parts.append(check_scores(found, (len(asked), len(clues)), type(scorer).__name__))
            done += len(asked)
            if progress is not None:
                progress(done)
        return torch.cat(parts) if parts else torch.zeros(0, len(clues))

    return look


def _clock(times: Sequence[float] | None, frames: int) -> np.ndarray:
    """[frames] float64 seconds."""
    if times is None:
        return np.arange(frames, dtype=np.float64)
    try:
        clock = np.asarray(times, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OptionError(f"times of candidates must be numbers of seconds: {error}") from error
    if clock.shape != (frames,):
        raise OptionError(f"{frames} candidates need as many times, got shape {clock.shape}")
    if not np.isfinite(clock).all() or (np.diff(clock) <= 0).any():
        raise OptionError("times of candidates must be finite and increasing")
    return clock


def _number(name: str, value: Any, top: float = math.inf) -> float:
    """The value, where it is a finite number in [0, top]."""
    known = isinstance(value, Real) and not isinstance(value, bool)
    if not known or not 0 <= float(value) <= top or not math.isfinite(value):
        raise OptionError(
            f"{name} must be a finite number {'from 0 on' if top == math.inf else f'in [0, {top}]'}, got {value!r}"
        )
    return float(value)
