"""The small video model: a ``WanTransformer3DModel`` and the pipeline around it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from .clips import CELL, VOCABULARY

CONFIG: dict[str, Any] = {
    "patch_size": (1, CELL, CELL),
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": VOCABULARY,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
"""Pixels are its latents: there is no VAE, so that a difference in a clip is the attention's and nothing else's."""
SHARPNESS = 1.5
"""Initial weight of the norms of queries and keys: attention begins sharp, and training may soften it."""


def build(seed: int) -> WanTransformer3DModel:
    """The model with fresh weights."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**CONFIG)
    for block in model.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            torch.nn.init.constant_(norm.weight, SHARPNESS)
    return model
