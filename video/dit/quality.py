"""How far a sparse run's clips are from those of the dense run with the same seed: PSNR and SSIM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlm_budget.errors import DataError, PatchError

if TYPE_CHECKING:
    import numpy as np

_COLOURS = (1, 3, 4)
_WINDOW = 11
"""Side of SSIM's window: smaller pictures have none."""


@dataclass(frozen=True)
class Quality:
    """Clips of a sparse run beside those of the dense run.

    Attributes:
        psnr: Peak signal-to-noise ratio of each clip in dB, over all of its pixels; infinite where they are equal.
        ssim: Structural similarity of each clip, mean over its frames; None for latents and for tiny pictures.
        peak: The range of values that PSNR is measured against: 1 of frames, of latents the dense clip's own.
        kind: ``"frames"`` or ``"latents"``.
        repeats: The dense run was made twice, and whether its clips were equal; None where it was made once.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...] | None
    peak: tuple[float, ...]
    kind: str
    repeats: bool | None = None

    @property
    def mean_psnr(self) -> float:
        """Mean over the clips, in dB."""
        return math.fsum(self.psnr) / len(self.psnr)

    @property
    def mean_ssim(self) -> float | None:
        """Mean over the clips."""
        return None if self.ssim is None else math.fsum(self.ssim) / len(self.ssim)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; infinite PSNR as None, which JSON has no number for."""
        psnr = [value if math.isfinite(value) else None for value in self.psnr]
        mean = self.mean_psnr if math.isfinite(self.mean_psnr) else None
        return {**asdict(self), "psnr": psnr, "mean_psnr": mean, "mean_ssim": self.mean_ssim}

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for a report."""
        clips = f"{self.kind} of {len(self.psnr)} clip{'s' * (len(self.psnr) > 1)}"
        spread = f", {min(self.psnr):.2f} to {max(self.psnr):.2f}" if len(self.psnr) > 1 else ""
        found = [("PSNR against the dense run", f"{self.mean_psnr:.2f} dB{spread} ({clips})")]
        if self.mean_ssim is not None:
            found.append(("SSIM against the dense run", f"{self.mean_ssim:.4f}"))
        if self.repeats is False:
            found.append(("  beware", "two dense runs differed: seed the run inside the function, else this is noise"))
        return found

    def __str__(self) -> str:
        """The rows as plain text."""
        return "\n".join(f"{name}: {value}" for name, value in self.rows())


def compare(
    run: Callable[[], Any], dense: Callable[[], AbstractContextManager[object]], repeat: bool = False
) -> Quality:
    """Run sparse, run dense, and say how far the clips are apart.

    The seed is the caller's: ``run`` must make the same clip whenever it is called, so a generator has to be made
    *inside* it (``generator=torch.Generator().manual_seed(0)``); one that is made outside goes on drawing, and the two
    runs would start from different noise. The global random state is set back for the second run, so that runs without
    a generator are compared on the same noise, too.

    Args:
        run: Makes the clips and returns them: what a diffusers pipeline returns, frames or latents.
        dense: Makes a context in which the same transformer runs dense.
        repeat: Run dense twice, to see whether ``run`` keeps the contract. Costs a third run.

    Raises:
        DataError: What ``run`` returns are no clips, or the runs return clips of different shapes.
    """
    states = _random_states()
    sparse = run()
    _restore(states)
    with dense():
        first = run()
        again = None
        if repeat:
            _restore(states)
            again = run()
    found = quality_of(sparse, first)
    if again is None:
        return found
    same = all(torch.equal(a, b) for a, b in zip(clips_of(first)[0], clips_of(again)[0], strict=True))
    return Quality(found.psnr, found.ssim, found.peak, found.kind, same)


def _random_states() -> tuple[torch.Tensor, list[torch.Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def _restore(states: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])


def quality_of(clips: Any, reference: Any) -> Quality:
    """PSNR and SSIM of clips against others.

    Args:
        clips: Latents or frames: a tensor or an array [B, …] or of one clip, lists of PIL pictures, or what a diffusers
            pipeline returns, which has them as ``frames``. Frames are bytes or in [0, 1], [B, F, H, W, C] or
            [B, F, C, H, W]; everything else is taken for latents.
        reference: The same of the dense run.

    Raises:
        DataError: No clips, clips of different shapes, or values that are not finite.
    """
    ours, ours_are_frames = clips_of(clips)
    theirs, theirs_are_frames = clips_of(reference)
    shapes = [[list(clip.shape) for clip in side] for side in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise DataError(f"clips to compare must be of one shape, got {shapes[0]} and {shapes[1]}")
    frames = ours_are_frames and theirs_are_frames
    peaks = [1.0 if frames else float(clip.max() - clip.min()) for clip in theirs]
    found = tuple(psnr(a, b, peak) for a, b, peak in zip(ours, theirs, peaks, strict=True))
    big_enough = frames and min(theirs[0].shape[-2:]) >= _WINDOW
    alike = tuple(map(_ssim, ours, theirs)) if big_enough else None
    return Quality(found, alike, tuple(peaks), "frames" if frames else "latents")


def psnr(clip: torch.Tensor, reference: torch.Tensor, peak: float = 1.0) -> float:
    """``10 log10(peak^2 / MSE)`` in dB, over all values of a clip; infinite where the two are equal."""
    mean = float((clip.double() - reference.double()).square().mean())
    if mean == 0:
        return math.inf
    return 10 * math.log10(peak * peak / mean) if peak else -math.inf


def _ssim(clip: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over frames [F, C, H, W], frame against frame."""
    from vlm_budget.video.frames.metrics import ssim

    pairs = zip(clip.split(1), reference.split(1), strict=True)
    return math.fsum(float(ssim(a, b)) for a, b in pairs) / len(clip)


