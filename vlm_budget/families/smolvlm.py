"""SmolVLM: Idefics3's architecture; frames of a video arrive as images."""

from __future__ import annotations

import torch

from .idefics3 import Idefics3


class SmolVLM(Idefics3):
    """``SmolVLMForConditionalGeneration``."""

    models = ("SmolVLMForConditionalGeneration", "SmolVLMModel")

    def measure(self, name: str, given: torch.Tensor) -> torch.Tensor:
        """[] int64, how many tiles are encoded: an empty batch still has its first."""
        return super().measure(name, given).clamp_min(1)
