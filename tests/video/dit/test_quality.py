"""PSNR and SSIM of clips against clips."""

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_budget.errors import DataError
from vlm_budget.video.dit.quality import clips_of, compare, quality_of
from vlm_budget.video.frames.metrics import ssim


def frames(seed: int = 0, clips: int = 2) -> torch.Tensor:
    """[B, F, C, H, W] in [0, 1]."""
    return torch.rand(clips, 3, 3, 16, 20, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_its_formula_per_clip() -> None:
    clips = 0.25 + 0.5 * frames()
    other = clips.clone()
    other[0] += 0.1
    other[1] -= 0.01
    found = quality_of(other, clips)
    assert found.psnr == pytest.approx((20.0, 40.0), abs=1e-3)
    assert found.mean_psnr == pytest.approx(30.0, abs=1e-3)
    assert found.kind == "frames"


def test_ssim_is_the_mean_over_equal_places_in_time() -> None:
    a, b = frames(), (frames() + 0.3 * frames(1)).clamp(0, 1)
    found = quality_of(a, b)
    assert found.ssim is not None
    by_hand = [
        float(torch.stack([ssim(x[i : i + 1], y[i : i + 1]) for i in range(3)]).mean())
        for x, y in zip(a, b, strict=True)
    ]
    assert found.ssim == pytest.approx(by_hand)
    assert found.mean_ssim < 1


def test_equal_clips_are_infinitely_good() -> None:
    found = quality_of(frames(), frames())
    assert found.psnr == (math.inf, math.inf)
    assert found.ssim == pytest.approx((1, 1))


def test_arrays_tensors_pictures_and_pipeline_outputs_give_the_same() -> None:
    bytes_a = (frames() * 255).round().to(torch.uint8)
    bytes_b = (frames(1) * 255).round().to(torch.uint8)
    wanted = quality_of(bytes_a / 255, bytes_b / 255)

    def forms(clips: torch.Tensor) -> Iterator[Any]:
        last = clips.permute(0, 1, 3, 4, 2).numpy()
        yield last
        yield last.astype(np.float32) / 255
        yield [[Image.fromarray(frame) for frame in clip] for clip in last]
        yield [list(clip) for clip in last]
        yield SimpleNamespace(frames=clips / 255)
        yield ((clips / 255),)

    for ours, theirs in zip(forms(bytes_a), forms(bytes_b), strict=True):
        found = quality_of(ours, theirs)
        assert found.psnr == pytest.approx(wanted.psnr, abs=1e-3)
        assert found.ssim == pytest.approx(wanted.ssim, abs=1e-4)


def test_one_clip_without_a_batch_is_one_clip() -> None:
    pictures = [Image.fromarray(frame) for frame in (frames()[0].permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)]
    assert len(quality_of(pictures, pictures).psnr) == 1


def test_latents_are_measured_against_their_own_range_and_have_no_ssim() -> None:
    clips = torch.randn(2, 16, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    found = quality_of(clips + 0.1, clips)
    assert found.kind == "latents"
    assert found.ssim is None
    assert found.peak == pytest.approx([float(clip.max() - clip.min()) for clip in clips])
    assert found.psnr == pytest.approx([20 * math.log10(peak / 0.1) for peak in found.peak], abs=1e-3)


def test_pictures_smaller_than_the_window_have_no_ssim() -> None:
    assert quality_of(frames()[..., :10], frames(1)[..., :10]).ssim is None


@pytest.mark.parametrize("wrong", [None, "a clip", [], [[]], {"a": 1}, torch.zeros(()), torch.zeros(2, 0, 3, 4), 3.0])
def test_what_is_no_clip_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match="expected clips"):
        clips_of(wrong)


def test_clips_of_other_shapes_and_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match="one shape"):
        quality_of(frames(), frames(clips=1))
    broken = frames()
    broken[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match="not finite"):
        quality_of(broken, frames())


class Pipe:
    """Makes clips; its sparse runs add an error."""

    def __init__(self) -> None:
        self.error, self.runs = 0.1, 0

    def __call__(self, generator: torch.Generator | None = None) -> torch.Tensor:
        self.runs += 1
        return 0.25 + 0.5 * torch.rand(1, 2, 3, 16, 16, generator=generator) + self.error

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        self.error = 0.0
        try:
            yield
        finally:
            self.error = 0.1


def test_compare_runs_sparse_then_dense_from_one_random_state() -> None:
    pipe = Pipe()
    found = compare(pipe, pipe.dense)
    assert found.psnr == pytest.approx((20.0,), abs=1e-3)
    assert pipe.runs == 2
    assert pipe.error == 0.1
    assert found.repeats is None


def test_a_run_that_is_not_deterministic_is_found_by_a_third_one() -> None:
    pipe, outside = Pipe(), torch.Generator().manual_seed(0)
    assert compare(lambda: pipe(torch.Generator().manual_seed(0)), pipe.dense, repeat=True).repeats is True
    found = compare(lambda: pipe(outside), pipe.dense, repeat=True)
    assert found.repeats is False
    assert "seed the run inside" in str(found)
    assert pipe.runs == 6


def test_latents_that_are_lists_of_tokens_are_one_clip_each() -> None:
    clips, frames = clips_of(torch.randn(2, 60, 8))
    assert len(clips) == 2 and not frames
