"""LV-Haystack's metrics: examples worked by hand, and an SSIM written a second time."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_budget.errors import DataError, OptionError
from vlm_budget.video.frames.metrics import Match, mean_of, nearest_distance, ssim, temporal, visual, visual_at


def direct_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Of two [H, W] pictures, window by window, from the definition."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(values))


# --- times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "marked", "precision", "recall"),
    [
        ([10, 20, 30, 40], [12, 100], 1 / 4, 1 / 2),  # 10 is 2 s from 12
        ([10, 14, 50], [12], 2 / 3, 1),
        ([0], [5], 1, 1),  # exactly tau
        ([0], [5.01], 0, 0),
        ([0.1], [5.1], 1, 1),  # 5.1 - 0.1 is a little above 5 in floats
        ([3, 3, 90], [3], 2 / 3, 1),
        ([10], [8, 12, 14, 30], 1, 3 / 4),
    ],
)
def test_precision_and_recall_count_frames_within_five_seconds(
    kept: list[float], marked: list[float], precision: float, recall: float
) -> None:
    found = temporal(kept, marked)
    assert found.precision == pytest.approx(precision) and found.recall == pytest.approx(recall)
    expected = 2 * precision * recall / (precision + recall) if precision and recall else 0
    assert found.f1 == pytest.approx(expected)


def test_whole_seconds_are_cut_off_and_not_rounded() -> None:
    assert temporal([0.0], [5.9]).f1 == 0
    assert temporal([0.0], [5.9], whole_seconds=True).f1 == 1
    assert temporal([0.9], [5.95]).f1 == 0
    assert temporal([0.9], [6.0], whole_seconds=True).f1 == 0


def test_tau_is_in_seconds() -> None:
    assert temporal([10], [12], tau=2).f1 == 1
    assert temporal([10], [12], tau=1.9).f1 == 0
    assert temporal([10], [10], tau=0).f1 == 1


def test_nearest_distances_are_means_in_both_directions() -> None:
    there, back = nearest_distance([10, 20, 40], [12, 50])
    assert there == pytest.approx((2 + 8 + 10) / 3)
    assert back == pytest.approx((2 + 10) / 2)
    assert nearest_distance([7.5], [7.5]) == (0, 0)


def test_nothing_kept_scores_nothing_and_has_no_distance() -> None:
    assert temporal([], [3]) == Match(0, 0, 0)
    assert all(math.isnan(value) for value in nearest_distance([], [3]))
    assert visual(torch.zeros(0, 3, 16, 16), torch.zeros(1, 3, 16, 16)) == Match(0, 0, 0)


@pytest.mark.parametrize("measure", [temporal, nearest_distance])
@pytest.mark.parametrize(
    ("kept", "marked"),
    [
        ([1.0], []),
        ([], []),
        ([math.nan], [1.0]),
        ([1.0], [math.inf]),
        ([-1.0], [1.0]),
        ([1.0], ["soon"]),
        ([None], [1.0]),
        (None, [1.0]),
    ],
)
def test_times_that_make_no_sense_are_refused(measure: Any, kept: Any, marked: Any) -> None:
    with pytest.raises(DataError):
        measure(kept, marked)


@pytest.mark.parametrize("tau", [-1, math.nan, math.inf, "five", True])
def test_a_tau_that_makes_no_sense_is_refused(tau: Any) -> None:
    with pytest.raises(OptionError, match="tau"):
        temporal([1], [1], tau=tau)


# --- means --------------------------------------------------------------------------------------------------------


def test_the_mean_f1_is_that_of_the_samples_and_on_request_that_of_the_means() -> None:
    samples = [Match.of(1.0, 0.5), Match.of(0.0, 0.0), Match.of(0.5, 1.0)]
    assert mean_of(samples) == Match(0.5, 0.5, pytest.approx((2 / 3 + 0 + 2 / 3) / 3))
    assert mean_of(samples, f1_of_means=True) == Match(0.5, 0.5, 0.5)


def test_a_mean_of_no_samples_is_refused() -> None:
    with pytest.raises(DataError):
        mean_of([])


def test_the_harmonic_mean_is_zero_where_one_of_both_is_not_above_zero() -> None:
    assert Match.of(0.0, 0.0).f1 == 0
    assert Match.of(0.5, 0.0).f1 == 0
    assert Match.of(-0.2, 0.2).f1 == 0


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(11, 11), (12, 17), (23, 14)])
def test_ssim_is_its_definition(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    a = rng.random((2, 3, height, width))
    b = np.concatenate([(a[:1] + rng.normal(0, 0.1, a[:1].shape)).clip(0, 1), rng.random((2, 3, height, width)) ** 2])
    found = ssim(torch.from_numpy(a), torch.from_numpy(b))
    assert found.shape == (2, 3)
    for row in range(2):
        for col in range(3):
            expected = np.mean([direct_ssim(a[row, channel], b[col, channel]) for channel in range(3)])
            assert float(found[row, col]) == pytest.approx(expected, abs=1e-5)


def test_ssim_of_flat_pictures_is_what_their_brightness_says() -> None:
    dark, light = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.8)
    assert float(ssim(dark, light)) == pytest.approx((2 * 0.16 + 1e-4) / (0.04 + 0.64 + 1e-4), abs=1e-5)


def test_equal_pictures_have_an_ssim_of_one_and_negatives_one_below_zero() -> None:
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 32, 32)
    assert float(ssim(picture, picture)) == pytest.approx(1, abs=1e-5)
    assert float(ssim(picture, 1 - picture)) < 0


def test_pairs_in_chunks_are_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(3, 1, 13, 13), torch.rand(7, 1, 13, 13)
    whole = ssim(a, b)
    monkeypatch.setattr("vlm_budget.video.frames.metrics._AT_ONCE", 2 * 13 * 13)
    torch.testing.assert_close(ssim(a, b), whole)


def test_visual_precision_and_recall_take_the_likest_picture_of_the_other_side() -> None:
    torch.manual_seed(0)
    marked = torch.rand(2, 3, 20, 20)
    other = torch.rand(1, 3, 20, 20)
    kept = torch.cat([marked[:1], other, marked[:1]])
    table = ssim(kept, marked)
    found = visual(kept, marked)
    assert found.precision == pytest.approx((1 + float(table[1].max()) + 1) / 3, abs=1e-5)
    assert found.recall == pytest.approx((1 + float(table[:, 1].max())) / 2, abs=1e-5)
    assert found.f1 == pytest.approx(2 * found.precision * found.recall / (found.precision + found.recall))


class FakeVideo:
    """Ten frames per second, each a picture of its own."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def at(self, times: Sequence[float]) -> list[Any]:
        self.asked.append(list(times))
        return [SimpleNamespace(image=self.picture(int(time * 10)), time=time) for time in times]

    def picture(self, number: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def test_frames_are_fetched_by_their_time_and_not_by_its_number() -> None:
    video = FakeVideo()
    found = visual_at(video, [2.0, 7.5], [7.5])  # type: ignore[arg-type]
    assert video.asked == [[2.0, 7.5], [7.5]]
    assert found.recall == pytest.approx(1, abs=1e-5)
    assert found.precision < 0.75


def test_frames_of_nothing_kept_are_not_fetched() -> None:
    video = FakeVideo()
    assert visual_at(video, [], [1.0]) == Match(0, 0, 0)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        visual_at(video, [1.0], [])  # type: ignore[arg-type]
    assert not video.asked


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16)),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17)),
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16)),
        (torch.full((1, 3, 16, 16), 255.0), torch.zeros(1, 3, 16, 16)),
        (torch.full((1, 3, 16, 16), math.nan), torch.zeros(1, 3, 16, 16)),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16)),
        (torch.zeros(1, 0, 16, 16), torch.zeros(1, 0, 16, 16)),
    ],
)
def test_pictures_that_cannot_be_compared_are_refused(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(DataError):
        ssim(a, b)
    with pytest.raises(DataError):
        visual(torch.zeros(1, 3, 16, 16), torch.zeros(0, 3, 16, 16))
