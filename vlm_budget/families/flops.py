"""Arithmetic of modules: multiply-adds, counted as two operations each, as ``torch.utils.flop_counter`` counts them.

Matrix products, convolutions and attention; norms, activations, rotary embeddings, pooling and look-ups are left out
(below a thousandth in real models). Weights are read off the modules that run, so grouped heads, gated and fused
projections, adapters and quantised layers are what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from ..layout import Modality, VisualItem
    from .base import Family


def linear_flops(module: nn.Module) -> int:
    """FLOPs per token of all linear layers inside a module.

    Read off the layers' declared sizes: quantised weights are packed, and adapters wrap the layer they add to.
    """
    return sum(2 * int(leaf.in_features) * int(leaf.out_features) for leaf in _linears(module))


def _linears(module: nn.Module) -> Iterable[Any]:
    for leaf in module.modules():
        sized = hasattr(leaf, "in_features") and hasattr(leaf, "out_features")
        if sized and next(leaf.children(), None) is None:
            yield leaf


def convolution_flops(module: nn.Module) -> int:
    """FLOPs per output position of all convolutions inside a module."""
    return sum(2 * leaf.weight.numel() for leaf in module.modules() if isinstance(leaf, nn.Conv2d | nn.Conv3d))


def pair_flops(attention: Any) -> int:
    """FLOPs per pair of a query and a key: the products of queries with keys, and of weights with values."""
    fused = getattr(attention, "qkv", None)
    if fused is not None:
        return 4 * (int(fused.out_features) // 3)
    return 4 * int(attention.q_proj.out_features)


def encoder_flops(family: Family, base: Any, modality: Modality, items: Sequence[VisualItem]) -> int:
    """FLOPs of encoding items: the vision tower and the projector, which run in full whatever is pruned."""
    tower = family.vision_tower(base)
    total = convolution_flops(tower) * sum(family.tower_patches(base, modality, items))
    for index, layer in enumerate(family.vision_layers(base)):
        lengths = family.tower_sequences(base, modality, items, index)
        pairs = sum(length * length for length in lengths)
        total += linear_flops(layer) * sum(lengths) + pair_flops(family.layer_attention(layer)) * pairs
    head = getattr(getattr(tower, "vision_model", tower), "head", None)
    if getattr(head, "probe", None) is not None:
        total += sum(pooling_head_flops(head, patches) for patches in family.tower_patches(base, modality, items))
    return total + family.projector_flops(base, modality, items)


def pooling_head_flops(head: Any, patches: int) -> int:
    """FLOPs of SigLIP's pooling head, which runs and whose output is thrown away: one query over all patches."""
    width = int(head.attention.embed_dim)
    projections = 2 * width * width * (1 + 2 * patches) + linear_flops(head.attention.out_proj)
    return projections + 4 * width * patches + linear_flops(head.mlp)
