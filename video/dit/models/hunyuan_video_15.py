"""HunyuanVideo-1.5: text behind the video in self-attention, with a mask of pairs that its processor would build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..masks import KeyMask
from .base import Preset, VideoModel


class HunyuanVideo15(VideoModel):
    """``HunyuanVideo15Transformer3DModel``: image, glyph and prompt tokens behind the video, valid ones first."""

    transformer = "HunyuanVideo15Transformer3DModel"
    attention = "attn"
    text = "last"

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        """Of the three encoders together."""
        names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        return sum(arguments[name].shape[1] for name in names if arguments.get(name) is not None)

    def lend_mask(self, mask: Any) -> Any:
        """A stand-in from which the processor builds its mask of L x L pairs without building anything."""
        return KeyMask.of_text(mask) if isinstance(mask, torch.Tensor) else mask

    def preset(self, transformer: nn.Module) -> Preset:
        """Ours, after HunyuanVideo's; nobody has published settings for this model."""
        return Preset(warmup=0.2, dense_layers=0.03, density=0.3)
