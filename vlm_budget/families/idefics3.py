"""Idefics3: square tiles, SigLIP-like tower without class token, blocks of patches shuffled into one token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..layout import Modality, VisualItem
from .base import Family, Model, mean_pool, square_item
from .flops import linear_flops


class Idefics3(Family):
    """``Idefics3ForConditionalGeneration``.

    A picture arrives as its crops and then the whole of it, every tile in a placeholder run of its own. The encoder is
    given ``[prompts, most tiles, ...]`` pixels, which do not say where a picture of several tiles ends, so every tile
    is an item. Tiles of zeros fill up shorter prompts; the model drops them, and so does the layout.
    """

    models = ("Idefics3ForConditionalGeneration", "Idefics3Model")
    sizes: ClassVar[Mapping[Modality, Mapping[str, str]]] = {"image": {"tiles": "pixel_values"}}

    def language_model(self, base: Model) -> nn.Module:
        """The decoder whose inputs are shortened."""
        return base.text_model

    def vision_tower(self, base: Model) -> nn.Module:
        """The patch encoder."""
        return base.vision_model

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """One square grid per tile that is not all zero."""
        pixels = inputs["pixel_values"]
        side = pixels.shape[-1] // base.config.vision_config.patch_size // base.config.scale_factor
        tiles = inputs["tiles"] if "tiles" in inputs else self.measure("tiles", pixels)
        return [square_item("image", side) for _ in range(int(tiles))]

    def measure(self, name: str, given: torch.Tensor) -> torch.Tensor:
        """[] int64, how many tiles of [prompts, tiles, C, H, W] pixels are encoded."""
        return (given != 0).flatten(2).any(2).sum()

    def projector(self, base: Model, modality: Modality) -> nn.Module:
        """The connector's linear part, behind its ``pixel_shuffle``."""
        return base.connector.modality_projection

    def pool_attention(self, base: Model, modality: Modality, patches: torch.Tensor) -> torch.Tensor:
        """Average over the patches that the connector's ``pixel_shuffle`` stacks into one token."""
        return mean_pool(patches, math.isqrt(patches.shape[1]), base.config.scale_factor)

    def tower_patches(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> list[int]:
        """As many as are stacked into the tile's tokens."""
        return [item.size * base.config.scale_factor**2 for item in items]

    def projector_flops(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> int:
        """The connector projects stacked patches."""
        return linear_flops(base.connector) * sum(item.size for item in items)
