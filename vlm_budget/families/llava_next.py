"""LLaVA-NeXT (1.6): thumbnail plus crops, unpadded mosaic with a newline at each row end, CLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..layout import Modality, VisualItem
from .anyres import anyres_item, crop_grid
from .base import Family, Model


class LlavaNext(Family):
    """``LlavaNextForConditionalGeneration``."""

    models = ("LlavaNextForConditionalGeneration", "LlavaNextModel")
    sizes: ClassVar[Mapping[Modality, Mapping[str, str]]] = {"image": {"image_sizes": "image_sizes"}}

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """Thumbnail tokens, then the mosaic row by row, crops interleaved as in the unpruned model."""
        config = base.config
        pixels = config.vision_config.image_size
        side = pixels // config.vision_config.patch_size

        def item(size: torch.Tensor) -> VisualItem:
            def pack(parts: list[torch.Tensor], newline: torch.Tensor) -> torch.Tensor:
                packed, _ = base.pack_image_features(
                    parts, size[None], vision_feature_select_strategy="full", image_newline=newline
                )
                return packed[0]

            return anyres_item(size.tolist(), crop_grid(size, config.image_grid_pinpoints, pixels), side, pixels, pack)

        return [item(size) for size in torch.as_tensor(inputs["image_sizes"]).cpu()]
