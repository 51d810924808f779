"""A small timm vision transformer trained on procedural pages and shipped with the library.

`load` gives a stock ``timm.models.vision_transformer.VisionTransformer`` with no download. It is there to measure
methods that shorten the token sequence inside a vision transformer. It is synthetic and small: what a method costs in
accuracy here shows that it works as meant, and predicts no figure on ImageNet. The model card has data, recipe and
accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["folder", "load"]

_WEIGHTS = Path(__file__).parent / "weights"


def folder() -> Path:
    """Where weights, configuration and model card lie."""
    return _WEIGHTS


def load() -> VisionTransformer:
    """The shipped classifier in evaluation mode, float32, on the CPU. Needs timm."""
    from vlm_budget.eval.vit.modeling import load_from

    return load_from(folder())
