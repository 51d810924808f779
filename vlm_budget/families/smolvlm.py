"""SmolVLM: Idefics3's architecture; frames of a video arrive as images."""

from __future__ import annotations

import torch

from .idefics3 import Idefics3


class SmolVLM(Idefics3):
    """``SmolVLMForConditionalGeneration``."""

    models = ("SmolVLMForConditionalGeneration", "SmolVLMModel")

    def tiles(self, pixels: torch.Tensor) -> int:
        """How many of [prompts, tiles, C, H, W] are encoded: an empty batch still has its first tile."""
        return max(1, super().tiles(pixels))
