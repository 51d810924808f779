"""The base of every model adapter: what the attachment needs to know of a foreign transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from vlm_budget.errors import VideoAttentionError

from ..call import Grid
from ..method import SparseAttention, rounded_up

_TOKENS = 64  # per cluster, at least, where a preset's number of clusters is taken over


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Defaults for one model: what a method's fields are where the user left them None.

    Attributes:
        warmup: Share of a run's first steps that stay dense.
        dense_layers: Share of the first layers that stay dense.
        density: Share of the video's pairs that a sparse call computes; more where a grid allows of no less.
        query_clusters: Clusters of queries on large grids; None, and on others: what the method takes by itself.
        key_clusters: Clusters of keys, likewise.
    """

    warmup: float
    dense_layers: float
    density: float
    query_clusters: int | None = None
    key_clusters: int | None = None

    def fill(self, method: SparseAttention, grid: Grid) -> SparseAttention:
        """The method with the fields set that it shares with the preset.

        A density is not set where the method's own options say how much is computed, such as ``top_p``.

        Args:
            method: As the user configured it.
            grid: Of the video.
        """
        known = {field.name for field in fields(method)}
        values: dict[str, Any] = {"warmup": self.warmup, "dense_layers": self.dense_layers}
        for name in ("query_clusters", "key_clusters"):
            count = getattr(self, name)
            if name in known and count is not None and count * _TOKENS <= grid.tokens:
                values[name] = count
        method = replace(method, **{name: value for name, value in values.items() if getattr(method, name) is None})
        if method.settled:
            return method
        return replace(method, density=max(self.density, rounded_up(method.least_density(grid))))


class VideoModel:
    """What is known about one transformer class of diffusers.

    Attributes:
        transformer: Its class name.
        blocks: Attributes of the transformer that list its blocks, in the order in which they run.
        attention: Attribute of a block that is its self-attention.
        text: Where text stands among the tokens of self-attention.
        per_sample: Self-attention is computed once per sample of the batch, not once.
        rising: Timesteps rise during a run.
    """

    transformer: ClassVar[str]
    blocks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    attention: ClassVar[str] = "attn1"
    text: ClassVar[Literal["none", "first", "last"]] = "none"
    per_sample: ClassVar[bool] = False
    rising: ClassVar[bool] = False

    def attentions(self, transformer: nn.Module) -> list[nn.Module]:
        """The self-attention modules, layer by layer."""
        return [getattr(block, self.attention) for name in self.blocks for block in getattr(transformer, name)]

    def heads(self, transformer: nn.Module) -> tuple[int, int]:
        """Heads, and the size of one."""
        config: Any = transformer.config
        return config.num_attention_heads, config.attention_head_dim

    def patch(self, config: Any) -> tuple[int, int, int]:
        """Latent frames, rows and columns that make one token."""
        side = config.patch_size
        if isinstance(side, (tuple, list)):
            return tuple(side)
        return getattr(config, "patch_size_t", None) or 1, side, side

    def latents(self, hidden_states: torch.Tensor) -> tuple[int, int, int]:
        """Frames, rows and columns of what the transformer is given: [B, C, F, H, W] here."""
        frames, rows, cols = hidden_states.shape[2:]
        return frames, rows, cols

    def grid(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> Grid:
        """The video's tokens in one forward.

        Args:
            transformer: The transformer.
            arguments: Of its forward, by name.

        Raises:
            VideoAttentionError: The arguments do not tell.
        """
        states = arguments["hidden_states"]
        if states.ndim != 5:
            raise VideoAttentionError(
                f"{self.transformer} takes latents of five dimensions, got a tensor of shape {list(states.shape)}"
            )
        frames, rows, cols = (
            n // size for n, size in zip(self.latents(states), self.patch(transformer.config), strict=True)
        )
        return Grid(frames, rows, cols)

    def text_tokens(self, arguments: Mapping[str, Any]) -> int:
        """Text tokens beside the video's in one forward's self-attention, padding included."""
        return 0 if self.text == "none" else arguments["encoder_hidden_states"].shape[1]

    def lend_mask(self, mask: Any) -> Any:
        """What the processor is given instead of its attention mask in a sparse call; the mask itself here."""
        return mask

    def preset(self, transformer: nn.Module) -> Preset:
        """Defaults for a transformer of this class."""
        raise NotImplementedError
