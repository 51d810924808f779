"""LTX-Video: video only in self-attention, given as a list of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlm_budget.errors import VideoAttentionError

from ..call import Grid
from .base import Preset, VideoModel


class LTX(VideoModel):
    """``LTXVideoTransformer3DModel``. Its videos are short in tokens: see the break-even length."""

    transformer = "LTXVideoTransformer3DModel"

    def grid(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        """From ``num_frames``, ``height`` and ``width``, which count tokens here.

        Raises:
            VideoAttentionError: They are missing, as where conditions stand among the tokens, or do not multiply to the
                tokens there are.
        """
        sides = [arguments.get(name) for name in ("num_frames", "height", "width")]
        tokens = arguments["hidden_states"].shape[1]
        if None in sides:
            raise VideoAttentionError(
                f"{self.transformer} was called without num_frames, height and width (pipelines that take conditions "
                "pass coordinates instead): its tokens form no known grid. Use LTXPipeline or LTXImageToVideoPipeline."
            )
        grid = Grid(*(int(side) for side in sides if side is not None))
        if grid.tokens != tokens:
            raise VideoAttentionError(f"{self.transformer} was given {tokens} tokens and the grid {grid}")
        return grid

    def preset(self, transformer: nn.Module) -> Preset:
        """Ours; nobody has published settings for this model."""
        return Preset(warmup=0.2, dense_layers=0.03, density=0.3)
