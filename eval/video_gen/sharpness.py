"""How many keys attention needs: the gate that a model must pass before sparse attention on it means anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .clips import Size, draw_clips, draw_words, embed

LEVELS = (0.9, 0.7, 0.45, 0.2)
"""Noise levels at which attention is looked at."""


class _SelfAttention(TorchFunctionMode):
    """Collects the share of keys that rows of self-attention need."""

    def __init__(self, tokens: int, mass: float) -> None:
        super().__init__()
        self.tokens, self.mass = tokens, mass
        self.shares: list[float] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
            query, key = named["query"].float(), named["key"].float()
            if query.shape[2] == key.shape[2] == self.tokens:
                self.shares.append(self._needed(query[:, :, ::13], key))
        return func(*args, **(kwargs or {}))

    def _needed(self, query: torch.Tensor, key: torch.Tensor) -> float:
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        before = weights.sort(-1, descending=True).values.cumsum(-1)
        return ((before < self.mass).sum(-1) + 1).float().mean().item() / key.shape[2]


@torch.no_grad()
def keys_needed(model: nn.Module, mass: float = 0.9, size: Size | None = None, clips: int = 2) -> float:
    """Mean share of keys whose attention weights add up to ``mass``, per row, over layers, heads and noise levels."""
    size = size or Size()
    generator = torch.Generator().manual_seed(99)
    words = draw_words(clips, generator)
    clean = draw_clips(words, size, generator)
    noise = torch.randn(clean.shape, generator=generator)
    with _SelfAttention(size.tokens, mass) as seen:
        for level in LEVELS:
            mixed = (1 - level) * clean + level * noise
            model(mixed, torch.full((clips,), 1000 * level), embed(words), return_dict=False)
    return sum(seen.shares) / len(seen.shares)
