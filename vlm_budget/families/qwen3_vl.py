"""Qwen3-VL: Qwen2-VL's packing; the tower also emits deepstack features, one per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..layout import Modality, VisualItem
from .base import Model
from .flops import linear_flops
from .qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """``Qwen3VLForConditionalGeneration``; the frames of a video stand in placeholder runs of their own.

    The deepstack features of a token have mergers of their own, which merging methods do not reach: the language model
    adds those of the kept token, whatever has been merged into it.
    """

    models = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")

    def projector(self, base: Model, modality: Modality) -> nn.Module:
        """The first layer of the merger, behind its norm."""
        return base.visual.merger.linear_fc1

    def project(self, base: Model, rows: torch.Tensor) -> torch.Tensor:
        """The merger behind its norm."""
        merger = base.visual.merger
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(rows)))

    def features(self, base: Model, modality: Modality, output: Any, items: Sequence[VisualItem]) -> list[torch.Tensor]:
        """The merged features per item, without the deepstack ones."""
        # Up to 4.x the encoder returns the pair (features, deepstack features).
        packed = output.pooler_output if hasattr(output, "pooler_output") else output[0]
        return super().features(base, modality, packed, items)

    def projector_flops(self, base: Model, modality: Modality, items: Sequence[VisualItem]) -> int:
        """The merger, and those of the deepstack features, per merged token."""
        deep = linear_flops(base.visual.deepstack_merger_list) * sum(item.size for item in items)
        return super().projector_flops(base, modality, items) + deep
