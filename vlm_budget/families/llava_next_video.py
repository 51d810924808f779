"""LLaVA-NeXT-Video: LLaVA-NeXT's images, and videos of frames pooled by the vision resampler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..geometry import Fit
from ..layout import Modality, Partition, VisualItem
from .base import Model, grid_item
from .flops import convolution_flops, linear_flops
from .llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    """``LlavaNextVideoForConditionalGeneration``; frames are pooled before the projector, so its inputs are tokens."""

    models = ("LlavaNextVideoForConditionalGeneration", "LlavaNextVideoModel")
    encoders: ClassVar[Mapping[Modality, str]] = {"image": "get_image_features", "video": "get_video_features"}

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """Images as in LLaVA-NeXT; a video is its frames' grids one after the other."""
        if modality == "image":
            return super().items(base, modality, inputs)
        # Up to 4.x the parameter is called pixel_values.
        pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
        side = pixels.shape[-1] // base.config.vision_config.patch_size // base.config.spatial_pool_stride
        frames = [Partition("frame", side, side, time=time) for time in range(pixels.shape[1])]
        return [grid_item("video", frames) for _ in pixels]

    def unpooled(self, base: Model, modality: Modality) -> nn.Module | None:
        """The resampler, which pools frames before they are projected."""
        return base.vision_resampler if modality == "video" else None

    def fit(self, base: Model, modality: Modality, item: VisualItem) -> Fit:
        """Images as in LLaVA-NeXT; of frames the middle, as in LLaVA."""
        whole = super().fit(base, modality, item)
        return whole if modality == "image" else Fit("crop", base.config.vision_config.image_size, whole.covered)

    def pool_attention(self, base: Model, modality: Modality, patches: torch.Tensor) -> torch.Tensor:
        """Average over the patches that the resampler pools; images are not pooled."""
        if modality == "image":
            return patches
        side = math.isqrt(patches.shape[1])
        pooled = nn.functional.avg_pool2d(patches.view(-1, 1, side, side), base.config.spatial_pool_stride)
        return pooled.flatten(1)

    def projector_flops(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> int:
        """Frames are pooled, which may be a convolution, and projected then."""
        if modality == "image":
            return super().projector_flops(base, modality, items)
        per_token = convolution_flops(base.vision_resampler) + linear_flops(base.multi_modal_projector)
        return per_token * sum(item.size for item in items)
