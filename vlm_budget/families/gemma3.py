"""Gemma 3: square SigLIP images, patches averaged down to a fixed number of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..layout import Modality, VisualItem
from .base import Family, Model, mean_pool, square_item


class Gemma3(Family):
    """``Gemma3ForConditionalGeneration``.

    With pan-and-scan the processor gives every crop a placeholder run of its own and does not tell the model which
    picture it belongs to, so a crop is an item like any other image.
    """

    models = ("Gemma3ForConditionalGeneration", "Gemma3Model")

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """One square grid per image, of ``mm_tokens_per_image`` tokens."""
        side = math.isqrt(base.config.mm_tokens_per_image)
        return [square_item("image", side) for _ in inputs["pixel_values"]]

    def pool_attention(self, base: Model, modality: Modality, patches: torch.Tensor) -> torch.Tensor:
        """Average over the patches that the projector averages."""
        side = math.isqrt(patches.shape[1])
        return mean_pool(patches, side, side // math.isqrt(base.config.mm_tokens_per_image))
