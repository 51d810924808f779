"""T*: what is looked at, what is kept, when the search stops, and how much less than everything it looks at."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vlm_budget.errors import FrameScoreError, OptionError
from vlm_budget.video.frames.suppression import peaks, spaced
from vlm_budget.video.frames.tstar import Found, TStar, search

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script that draws the recorded curves."""
    spec = importlib.util.spec_from_file_location("benchmark_tstar", ROOT / "benchmarks" / "tstar.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def bumps(frames: int, *middles: float, height: float = 0.9, width: float = 4.0) -> torch.Tensor:
    """[frames, 1] confidences: a floor of 0.1, and a bump around every middle."""
    seconds = torch.arange(frames, dtype=torch.float32)
    curve = torch.full((frames,), 0.1)
    for middle in middles:
        curve = curve.maximum(0.1 + (height - 0.1) * torch.exp(-0.5 * ((seconds - middle) / width) ** 2))
    return curve[:, None]


class Looks:
    """A look at known confidences [N, C] that remembers what it was asked for."""

    def __init__(self, confidences: torch.Tensor) -> None:
        self.confidences, self.asked = confidences, []

    def __call__(self, frames: Sequence[int]) -> torch.Tensor:
        self.asked.append(list(frames))
        return self.confidences[list(frames)]


# --- what the search finds ----------------------------------------------------------------------------------------


# Fixed before the first run on them: the seeds, and twenty curves for each count of needles.
CURVES, FIRST_SEED, RECALL = 20, 910_000, 0.95


@pytest.fixture(scope="module")
def searched(benchmark: ModuleType) -> dict[int, list[tuple[Any, Found]]]:
    """Per count of needles, curves of 10,000 frames and what the default search found on them."""
    seeds = {needles: range(FIRST_SEED + 100 * needles, FIRST_SEED + 100 * needles + CURVES) for needles in range(1, 6)}
    drawn = {needles: [benchmark.curve(seed, needles) for seed in seeds[needles]] for needles in seeds}
    return {needles: [(curve, benchmark.run(curve, TStar())) for curve in curves] for needles, curves in drawn.items()}


@pytest.mark.parametrize("needles", [1, 2, 3, 4, 5])
def test_needles_in_ten_thousand_frames_are_found_with_fifteen_percent_of_the_looks(
    searched: dict[int, list[tuple[Any, Found]]], needles: int
) -> None:
    recall = sum(curve.recall(one.kept) for curve, one in searched[needles]) / CURVES
    error = (RECALL * (1 - RECALL) / (CURVES * needles)) ** 0.5  # binomial, of so many needles at that recall
    assert recall >= RECALL - 2 * error
    assert max(len(one.visited) for _, one in searched[needles]) <= 0.15 * 10_000


def test_of_all_three_hundred_needles_ninety_five_percent_are_found(
    searched: dict[int, list[tuple[Any, Found]]],
) -> None:
    found = sum(curve.recall(one.kept) * needles for needles, pairs in searched.items() for curve, one in pairs)
    assert found >= RECALL * 300  # without any allowance


def test_single_frames_without_context_are_found_only_as_often_as_they_are_looked_at(benchmark: ModuleType) -> None:
    curves = [benchmark.curve(78_000 + number, 5, shoulder=0.0) for number in range(10)]
    found = [benchmark.run(curve, TStar()) for curve in curves]
    for curve, one in zip(curves, found, strict=True):
        looked_at = {middle for middle, _, _ in curve.needles} & set(one.visited)
        assert curve.recall(one.kept) == len(looked_at) / 5
    assert sum(curve.recall(one.kept) for curve, one in zip(curves, found, strict=True)) / len(curves) < 0.5


def test_the_kept_frame_of_a_bump_is_its_top() -> None:
    found = search(Looks(bumps(3000, 777, 2042)), 3000, targets=1, keep=2)
    assert found.kept == (777, 2042)
    assert found.scores == pytest.approx((0.9, 0.9))
    assert found.times == (777.0, 2042.0)
    assert found.targets == (777,)  # a tie goes to the earlier
    assert len(found.visited) < 450


def test_a_shoulder_of_a_strong_event_does_not_push_out_a_weaker_event() -> None:
    confidences = bumps(1000, 300, height=0.95, width=8).maximum(bumps(1000, 700, height=0.65))
    found = search(Looks(confidences), 1000, targets=1, keep=3)
    assert {300, 700} < set(found.kept)


def test_the_best_frame_of_every_target_is_kept_even_when_another_target_is_stronger() -> None:
    strong = bumps(2000, *range(100, 1300, 100), height=0.95)
    weak = bumps(2000, 1600, height=0.7)
    found = search(Looks(torch.cat([strong, weak], 1)), 2000, targets=2, keep=3)
    assert 1600 in found.kept and found.targets[1] == 1600


def test_a_cue_counts_half_and_verifies_nothing() -> None:
    target, cue = bumps(1000, 300, height=0.7), bumps(1000, 800, height=1.0)
    found = search(Looks(torch.cat([target, cue], 1)), 1000, targets=1, cues=1, keep=1)
    assert found.kept == (300,) == found.targets
    near = [frame for frame in found.visited if abs(frame - 800) < 10]
    assert near and all(found.expected[frame] == pytest.approx(0.5 * float(cue[frame])) for frame in near)
    only_cue = search(Looks(torch.cat([bumps(1000), cue], 1)), 1000, targets=1, cues=1, keep=1)
    assert only_cue.kept == (800,) and only_cue.targets == (None,)


def test_times_of_any_rate_are_seconds() -> None:
    times = [number / 4 for number in range(4000)]  # four per second
    found = search(Looks(bumps(4000, 1500, width=16)), 4000, targets=1, keep=4, times=times)
    assert 1500 in found.kept
    assert all(later - earlier >= 3 for earlier, later in zip(found.times, found.times[1:], strict=False))
    assert len(found.visited) < 300  # the grid is of seconds, not of candidates


# --- looks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("explore", ["cover", "percentile"])
@pytest.mark.parametrize("frames", [1, 2, 7, 63, 577])
def test_no_frame_is_looked_at_twice_and_looks_are_ascending_batches_within_the_budget(
    frames: int, explore: Any
) -> None:
    torch.manual_seed(frames)
    look = Looks(torch.rand(frames, 3))
    settings = TStar(explore=explore, budget=0.5, batch=5, patience=1000)
    found = search(look, frames, targets=2, cues=1, keep=3, settings=settings)
    flat = [frame for batch in look.asked for frame in batch]
    assert len(flat) == len(set(flat)) == max(-(-frames // 2), min(3, frames))
    assert all(batch == sorted(batch) and 0 < len(batch) <= 5 for batch in look.asked)
    assert found.visited == tuple(sorted(flat)) and found.rounds == len(look.asked)
    assert found.why == "budget"
    assert len(found.kept) == min(3, frames) and found.kept == tuple(sorted(set(found.kept)))
    weighted = (look.confidences * torch.tensor([1, 1, 0.5])).amax(1)
    assert found.measured == pytest.approx(weighted[list(found.visited)].tolist())


def test_the_first_round_is_uniform_and_the_grid_leaves_no_gap_wider_than_the_stride() -> None:
    look = Looks(bumps(2000))
    found = search(look, 2000, targets=1, settings=TStar(batch=16, stride=20.0))
    first = np.diff([-62.5, *look.asked[0], 2062.5])
    assert first.min() >= 40 and first.max() <= 200
    assert np.diff([0, *found.visited, 1999]).max() <= 21  # frames stand on whole seconds


def test_the_same_seed_gives_the_same_search_and_another_seed_another() -> None:
    def run(seed: int) -> Found:
        return search(Looks(bumps(3000, 1234)), 3000, targets=1, settings=TStar(seed=seed))

    assert run(3) == run(3)
    assert run(3).visited != run(4).visited
    assert 1234 in run(3).kept and 1234 in run(4).kept


def test_a_high_score_draws_looks_to_its_neighbours() -> None:
    found = search(Looks(bumps(5000, 3333)), 5000, targets=1)
    near = sum(abs(frame - 3333) <= 5 for frame in found.visited)
    assert near >= 8  # of eleven; a grid alone would look at one or two


def test_estimates_are_straight_lines_between_visited_frames_and_spread_scores() -> None:
    found = search(Looks(bumps(400)), 400, targets=1, settings=TStar(budget=4, batch=4), keep=4)
    assert found.visited == (50, 150, 249, 349) or len(found.visited) == 4
    assert found.expected == pytest.approx([0.1] * 400)
    steep = torch.linspace(0, 1, 400)[:, None]
    found = search(Looks(steep), 400, targets=1, settings=TStar(budget=4, batch=4), keep=4)
    left, right = found.visited[:2]
    assert found.expected[(left + right) // 2] == pytest.approx(float(steep[(left + right) // 2]), abs=1e-5)
    top = found.visited[-1]
    assert found.expected[top] == pytest.approx(float(steep[top]))
    assert found.expected[top + 6] == pytest.approx(float(steep[top]))  # nothing is known behind the last
    assert found.expected[0] == pytest.approx(float(steep[left]))


# --- verification and stopping --------------------------------------------------------------------------------------


def test_stopping_once_verified_looks_at_less_and_may_miss_the_second_event() -> None:
    confidences = bumps(8000, 1000, 5005)
    settled = search(Looks(confidences), 8000, targets=1)
    verified = search(Looks(confidences), 8000, targets=1, settings=TStar(stop="verified"))
    assert verified.why == "verified" and verified.targets != (None,)
    assert len(verified.visited) < len(settled.visited)
    assert settled.why == "settled" and {1000, 5005} <= set(settled.kept)


def test_every_target_must_be_seen_before_the_search_is_verified() -> None:
    confidences = torch.cat([bumps(2000, 500), bumps(2000)], 1)
    found = search(Looks(confidences), 2000, targets=2, settings=TStar(stop="verified"))
    assert found.why != "verified" and found.targets == (500, None)


def test_a_finer_look_overrules_the_first_and_is_asked_only_where_a_target_seems_to_be() -> None:
    rough, verify = bumps(1000, 200, 700), Looks(bumps(1000, 700, height=0.8))
    found = search(Looks(rough), 1000, targets=1, keep=1, verify=verify, settings=TStar(seed=1, stride=7.0))
    asked = [frame for batch in verify.asked for frame in batch]
    assert found.verified == len(asked) and all(rough[frame] >= 0.6 for frame in asked)
    assert abs(found.targets[0] - 700) <= 5 and abs(found.kept[0] - 700) <= 5  # type: ignore[operator]
    overruled = [frame for frame in asked if abs(frame - 200) < 10]
    assert overruled and all(found.expected[frame] == pytest.approx(0.1, abs=1e-3) for frame in overruled)


def test_a_target_that_is_verified_is_not_looked_at_finer_again() -> None:
    verify = Looks(torch.ones(1000, 1))
    search(Looks(torch.ones(1000, 1)), 1000, targets=1, verify=verify)
    assert len(verify.asked) == 1


def test_a_search_that_finds_nothing_new_settles_before_the_budget_is_spent() -> None:
    found = search(Looks(bumps(5000, 2500)), 5000, targets=1, settings=TStar(budget=1.0))
    assert found.why == "settled" and len(found.visited) < 1000


def test_more_patience_looks_at_more() -> None:
    def looked(patience: int) -> int:
        settings = TStar(budget=1.0, patience=patience)
        return len(search(Looks(bumps(5000, 2500)), 5000, targets=1, settings=settings).visited)

    assert looked(20) >= looked(2) + 16 * 15


def test_a_confidence_of_exactly_the_threshold_counts() -> None:
    found = search(Looks(torch.full((40, 1), 0.7)), 40, targets=1, settings=TStar(threshold=0.7, stop="verified"))
    assert found.why == "verified"


def test_a_target_that_never_reaches_the_threshold_is_not_found() -> None:
    found = search(Looks(bumps(500, 250, height=0.59)), 500, targets=1, settings=TStar(budget=1.0))
    assert found.targets == (None,) and 250 in found.kept


# --- kept frames ----------------------------------------------------------------------------------------------------


def test_kept_frames_stand_apart_until_the_video_is_too_short() -> None:
    flat = torch.full((300, 1), 0.5)
    times = search(Looks(flat), 300, targets=1, keep=8, settings=TStar(budget=1.0, patience=100)).times
    assert np.diff(times).min() >= 3
    short = search(Looks(torch.full((12, 1), 0.5)), 12, targets=1, keep=8)
    assert len(short.kept) == 8


def test_of_no_more_frames_than_wanted_all_are_kept() -> None:
    found = search(Looks(bumps(5, 2)), 5, targets=1, keep=8)
    assert found.kept == (0, 1, 2, 3, 4)
    assert len(found.scores) == 5


def test_a_share_of_a_short_video_means_at_least_the_kept_frames() -> None:
    found = search(Looks(bumps(20, 7)), 20, targets=1, keep=8, settings=TStar(budget=0.01))
    assert len(found.visited) == 8 == len(found.kept)


def test_peaks_have_nothing_better_close_by_and_equal_frames_are_all_peaks() -> None:
    times = np.array([0.0, 1, 2, 6.5, 7, 20])
    assert peaks(times, np.array([0.1, 0.9, 0.5, 0.3, 0.3, 0.0]), 3).tolist() == [False, True, False, True, True, True]
    assert peaks(times, np.array([0.1, 0.9, 0.5, 0.3, 0.3, 0.0]), 6).tolist() == [
        False,
        True,
        False,
        False,
        False,
        True,
    ]
    assert peaks(times[:1], np.array([0.0]), 3).tolist() == [True]


def test_spaced_frames_are_the_best_ones_and_the_distance_is_halved_where_they_do_not_fit() -> None:
    times = np.array([0.0, 1, 2, 3, 4])
    assert spaced(times, np.array([1, 0, 2, 3, 4]), 2, 2.0) == [1, 3]
    assert spaced(times, np.array([1, 0, 2, 3, 4]), 3, 2.0) == [1, 3, 0]  # 0 is 1 s from 1
    assert sorted(spaced(np.array([0.0, 1e-9]), np.array([1, 0]), 2, 3.0)) == [0, 1]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.1, 1.1])
def test_what_is_no_confidence_is_refused(value: float) -> None:
    broken = bumps(100)
    broken[50:] = value
    with pytest.raises(FrameScoreError, match="0, 1|NaN"):
        search(Looks(broken), 100, targets=1)


@pytest.mark.parametrize(
    "answer",
    [
        lambda frames: torch.rand(len(frames)),
        lambda frames: torch.rand(len(frames), 3),
        lambda frames: torch.rand(len(frames) + 1, 2),
        lambda frames: torch.rand(0, 2),
        lambda frames: None,
    ],
)
def test_a_look_of_another_shape_is_refused(answer: Callable[[Sequence[int]], Any]) -> None:
    with pytest.raises(FrameScoreError):
        search(answer, 100, targets=1, cues=1)


def test_a_finer_look_is_checked_like_the_first() -> None:
    with pytest.raises(FrameScoreError):
        search(Looks(torch.ones(50, 2)), 50, targets=1, cues=1, verify=Looks(torch.ones(50, 2)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0},
        {"frames": -1},
        {"frames": 2.5},
        {"targets": 0},
        {"targets": True},
        {"cues": -1},
        {"keep": 0},
        {"times": [0.0, 1.0]},
        {"times": [0.0] * 100},
        {"times": [float("nan")] * 100},
        {"times": list(range(99, -1, -1))},
        {"times": ["soon"] * 100},
        {"settings": TStar(budget=7)},  # keeps eight
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_the_first_look(wrong: dict[str, Any]) -> None:
    look = Looks(bumps(100))
    arguments: dict[str, Any] = {"frames": 100, "targets": 1} | wrong
    with pytest.raises(OptionError):
        search(look, arguments.pop("frames"), **arguments)
    assert not look.asked


@pytest.mark.parametrize(
    "wrong",
    [
        *({"budget": value} for value in (0, 0.0, -1, 1.5, float("nan"), True, "all")),
        *({"threshold": value} for value in (-0.1, 1.1, float("nan"), None)),
        *({"batch": value} for value in (0, 2.5, True)),
        {"percentile": 101},
        {"temperature": 0},
        {"stride": 0},
        {"stride": float("inf")},
        {"spread": -1},
        {"apart": float("nan")},
        {"patience": 0},
        {"seed": -1},
        {"cue_weight": 2},
        {"stop": "never"},
        {"explore": "random"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        TStar(**wrong)


@pytest.mark.parametrize("extreme", [{"spread": 0.0}, {"apart": 0.0}, {"temperature": 1e-6}, {"percentile": 100}])
def test_extreme_settings_still_search(extreme: dict[str, float]) -> None:
    found = search(Looks(bumps(500, 250)), 500, targets=1, settings=replace(TStar(budget=0.9), **extreme))
    assert 250 in found.kept and len(found.kept) == 8


def test_progress_counts_visited_frames_up_to_the_budget() -> None:
    told: list[tuple[int, int]] = []
    found = search(Looks(bumps(200)), 200, targets=1, progress=lambda *at: told.append(at))
    assert told[-1] == (len(found.visited), 30)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_scores_that_are_all_equal_keep_frames_from_all_over(level: float) -> None:
    found = search(lambda indices: torch.full((len(indices), 1), level), 50, targets=1, keep=3)
    early, middle, late = found.kept
    assert early < 17 <= middle < 34 <= late
