"""CogVideoX 1.0 and 1.5: text before the video in self-attention, without a mask."""

from __future__ import annotations

import torch
from torch import nn

from .base import Preset, VideoModel


class CogVideoX(VideoModel):
    """``CogVideoXTransformer3DModel``; 1.5 makes tokens of two latent frames."""

    transformer = "CogVideoXTransformer3DModel"
    text = "first"

    def latents(self, hidden_states: torch.Tensor) -> tuple[int, int, int]:
        """Of [B, F, C, H, W]."""
        frames, _, rows, cols = hidden_states.shape[1:]
        return frames, rows, cols

    def preset(self, transformer: nn.Module) -> Preset:
        """Ours; nobody has published settings for this model."""
        return Preset(warmup=0.2, dense_layers=0.03, density=0.3)
