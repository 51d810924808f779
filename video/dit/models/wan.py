"""Wan 2.1 and 2.2: video only in self-attention, text and image in another one."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import Preset, VideoModel

_SMALL = 2048  # channels: the 1.3B models have 1,536, the 5B one 3,072, the 14B ones 5,120


class Wan(VideoModel):
    """``WanTransformer3DModel``, of Wan 2.1 and of both transformers of Wan 2.2."""

    transformer = "WanTransformer3DModel"
    blocks = ("blocks",)

    def preset(self, transformer: nn.Module) -> Preset:
        """SVG2's settings for the 14B models at 720p; more caution for small ones.

        Warm-up, dense layers and clusters of the 14B models are those of the authors' scripts (text to video 0.2, image
        to video 0.35), where top-p 0.9 came out at densities of 0.25 to 0.31. The density of 0.25 is ours, and so is
        all that differs for small models, which the authors do not cover: no measured optimum.
        """
        config: Any = transformer.config
        heads, size = self.heads(transformer)
        if heads * size < _SMALL:
            return Preset(warmup=0.35, dense_layers=0.1, density=0.4)
        conditioned = config.image_dim is not None or config.in_channels != config.out_channels
        return Preset(
            warmup=0.35 if conditioned else 0.2, dense_layers=0.03, density=0.25, query_clusters=300, key_clusters=1000
        )
