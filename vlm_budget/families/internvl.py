"""InternVL (the transformers port): square tiles, class token, 2 x 2 patches shuffled into one token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layout import Modality, VisualItem
from .base import Family, Model, mean_pool, square_item
from .flops import linear_flops


class InternVL(Family):
    """``InternVLForConditionalGeneration``; frames of a video use the image placeholder and arrive as images.

    The processor cuts a picture into tiles and appends a thumbnail, but the model is given one flat list of tiles:
    neither the encoder's arguments nor their shape say where a picture ends. So every tile is an item of its own.
    """

    models = ("InternVLForConditionalGeneration", "InternVLModel")

    def vision_layers(self, base: Model) -> Sequence[nn.Module]:
        """The transformer layers of the vision tower."""
        return base.vision_tower.encoder.layer

    def layer_attention(self, layer: Model) -> nn.Module:
        """The attention module inside a vision layer."""
        return layer.attention

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """One square grid per tile."""
        pixels = inputs["pixel_values"]
        patch = base.config.vision_config.patch_size[0]
        side = pixels.shape[-1] // patch // self._factor(base)
        return [square_item("image", side) for _ in pixels]

    def pool_attention(self, base: Model, modality: Modality, patches: torch.Tensor) -> torch.Tensor:
        """Average over the patches that ``pixel_shuffle`` stacks into one token."""
        return mean_pool(patches, math.isqrt(patches.shape[1]), self._factor(base))

    def tower_patches(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> list[int]:
        """As many as are stacked into the tile's tokens."""
        return [item.size * self._factor(base) ** 2 for item in items]

    def projector_flops(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> int:
        """Stacked patches are projected."""
        return linear_flops(base.multi_modal_projector) * sum(item.size for item in items)

    def _factor(self, base: Model) -> int:
        return round(1 / base.config.downsample_ratio)
