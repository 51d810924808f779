"""Gemma 3: square SigLIP images, patches averaged down to a fixed number of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layout import Modality, VisualItem
from .base import Family, Model, mean_pool, square_item


class Gemma3(Family):
    """``Gemma3ForConditionalGeneration``.

    The projector pools first, so its input rows here are those behind its pooling, one per token.

    With pan-and-scan the processor gives every crop a placeholder run of its own and does not tell the model which
    picture it belongs to, so a crop is an item like any other image.
    """

    models = ("Gemma3ForConditionalGeneration", "Gemma3Model")

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """One square grid per image, of ``mm_tokens_per_image`` tokens."""
        side = math.isqrt(base.config.mm_tokens_per_image)
        return [square_item("image", side) for _ in inputs["pixel_values"]]

    def projector(self, base: Model, modality: Modality) -> nn.Module:
        """The norm that follows the projector's pooling."""
        return base.multi_modal_projector.mm_soft_emb_norm

    def project(self, base: Model, rows: torch.Tensor) -> torch.Tensor:
        """The projector behind its pooling."""
        projector = base.multi_modal_projector
        return (projector.mm_soft_emb_norm(rows) @ projector.mm_input_projection_weight).type_as(rows)

    def pool_attention(self, base: Model, modality: Modality, patches: torch.Tensor) -> torch.Tensor:
        """Average over the patches that the projector averages."""
        side = math.isqrt(patches.shape[1])
        return mean_pool(patches, side, side // math.isqrt(base.config.mm_tokens_per_image))

    def projector_flops(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> int:
        """One product with the projection's weight per pooled token."""
        return 2 * base.multi_modal_projector.mm_input_projection_weight.numel() * sum(item.size for item in items)
