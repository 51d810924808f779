"""PaliGemma: one square SigLIP image per placeholder run, one token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..layout import Modality, VisualItem
from .base import Family, Model, square_item


class PaliGemma(Family):
    """``PaliGemmaForConditionalGeneration``, versions 1 and 2."""

    models = ("PaliGemmaForConditionalGeneration", "PaliGemmaModel")

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """One square grid per image."""
        vision = base.config.vision_config
        return [square_item("image", vision.image_size // vision.patch_size) for _ in inputs["pixel_values"]]
