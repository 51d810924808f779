"""A question about a video, answered within a budget: which frames matter, how many tokens each gets, and the answer.

>>> watched = watch("film.mp4", "Who opens the door?", model, processor, scorer="clip:ViT-B-16-SigLIP/webli")
>>> watched.answer, watched.tokens
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlm_budget.budget import Budget
from vlm_budget.errors import OptionError, VideoError
from vlm_budget.models import find_family
from vlm_budget.prompts import build_inputs
from vlm_budget.registry import PRUNERS

from .answering import Asked, answer_frames
from .prompting import plain
from .queries import Kind, Query, as_query, decouple
from .reader import Frame, Video
from .sampling import dynamic_frames, seconds, whole
from .scorers import FrameScorer, GivenScores, load_scorer, relevance
from .tstar import TStar, look_from, search

if TYPE_CHECKING:
    from PIL import Image

    from vlm_budget.pruner import Pruner
    from vlm_budget.report import Report

How = Literal["quota", "tstar", "uniform"]
HOW: tuple[How, ...] = ("quota", "tstar", "uniform")
BUDGET = "50%"
KEEP = 8
"""Frames that a search keeps."""
MAX_PIXELS = 768 * 28 * 28
"""Frames are read no larger; many are held at once."""

Progress = Callable[[str, int, int], None]
"""Told the stage, and how many of how many frames are done."""


@dataclass(frozen=True)
class Watched:
    """What was seen of a video, and the answer.

    Attributes:
        answer: The model's.
        method: ``"quota"``, ``"tstar"`` or ``"uniform"``.
        query: What was looked for.
        duration: Seconds that the video lasts.
        times: Seconds at which the frames are shown that were looked at; of ``"tstar"`` those it visited.
        scores: Relevance of each; None where nothing was scored.
        tokens: Tokens of each in the prompt; 0 of frames the model was not told of.
        frames: The frames that have tokens.
        budget: Tokens that were allowed.
        dense: Tokens of all frames at the model's own resolution (of ``"tstar"``, of the kept ones).
        separators: Tokens of the prompt that belong to no frame.
        prompt: The whole prompt.
        seconds: Wall clock per stage: ``load``, ``read``, ``decouple``, ``score``, ``prepare``, ``answer``.
        report: What the patched model did with the prompt.
    """

    answer: str
    method: How
    query: Query
    duration: float
    times: tuple[float, ...]
    scores: tuple[float, ...] | None
    tokens: tuple[int, ...]
    frames: tuple[Frame, ...] = field(repr=False)
    budget: int
    dense: int
    separators: int
    prompt: str = field(repr=False)
    seconds: dict[str, float]
    report: Report = field(repr=False)

    @property
    def spent(self) -> int:
        """Visual tokens of the prompt."""
        return sum(self.tokens) + self.separators

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        shown = [{"time": at, "tokens": count} for at, count in zip(self.times, self.tokens, strict=True)]
        if self.scores is not None:
            shown = [{**entry, "score": score} for entry, score in zip(shown, self.scores, strict=True)]
        query = {name: list(getattr(self.query, name)) for name in ("targets", "cues", "events")}
        return {
            "answer": self.answer,
            "method": self.method,
            "query": {"text": self.query.text, **query, "note": self.query.note},
            "duration": self.duration,
            "frames": shown,
            "tokens": {
                "budget": self.budget,
                "spent": self.spent,
                "dense": self.dense,
                "separators": self.separators,
            },
            "seconds": dict(self.seconds),
        }


def watch(
    source: str | os.PathLike[str] | Sequence[Frame] | Sequence[Image.Image],
    question: str | Query,
    model: Any,
    processor: Any,
    *,
    method: How = "quota",
    budget: Budget | str | float = BUDGET,
    scorer: FrameScorer | str | Sequence[float] | torch.Tensor | None = None,
    decoupled: Kind | None = "entities",
    frames: int | None = None,
    tell_times: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_new_tokens: int = 64,
    quota: Pruner | None = None,
    search_settings: TStar | None = None,
    progress: Progress | None = None,
) -> Watched:
    """Answer a question about a video within a budget of visual tokens.

    The model comes back unpatched, and is unpatched while it takes the question apart.

    Args:
        source: A video file, or frames in order of time; of pictures alone, no times are told.
        question: The question; a :class:`~vlm_budget.video.frames.queries.Query` says itself what to look for.
        model: A supported VLM, in evaluation mode.
        processor: Its processor.
        method: ``"quota"``: tokens per frame by relevance. ``"tstar"``: a few frames are searched, and share the
            tokens evenly. ``"uniform"``: all frames share them evenly.
        budget: A share of the tokens that all frames (of ``"tstar"``, the kept ones) have at the model's own
            resolution, or a number of tokens.
        scorer: A scorer, its name (``"clip:…"``, ``"vlm:…"``), or a score per frame. ``"uniform"`` takes none.
        decoupled: Into what the answering model takes the question apart for the scorer; None leaves it whole.
        frames: How many frames are looked at, or kept by ``"tstar"`` (8 by default). By default more for longer videos,
            and all of a list.
        tell_times: Write into the prompt when the frames are shown.
        max_pixels: Larger frames of a file are scaled down when they are read.
        max_new_tokens: Longest answer.
        quota: The method that gives frames their tokens, where it is to be set up otherwise than by default.
        search_settings: Of ``"tstar"``.
        progress: Told what comes next.

    Raises:
        OptionError: No such method, no scorer where one is needed, no usable question.
        BudgetError: The frames cannot meet the budget.
        VideoError: The video cannot be read.
        FrameScoreError: Scores that cannot be those of the frames.
        UnsupportedModelError: No family knows the model, or its frames cannot be told apart.
    """
    query, spend = check_request(question, method, budget, scorer, frames)
    find_family(model)
    plain(processor, query.text)
    clock = _Clock(progress)
    with clock.stage("load"):
        judge = _scorer(scorer, str(model.device))
    if method != "uniform" and isinstance(question, str) and decoupled and not isinstance(judge, GivenScores):
        with clock.stage("decouple"):
            query = decouple(text_answer(model, processor), query.text, decoupled)
    with _opened(source, max_pixels) as video:
        look = _search if method == "tstar" else _spread
        seen = look(video, query, judge, frames, clock, search_settings)
        duration = video.duration
    weights = list(seen.scores) if method == "quota" and seen.scores is not None else [1.0] * len(seen.shown)
    timed = isinstance(source, (str, os.PathLike)) or all(isinstance(one, Frame) for one in source)
    told = duration if tell_times and timed else None
    asked = Asked(query.text, told, max_new_tokens, quota or PRUNERS.get("quota")())
    answered = answer_frames(model, processor, seen.shown, weights, spend, asked, clock.stage)
    tokens = [0] * len(seen.times)
    for place, count in zip(seen.places, answered.tokens, strict=True):
        tokens[place] = count
    return Watched(
        answer=answered.text,
        method=method,
        query=query,
        duration=duration,
        times=tuple(seen.times),
        scores=None if seen.scores is None else tuple(seen.scores),
        tokens=tuple(tokens),
        frames=tuple(frame for frame, count in zip(seen.shown, answered.tokens, strict=True) if count),
        budget=answered.budget,
        dense=answered.dense,
        separators=answered.separators,
        prompt=answered.prompt,
        seconds=clock.seconds,
        report=answered.report,
    )


def text_answer(model: Any, processor: Any, max_new_tokens: int = 256) -> Callable[[str], str]:
    """Text to text: a VLM without a picture, greedy."""

    def answer(text: str) -> str:
        inputs = build_inputs(processor, [text], [[]], model)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        told: str = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return told

    return answer


# --- looking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """Frames that were looked at (``times``, ``scores``), and those of them (``places``) to be shown."""

    times: list[float]
    scores: list[float] | None
    places: list[int]
    shown: list[Frame]


def _spread(
    video: Any, query: Query, scorer: FrameScorer | None, count: int | None, clock: _Clock, _: TStar | None
) -> _Seen:
    with clock.stage("read") as told:
        frames = video.spread(count or video.usual_count(), progress=told)
    scores = None
    if scorer is not None:
        with clock.stage("score") as told:
            scores = relevance(scorer, [frame.image for frame in frames], query, told).tolist()
    return _Seen([frame.time for frame in frames], scores, list(range(len(frames))), frames)


def _search(
    video: Any,
    query: Query,
    scorer: FrameScorer | None,
    count: int | None,
    clock: _Clock,
    settings: TStar | None,
) -> _Seen:
    assert scorer is not None
    times = video.candidates()
    targets = (*query.targets, *query.events) or (() if query.cues else (query.text,)) or query.cues
    cues = query.cues if targets != query.cues else ()
    with clock.stage("score") as told:  # reading included: what is read depends on what was scored
        look = look_from(video, scorer, times, (*targets, *cues))
        found = search(
            look,
            len(times),
            targets=len(targets),
            cues=len(cues),
            keep=count or KEEP,
            times=times,
            settings=settings,
            progress=told,
        )
    with clock.stage("read") as told:
        frames = video.at([times[number] for number in found.kept], progress=told)
    kept = {frame.time: (number, frame) for number, frame in reversed(list(zip(found.kept, frames, strict=True)))}
    chosen = sorted(kept.values(), key=lambda pair: pair[0])  # a frame that is held for long is given once
    looked = sorted({*found.visited, *found.kept})
    shown = dict(chosen)
    return _Seen(
        [shown[number].time if number in shown else times[number] for number in looked],
        [found.expected[number] for number in looked],
        [looked.index(number) for number in shown],
        list(shown.values()),
    )


class _File(Video):
    """A video file, looked at once a second by a search."""

    def usual_count(self) -> int:
        return dynamic_frames(self.duration)

    def candidates(self) -> list[float]:
        return [float(second) for second in range(max(1, int(self.duration)))]


class Listed:
    """Frames at hand, read as a video is.

    Args:
        frames: In order of time.

    Raises:
        VideoError: There are none, or their times do not ascend.
    """

    def __init__(self, frames: Sequence[Frame]) -> None:
        times = [seconds(frame.time, "the time of a frame") for frame in frames]
        if not frames or any(one >= other for one, other in zip(times, times[1:], strict=False)):
            raise VideoError("frames must be a list that is not empty, each shown later than the one before it")
        self.frames = list(frames)
        last = times[-1] - times[-2] if len(times) > 1 else 0.0
        self.duration = times[-1] + last

    def usual_count(self) -> int:
        """All of them."""
        return len(self.frames)

    def candidates(self) -> list[float]:
        """The times of all frames."""
        return [frame.time for frame in self.frames]

    def at(self, times: Sequence[float], progress: Any = None) -> list[Frame]:
        """The frames of these times."""
        known = {frame.time: frame for frame in self.frames}
        return [known[moment] for moment in times]

    def spread(self, count: int, progress: Any = None) -> list[Frame]:
        """The middle frames of ``count`` equal pieces, every one at most once."""
        total = len(self.frames)
        count = min(count, total)
        return [self.frames[(2 * number + 1) * total // (2 * count)] for number in range(count)]


def _opened(source: Any, max_pixels: int) -> AbstractContextManager[Any]:
    if isinstance(source, (str, os.PathLike)):
        return _File.open(source, max_pixels=max_pixels)
    return nullcontext(Listed([_frame(number, one) for number, one in enumerate(source)]))


def _frame(number: int, one: Frame | Image.Image) -> Frame:
    if not isinstance(one, Frame) and not hasattr(one, "convert"):
        raise VideoError(f"frames are PIL pictures or Frame objects, got {type(one).__name__}")
    return one if isinstance(one, Frame) else Frame(one, float(number))


# --- checks and clocks -----------------------------------------------------------------------------------------------


def check_request(
    question: str | Query,
    method: str = "quota",
    budget: Budget | str | float = BUDGET,
    scorer: Any = None,
    frames: int | None = None,
) -> tuple[Query, Budget]:
    """Refuse what no video could meet; arguments as of :func:`watch`.

    Raises:
        OptionError: No usable question, no such method, a scorer missing or not wanted, or frames below 1.
        BudgetError: No budget, or one that is not of tokens.
    """
    query, spend = as_query(question), Budget.parse(budget)
    spend.require_token_unit()
    if method not in HOW:
        raise OptionError(f"a video is watched by one of {', '.join(HOW)}, got {method!r}")
    if frames is not None:
        whole(frames, "frames", 1)
    if method == "uniform" and scorer is not None:
        raise OptionError("'uniform' gives every frame the same, so it takes no scorer")
    if method != "uniform" and scorer is None:
        raise OptionError(f"{method!r} needs a scorer: 'clip:NAME_OR_FOLDER', 'vlm:NAME_OR_FOLDER', or one in Python")
    given = isinstance(scorer, GivenScores) or not (isinstance(scorer, str) or hasattr(scorer, "score"))
    if method == "tstar" and given:
        raise OptionError("'tstar' scores frames of its own choice, so it takes a scorer, not scores")
    return query, spend


def _scorer(scorer: Any, device: str) -> FrameScorer | None:
    if scorer is None or hasattr(scorer, "score"):
        return scorer
    return load_scorer(scorer, device) if isinstance(scorer, str) else GivenScores(scorer)


class _Clock:
    """Wall clock per stage."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time what happens inside; yields what to tell how many of how many frames are done."""

        def told(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(name, done, total)

        told(0, 0)
        start = time.perf_counter()
        try:
            yield told
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
