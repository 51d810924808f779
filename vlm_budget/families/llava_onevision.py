"""LLaVA-OneVision: SigLIP, any-resolution images that shrink when large, videos with one newline at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..geometry import Fit
from ..layout import Modality, Partition, VisualItem
from .anyres import anyres_item, crop_grid
from .base import Family, Model, flatten_features, grid_item


class LlavaOnevision(Family):
    """``LlavaOnevisionForConditionalGeneration``.

    Only an image that is alone in its prompt is cut into crops (``batch_num_images`` tells). A mosaic with more area
    than the model's limit is shrunk bilinearly: each of its tokens is named after the patch nearest to its centre.

    Such a mosaic is shrunk behind the projector, and so are the frames of a video. Methods that read the projector's
    inputs are given the features of these items instead, thumbnail included.
    """

    models = ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel")
    encoders: ClassVar[Mapping[Modality, str]] = {"image": "get_image_features", "video": "get_video_features"}
    sizes: ClassVar[Mapping[Modality, Mapping[str, str]]] = {
        "image": {"image_sizes": "image_sizes", "batch_num_images": "batch_num_images"}
    }

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """Images like LLaVA-NeXT's; a video is its frames' grids and one newline."""
        if modality == "video":
            # Up to 4.x the parameter is called pixel_values.
            pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
            return [self._video(base, pixels.shape[1]) for _ in pixels]
        sizes = torch.as_tensor(inputs["image_sizes"]).cpu()
        images = inputs.get("batch_num_images")
        counts = [1] * len(sizes) if images is None else torch.as_tensor(images).tolist()
        alone = [count == 1 for count in counts for _ in range(count)]
        aspect = inputs.get("vision_aspect_ratio") or base.config.vision_aspect_ratio
        return [self._image(base, size, cut, aspect) for size, cut in zip(sizes, alone, strict=True)]

    def _image(self, base: Model, size: torch.Tensor, cut: bool, aspect: str) -> VisualItem:
        pixels = base.config.vision_config.image_size

        def pack(parts: list[torch.Tensor], newline: torch.Tensor) -> torch.Tensor:
            packed, _ = base.pack_image_features(parts, size[None], image_newline=newline, vision_aspect_ratio=aspect)
            return packed[0]

        grid = crop_grid(size, base.config.image_grid_pinpoints, pixels) if cut else None
        return anyres_item(size.tolist(), grid, self._side(base), pixels, pack)

    def _video(self, base: Model, frames: int) -> VisualItem:
        side = math.ceil(self._side(base) / 2)
        grids = grid_item("video", [Partition("frame", side, side, time=time) for time in range(frames)])
        # The newline closes one line that all the frames stand in.
        newline = torch.tensor([-1])
        partition, patch = torch.cat([grids.partition, newline]), torch.cat([grids.patch, newline])
        return VisualItem("video", grids.partitions, partition, patch, torch.zeros_like(patch), resampled=True)

    def fit(self, base: Model, modality: Modality, item: VisualItem) -> Fit:
        """One of several pictures is padded to a square; one that is cut, and the frames of a video, are squeezed."""
        whole = super().fit(base, modality, item)
        return replace(whole, kind="pad") if item.partitions[0].kind == "image" else whole

    def projector(self, base: Model, modality: Modality) -> nn.Module | None:
        """The projector; None for videos, whose frames are pooled behind it."""
        return base.multi_modal_projector if modality == "image" else None

    def unpooled(self, base: Model, modality: Modality) -> nn.Module | None:
        """The projector, behind which frames are pooled."""
        return base.multi_modal_projector if modality == "video" else None

    def _side(self, base: Model) -> int:
        return base.config.vision_config.image_size // base.config.vision_config.patch_size

    def features(self, base: Model, modality: Modality, output: Any, items: Sequence[VisualItem]) -> list[torch.Tensor]:
        """The encoder's output per item; up to 4.x the model adds a video's newline later, so it is added here."""
        packed = getattr(output, "pooler_output", output)
        rows = flatten_features(packed)
        if modality == "video" and len(rows) == sum(item.size - 1 for item in items):
            newline = base.image_newline.to(rows)[None]
            packed = [torch.cat([part, newline]) for part in rows.split([item.size - 1 for item in items])]
        return super().features(base, modality, packed, items)

    def pool_attention(self, base: Model, modality: Modality, patches: torch.Tensor) -> torch.Tensor:
        """Frames' scores go through the model's own bilinear pooling; images are not pooled."""
        return patches if modality == "image" else base.apply_pooling(patches[..., None])[..., 0]