def clips_of(output: Any) -> tuple[list[torch.Tensor], bool]:
    """Clips on the CPU in float32, and whether they are frames [F, C, H, W] in [0, 1].

    Raises:
        DataError: No clips, or values that are not finite.
    """
    output = getattr(output, "frames", output)
    if isinstance(output, tuple) and len(output) == 1:  # return_dict=False
        output = output[0]
    tensor = _tensor(output)
    if tensor is None or tensor.ndim < 3 or not tensor.numel():
        shape = "" if tensor is None else f" of shape {list(tensor.shape)}"
        raise DataError(
            f"expected clips: what a pipeline returns, a tensor or an array of frames or latents, or lists of "
            f"pictures; got {type(output).__name__}{shape}"
        )
    # Four dimensions are one clip; three are the tokens of several, as LTX lists its latents.
    tensor = tensor[None] if tensor.ndim == 4 else tensor
    whole = tensor.dtype == torch.uint8
    values = tensor.detach().to("cpu", torch.float32) / (255 if whole else 1)
    if not values.isfinite().all():
        raise DataError("clips hold values that are not finite: NaN or infinity came out of the pipeline")
    in_range = whole or (float(values.min()) >= 0 and float(values.max()) <= 1)
    if in_range and values.ndim == 5 and values.shape[4] in _COLOURS:
        return list(values.permute(0, 1, 4, 2, 3).contiguous()), True
    if in_range and values.ndim == 5 and values.shape[2] in _COLOURS:
        return list(values), True
    return list(values), False


def _tensor(output: Any) -> torch.Tensor | None:
    """Tensors, arrays, and lists of these or of pictures, as one tensor; None of anything else."""
    import numpy as np
    from PIL import Image

    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, np.ndarray):
        return _from_array(output)
    if isinstance(output, Image.Image):
        return _from_array(np.asarray(output.convert("RGB")))
    if isinstance(output, Sequence) and not isinstance(output, str | bytes) and output:
        parts = [_tensor(part) for part in output]
        if any(part is None for part in parts):
            return None
        found = [part for part in parts if part is not None]
        if len({part.shape for part in found}) > 1:
            raise DataError(f"clips of one run must be of one size, got {sorted({tuple(p.shape) for p in found})}")
        return torch.stack(found)
    return None


def _from_array(array: np.ndarray[Any, Any]) -> torch.Tensor | None:
    return torch.from_numpy(array.copy()) if array.dtype.kind in "fiub" else None


def without_comparison() -> PatchError:
    """What ``report(quality=True)`` raises where nothing was compared yet."""
    return PatchError(
        "there is no quality to report yet: call handle.compare(run) first, with a function that makes the clips from "
        "a seed of its own; it runs them sparse and dense"
    )
