"""Qwen2-VL: images and videos at native resolution, blocks of patches merged into one token, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import LayoutError
from ..geometry import Fit
from ..layout import Modality, Partition, PartitionKind, VisualItem
from .base import Family, Model, grid_item
from .flops import linear_flops


class Qwen2VL(Family):
    """``Qwen2VLForConditionalGeneration``.

    A video is one partition per temporal patch (two frames, released models). Attention stays within a temporal patch,
    so its scores sum to one in each. The projector's inputs are the merger's behind its norm, a block of patches side
    by side.
    """

    models = ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
    encoders: ClassVar[Mapping[Modality, str]] = {"image": "get_image_features", "video": "get_video_features"}
    sizes: ClassVar[Mapping[Modality, Mapping[str, str]]] = {
        "image": {"image_grid_thw": "image_grid_thw"},
        "video": {"video_grid_thw": "video_grid_thw"},
    }
    mrope = True

    def vision_tower(self, base: Model) -> nn.Module:
        """The patch encoder."""
        return base.visual

    def vision_layers(self, base: Model) -> Sequence[nn.Module]:
        """The transformer layers of the vision tower."""
        return base.visual.blocks

    def layer_attention(self, layer: Model) -> nn.Module:
        """The attention module inside a vision layer."""
        return layer.attn

    def projector(self, base: Model, modality: Modality) -> nn.Module:
        """The merger behind its norm, where a block of patches has become one row."""
        return base.visual.merger.mlp

    def items(self, base: Model, modality: Modality, inputs: Mapping[str, Any]) -> list[VisualItem]:
        """One grid per image, one per temporal patch of a video."""
        vision = base.config.vision_config
        merge, merged_frames = vision.spatial_merge_size, vision.temporal_patch_size
        kind: PartitionKind = "image" if modality == "image" else "frame"

        def item(frames: int, height: int, width: int) -> VisualItem:
            grid = (height // merge, width // merge)
            return grid_item(modality, [Partition(kind, *grid, time=time * merged_frames) for time in range(frames)])

        return [item(*grid) for grid in torch.as_tensor(inputs[f"{modality}_grid_thw"]).tolist()]

    def fit(self, base: Model, modality: Modality, item: VisualItem) -> Fit:
        """Resized to the nearest whole number of tokens, nothing padded and nothing cut off."""
        return Fit(native=True)

    def token_attention(
        self,
        base: Model,
        modality: Modality,
        kind: str,
        calls: Sequence[torch.Tensor],
        items: Sequence[VisualItem],
        inputs: Mapping[str, Any],
    ) -> list[list[torch.Tensor]]:
        """Probe rows as scores (or keys) of tokens: the mean over each block of merged patches.

        Flash backends attend to all sequences in one packed call; the others are called once per temporal patch (or
        window), in order.
        """
        block = base.config.vision_config.spatial_merge_size**2
        sizes = [grid.rows * grid.cols for item in items for grid in item.partitions]
        patches = torch.cat(list(calls), 1).flatten(0, 1)
        if len(patches) != sum(sizes) * block:
            raise LayoutError(f"the vision tower saw {len(patches)} patches, the layout has {sum(sizes) * block}")
        # The processor emits the patches of a block one after the other.
        tokens = self.from_tower_order(base, patches.unflatten(0, (-1, block)).mean(1), items)
        queue = iter(tokens.split(sizes))
        return [[next(queue) for _ in item.partitions] for item in items]

    def tower_patches(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> list[int]:
        """Patches of every image or temporal patch, before blocks of them are merged."""
        block = base.config.vision_config.spatial_merge_size**2
        return [grid.rows * grid.cols * block for item in items for grid in item.partitions]

    def projector_flops(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> int:
        """The merger, per merged token."""
        return linear_flops(base.visual.merger) * sum(item.size for item in items)
