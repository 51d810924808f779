from __future__ import annotations

import math

import pytest

from vlm_budget.errors import OptionError, VideoError
from vlm_budget.video.frames import dynamic_frames, spread_times


@pytest.mark.parametrize(
    ("duration", "wanted"),
    [(0, 96), (10, 96), (56.2, 96), (56.25, 97), (1800, 128), (3599.9, 159), (3600, 160), (7200, 224), (360_000, 512)],
)
def test_the_papers_count_grows_with_the_hours_up_to_our_cap(duration, wanted):
    assert dynamic_frames(duration) == wanted


def test_base_extra_and_cap_are_the_callers():
    assert dynamic_frames(1800, base=32, extra=32) == 48
    assert dynamic_frames(1800, base=32, extra=0) == 32
    assert dynamic_frames(36_000, cap=1000) == 736
    assert dynamic_frames(0, cap=8) == 8


@pytest.mark.parametrize("duration", [-1, math.nan, math.inf, "60", None, True])
def test_a_duration_that_is_no_number_of_seconds(duration):
    with pytest.raises(VideoError, match="number of seconds"):
        dynamic_frames(duration)
    with pytest.raises(VideoError, match="number of seconds"):
        spread_times(duration, 4)


@pytest.mark.parametrize("changes", [{"base": 0}, {"base": 1.5}, {"extra": -1}, {"cap": 0}, {"cap": True}])
def test_counts_that_make_no_sense(changes):
    with pytest.raises(OptionError, match=next(iter(changes))):
        dynamic_frames(60, **changes)


def test_times_are_the_middles_of_equal_pieces():
    assert spread_times(10, 4) == [1.25, 3.75, 6.25, 8.75]
    assert spread_times(2, 1, start=3) == [4.0]
    with pytest.raises(OptionError, match="count"):
        spread_times(10, 0)
    with pytest.raises(VideoError, match="0 seconds"):
        spread_times(0, 3)
