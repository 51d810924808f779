"""What a sample brings besides its pictures, laid beside a patched model for methods that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_budget.eval.sample import Sample
from vlm_budget.patching import PatchHandle
from vlm_budget.pruner import Pruner

if TYPE_CHECKING:
    from PIL import Image

    from vlm_budget.video.frames.scorers import FrameScorer


def score_frames(scorer: FrameScorer, samples: Sequence[Sample], pictures: Sequence[Sequence[Image.Image]]) -> Any:
    """Per sample, [T] how much its frames or pictures have to do with its query, or else with its prompt.

    Raises:
        FrameScoreError: The scorer gave no usable scores.
    """
    from vlm_budget.video.frames.scorers import relevance

    return [relevance(scorer, own, one.query or one.prompt) for one, own in zip(samples, pictures, strict=True)]


def lay_beside(
    handle: PatchHandle, method: Pruner | None, samples: Sequence[Sample], scores: Any = None, videos: bool = False
) -> None:
    """Give a method what it reads of a batch, as far as the batch has it.

    Args:
        handle: The patched model.
        method: What acts before the language model.
        samples: The batch.
        scores: What :func:`score_frames` found; None where there is no scorer.
        videos: The frames are those of videos; else they are pictures of their own.
    """
    if method is None:
        return
    views = [one.views for one in samples if one.views is not None]
    if method.reads_views and len(views) == len(samples):
        handle.views(
            depth=[plane for one in views for plane in one.depth],
            pose=[pose for one in views for pose in one.pose],
            intrinsics=[matrix for one in views for matrix in one.intrinsics],
        )
    if method.reads_frames and scores is not None:
        if videos:
            handle.frames(scores, of="video")
        else:
            import torch

            handle.frames(torch.cat(scores), of="image")
