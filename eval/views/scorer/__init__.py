"""A tiny CLIP that knows the things of `eval.views`, shipped with the library to score frames without a download.

It is an open_clip model in open_clip's own local format; ``clip:FOLDER`` names it as a frame scorer. The model card in
the folder has data, recipe and figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_budget.video.frames.clip import ClipScorer

__all__ = ["folder", "load"]


def folder() -> Path:
    """The folder of the published model, for ``local-dir:FOLDER`` of open_clip."""
    return Path(__file__).parent / "weights"


def load(device: str = "cpu") -> ClipScorer:
    """The published model as a frame scorer.

    Raises:
        MissingExtraError: open_clip is not installed.
    """
    from vlm_budget.video.frames.clip import ClipScorer

    return ClipScorer.load(str(folder()), device)
