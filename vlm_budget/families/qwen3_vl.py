"""Qwen3-VL: Qwen2-VL's packing; the tower also emits deepstack features, one per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..layout import Modality, VisualItem
from .base import Model
from .qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """``Qwen3VLForConditionalGeneration``; the frames of a video stand in placeholder runs of their own."""

    models = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")

    def features(self, base: Model, modality: Modality, output: Any, items: Sequence[VisualItem]) -> list[torch.Tensor]:
        """The merged features per item, without the deepstack ones."""
        # Up to 4.x the encoder returns the pair (features, deepstack features).
        packed = output.pooler_output if hasattr(output, "pooler_output") else output[0]
        return super().features(base, modality, packed, items)
