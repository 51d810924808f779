"""LLaVA-1.5 and its kin: one square image per placeholder run, CLIP tower, no separators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..geometry import Fit
from ..layout import Modality, VisualItem
from .base import Family, Model, square_item


class Llava(Family):
    """``LlavaForConditionalGeneration`` with a fixed-resolution tower."""

    models = ("LlavaForConditionalGeneration", "LlavaModel")

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """One square grid per image."""
        height, width = inputs["pixel_values"].shape[-2:]
        patch = base.config.vision_config.patch_size
        if height != width:
            from ..errors import LayoutError

            raise LayoutError(f"LLaVA images are square, got pixels of {height} x {width}")
        return [square_item("image", height // patch) for _ in range(len(inputs["pixel_values"]))]

    def fit(self, base: Model, modality: Modality, item: VisualItem) -> Fit:
        """The middle of the picture, once its short edge is that of the tower (``do_pad`` off, as released)."""
        vision, rows = base.config.vision_config, item.partitions[0].rows
        whole = rows * vision.patch_size
        side = vision.image_size if vision.image_size // vision.patch_size == rows else whole
        return Fit("crop", side, whole / side)
