"""PaliGemma: one square SigLIP image per placeholder run, one token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..layout import Modality, VisualItem
from .base import Family, Model, square_item


class PaliGemma(Family):
    """``PaliGemmaForConditionalGeneration``, versions 1 and 2."""

    models = ("PaliGemmaForConditionalGeneration", "PaliGemmaModel")

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """One square grid per image."""
        vision = base.config.vision_config
        return [square_item("image", vision.image_size // vision.patch_size) for _ in inputs["pixel_values"]]

    def project(self, base: Model, rows: torch.Tensor) -> torch.Tensor:
        """The projector; where the language model scales all it is given, the features are scaled down before."""
        rows = base.multi_modal_projector(rows)
        # Up to 4.x Gemma scales its inputs; later only the embeddings of its text, by themselves.
        if hasattr(base.get_input_embeddings(), "embed_scale"):
            return rows
        return rows / base.config.text_config.hidden_size**0.5
