"""A look of T*: frames read by time, and scored in batches."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_budget.errors import FrameScoreError, OptionError, VideoError
from vlm_budget.video.frames.tstar import TStar, look_from, search


class FakeVideo:
    """Shows at every time a picture that is the time."""

    def __init__(self, missing: int = 0) -> None:
        self.missing, self.asked = missing, []

    def at(self, times: Sequence[float]) -> list[Any]:
        self.asked.append(list(times))
        return [SimpleNamespace(image=time, time=time) for time in times][self.missing :]


class FakeScorer:
    """Sees the first clue at 30 to 32 s."""

    def score(self, frames: Sequence[float], clues: Sequence[str]) -> torch.Tensor:
        first = torch.tensor([0.9 if 30 <= time <= 32 else 0.1 for time in frames])
        return torch.stack([first, *(torch.zeros(len(frames)) for _ in clues[1:])], 1)


def test_a_look_reads_frames_by_time_and_scores_them_in_batches() -> None:
    video, told = FakeVideo(), []
    times = [number / 2 for number in range(200)]
    look = look_from(video, FakeScorer(), times, ["a red car", "a road"], batch=3, progress=told.append)  # type: ignore[arg-type]
    found = look([0, 61, 62, 63, 199])
    assert video.asked == [[0.0, 30.5, 31.0], [31.5, 99.5]]
    assert found[:, 0].tolist() == pytest.approx([0.1, 0.9, 0.9, 0.9, 0.1])
    assert told == [3, 5]
    result = search(look, 200, targets=1, cues=1, keep=1, times=times, settings=TStar(budget=0.6))
    assert 30 <= result.times[0] <= 32


def test_a_reader_that_gives_fewer_frames_than_asked_is_an_error() -> None:
    look = look_from(FakeVideo(missing=1), FakeScorer(), [0.0, 1.0], ["a car"])  # type: ignore[arg-type]
    with pytest.raises(VideoError, match="2 frames were asked for, and 1"):
        look([0, 1])


def test_a_scorer_of_another_shape_is_an_error() -> None:
    scorer = SimpleNamespace(score=lambda frames, clues: torch.zeros(len(frames)))
    look = look_from(FakeVideo(), scorer, [0.0, 1.0], ["a car"])  # type: ignore[arg-type]
    with pytest.raises(FrameScoreError):
        look([0, 1])


def test_a_look_needs_clues_and_a_batch() -> None:
    for clues in ([], "a car"):
        with pytest.raises(OptionError, match="clue"):
            look_from(FakeVideo(), FakeScorer(), [0.0], clues)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="batch"):
        look_from(FakeVideo(), FakeScorer(), [0.0], ["a car"], batch=0)  # type: ignore[arg-type]
