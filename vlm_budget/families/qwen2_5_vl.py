"""Qwen2.5-VL: Qwen2-VL with a tower that sorts tokens into windows and attends within them in most layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..layout import Modality, VisualItem
from .base import Model
from .qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """``Qwen2_5_VLForConditionalGeneration``.

    ``Tower.feature_layer`` is the last layer of full attention (the very last one in released models). Scores of a
    window layer only rank tokens within a window: they sum to one in each.
    """

    models = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")

    def feature_layer(self, config: Any, layers: int) -> int:
        """0-based index of the last layer in which all patches of an image see each other."""
        return max(config.vision_config.fullatt_block_indexes)

    def tower_order(self, base: Model, items: Sequence[VisualItem]) -> torch.Tensor:
        """Window by window, row by row within a window; a frame after the other."""
        vision = base.config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        orders, start = [], 0
        for grid in (grid for item in items for grid in item.partitions):
            row = torch.arange(grid.rows)[:, None]
            col = torch.arange(grid.cols)[None]
            window = row // side * grid.cols + col // side
            orders.append(start + window.flatten().argsort(stable=True))
            start += grid.rows * grid.cols
        return torch.cat(orders)

    def tower_sequences(self, base: Model, modality: Modality, items: Sequence[VisualItem], layer: int) -> list[int]:
        """Whole temporal patches in the layers of full attention, windows in the others."""
        vision = base.config.vision_config
        if layer in vision.fullatt_block_indexes:
            return super().tower_sequences(base, modality, items, layer)
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        block = vision.spatial_merge_size**2
        return [
            min(side, grid.rows - top) * min(side, grid.cols - left) * block
            for item in items
            for grid in item.partitions
            for top in range(0, grid.rows, side)
            for left in range(0, grid.cols, side)
        ]
