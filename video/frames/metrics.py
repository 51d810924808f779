"""LV-Haystack's metrics: how well the frames that a search kept match the frames that people marked.

Re-thinking Temporal Search for Long-Form Video Understanding, arXiv 2504.02259 (CVPR 2025), written from a restatement
of the benchmark's script. Where this differs from the script, and why:

* Frames are fetched by time (:func:`visual_at`). The script takes the frame whose *number* is the time in seconds, so
  that its SSIM compares other frames.
* Times are compared as they are. ``whole_seconds=True`` cuts them off to whole seconds first, as the script does.
* SSIM is taken where its window fits into the picture, per colour channel; the restatement does not say what the script
  does at the border.

A sample for which nothing was kept scores 0 and has no nearest distance (NaN); a sample without marked frames cannot be
scored, and is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_budget.errors import DataError, OptionError

if TYPE_CHECKING:
    from .reader import Video

TAU = 5.0  # seconds
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_AT_ONCE = 2**25  # picture elements of a chunk of pairs: 256 MiB of float64, a few times


@dataclass(frozen=True)
class Match:
    """Precision, recall and their harmonic mean, all in [0, 1] (SSIM can be below 0)."""

    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, precision: float, recall: float) -> Match:
        """With the harmonic mean, which is 0 where one of the two is not above 0."""
        both = precision > 0 and recall > 0
        return cls(precision, recall, 2 * precision * recall / (precision + recall) if both else 0.0)


def temporal(kept: Iterable[float], marked: Iterable[float], tau: float = TAU, whole_seconds: bool = False) -> Match:
    """Of kept and marked frames, the share that has one of the others within ``tau`` seconds.

    Args:
        kept: Times of the frames a search kept, in seconds.
        marked: Times of the frames people marked.
        tau: Seconds that are still a match.
        whole_seconds: Cut times off to whole seconds first, as the released script does.

    Raises:
        DataError: No marked frames, or a time that is negative or not finite.
        OptionError: ``tau`` is negative or not finite.
    """
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau < math.inf:
        raise OptionError(f"tau must be a number of seconds from 0 on, got {tau!r}")
    found, truth = _times("kept", kept), _times("marked", marked)
    if not len(truth):
        raise DataError("a sample without marked frames cannot be scored: leave it out")
    if not len(found):
        return Match(0.0, 0.0, 0.0)
    if whole_seconds:
        found, truth = found.trunc(), truth.trunc()
    # Times are sums of floats: without the slack, 0.1 + 5 would not be within 5 of 0.1.
    near = (found[:, None] - truth[None]).abs() <= tau + 1e-9
    return Match.of(float(near.any(1).double().mean()), float(near.any(0).double().mean()))


def nearest_distance(kept: Iterable[float], marked: Iterable[float]) -> tuple[float, float]:
    """Mean distance to the nearest of the others, in seconds: of the kept frames, and of the marked ones.

    NaN both where nothing was kept.

    Raises:
        DataError: No marked frames, or a time that is negative or not finite.
    """
    found, truth = _times("kept", kept), _times("marked", marked)
    if not len(truth):
        raise DataError("a sample without marked frames cannot be scored: leave it out")
    if not len(found):
        return math.nan, math.nan
    distance = (found[:, None] - truth[None]).abs()
    return float(distance.amin(1).mean()), float(distance.amin(0).mean())


def visual(kept: torch.Tensor, marked: torch.Tensor) -> Match:
    """Structural similarity of each kept frame to the likest marked one, and the other way round.

    Args:
        kept: [P, C, H, W] in [0, 1]; P may be 0.
        marked: [G, C, H, W] in [0, 1].

    Raises:
        DataError: No marked frames; see also :func:`ssim`.
    """
    if not len(marked):
        raise DataError("a sample without marked frames cannot be scored: leave it out")
    if not len(kept):
        return Match(0.0, 0.0, 0.0)
    alike = ssim(kept, marked).double()
    return Match.of(float(alike.amax(1).mean()), float(alike.amax(0).mean()))


def visual_at(video: Video, kept: Sequence[float], marked: Sequence[float]) -> Match:
    """:func:`visual` of the frames that a video shows at some times.

    Args:
        video: An open :class:`~vlm_budget.video.frames.reader.Video`; its ``max_pixels`` bounds what is held.
        kept: Times of the frames a search kept, in seconds.
        marked: Times of the frames people marked.

    Raises:
        DataError: No marked frames, a time that is negative or not finite, or frames too small for the window.
        VideoError: The video cannot be read there.
    """
    found, truth = _times("kept", kept).tolist(), _times("marked", marked).tolist()
    if not truth:
        raise DataError("a sample without marked frames cannot be scored: leave it out")
    if not found:
        return Match(0.0, 0.0, 0.0)
    return visual(_pictures(video, found), _pictures(video, truth))


def mean_of(samples: Sequence[Match], f1_of_means: bool = False) -> Match:
    """Means over samples.

    Args:
        samples: One match per sample.
        f1_of_means: F1 of the mean precision and recall, as published for SSIM, instead of the mean of the samples' F1,
            as published for times.

    Raises:
        DataError: No samples.
    """
    if not samples:
        raise DataError("there are no samples to take a mean of")
    precision, recall, f1 = (
        math.fsum(getattr(sample, name) for sample in samples) / len(samples) for name in ("precision", "recall", "f1")
    )
    return Match.of(precision, recall) if f1_of_means else Match(precision, recall, f1)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of every picture of one batch to every picture of another.

    Window of 11 x 11, Gaussian with sigma 1.5, C1 = 0.01^2 and C2 = 0.03^2 on [0, 1]; the mean over all places where
    the window fits and over channels. Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to
    Structural Similarity".

    Args:
        a: [N, C, H, W] in [0, 1], floating point.
        b: [M, C, H, W] of the same size, on the same device.

    Returns:
        [N, M] float32; 1 for equal pictures.

    Raises:
        DataError: Other shapes, pictures smaller than the window, values that are not in [0, 1] or not finite.
    """
    for pictures in (a, b):
        if pictures.ndim != 4 or not pictures.is_floating_point():
            raise DataError(
                f"pictures must be floating point [N, C, H, W], got {pictures.dtype} {list(pictures.shape)}"
            )
        if pictures.numel() and not ((pictures >= 0) & (pictures <= 1)).all():  # not so for NaN either
            raise DataError("pictures must lie in [0, 1]: divide bytes by 255")
    if a.shape[1:] != b.shape[1:]:
        raise DataError(f"pictures to compare must have one size, got {list(a.shape[1:])} and {list(b.shape[1:])}")
    if min(a.shape[2:]) < _WINDOW or not a.shape[1]:
        raise DataError(f"pictures must have at least {_WINDOW} x {_WINDOW} pixels, got {list(a.shape[1:])}")
    a, b = a.double(), b.double()  # E[x^2] - E[x]^2 of flat pictures cancels, beside C2 = 0.0009
    (mean_a, square_a), (mean_b, square_b) = _moments(a), _moments(b)
    alike = torch.empty(len(a), len(b), device=a.device)
    step = max(1, _AT_ONCE // a[0].numel()) if len(a) else 1
    for row in range(len(a)):
        for start in range(0, len(b), step):
            part = slice(start, start + step)
            between = _blurred(a[row] * b[part]) - mean_a[row] * mean_b[part]
            spread = (square_a[row] - mean_a[row] ** 2) + (square_b[part] - mean_b[part] ** 2)
            light = (2 * mean_a[row] * mean_b[part] + _C1) / (mean_a[row] ** 2 + mean_b[part] ** 2 + _C1)
            alike[row, part] = (light * (2 * between + _C2) / (spread + _C2)).mean((1, 2, 3))
    return alike


def _moments(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean of every window, of the values and of their squares."""
    return _blurred(pictures), _blurred(pictures * pictures)


def _blurred(pictures: torch.Tensor) -> torch.Tensor:
    """[N, C, H - 10, W - 10], the Gaussian window over [N, C, H, W], rows and columns apart."""
    place = torch.arange(_WINDOW, device=pictures.device, dtype=pictures.dtype) - _WINDOW // 2
    weights = torch.exp(-0.5 * (place / _SIGMA) ** 2)
    weights = (weights / weights.sum()).view(1, 1, 1, _WINDOW)
    flat = pictures.flatten(0, 1)[:, None]
    flat = torch.nn.functional.conv2d(torch.nn.functional.conv2d(flat, weights), weights.transpose(2, 3))
    return flat.view(*pictures.shape[:2], *flat.shape[2:])


def _pictures(video: Video, times: list[float]) -> torch.Tensor:
    """[T, 3, H, W] float32 in [0, 1] of what a video shows."""
    import numpy as np

    frames = [torch.from_numpy(np.array(frame.image.convert("RGB"))) for frame in video.at(times)]
    return torch.stack(frames).permute(0, 3, 1, 2).float() / 255


def _times(whose: str, times: Any) -> torch.Tensor:
    """[n] float64 seconds."""
    try:
        found = torch.tensor([float(time) for time in times], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"times of the {whose} frames must be numbers of seconds: {error}") from error
    if len(found) and not ((found >= 0) & found.isfinite()).all():
        raise DataError(f"times of the {whose} frames must be finite and from 0 on, got {found.tolist()}")
    return found
