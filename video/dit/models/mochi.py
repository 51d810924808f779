"""Mochi: the valid text behind the video in self-attention, computed sample by sample."""

from __future__ import annotations

from torch import nn

from .base import Preset, VideoModel


class Mochi(VideoModel):
    """``MochiTransformer3DModel``. Its processor itself leaves padding out."""

    transformer = "MochiTransformer3DModel"
    text = "last"
    per_sample = True
    rising = True

    def preset(self, transformer: nn.Module) -> Preset:
        """Ours, after HunyuanVideo's; nobody has published settings for this model."""
        return Preset(warmup=0.2, dense_layers=0.03, density=0.3)
