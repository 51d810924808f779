"""HunyuanVideo: text behind the video in self-attention, with a mask of keys."""

from __future__ import annotations

from torch import nn

from .base import Preset, VideoModel


class HunyuanVideo(VideoModel):
    """``HunyuanVideoTransformer3DModel``: blocks of two streams, then blocks of one."""

    transformer = "HunyuanVideoTransformer3DModel"
    blocks = ("transformer_blocks", "single_transformer_blocks")
    attention = "attn"
    text = "last"

    def preset(self, transformer: nn.Module) -> Preset:
        """SVG2's settings at 720p, of the authors' script, where top-p 0.9 came out at a density of 0.25."""
        return Preset(warmup=0.1, dense_layers=0.03, density=0.25, query_clusters=400, key_clusters=1000)
