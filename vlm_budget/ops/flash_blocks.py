"""Block-sparse attention by FlashAttention-4 where blocks are fixed tiles of 128, and ours for what it cannot take.

FlashAttention-4 computes whole tiles on Hopper. What it leaves is computed by :func:`block_sparse_attention` and merged
through the logarithms of the softmax denominators: the last blocks of either side (a part of a tile, text) and the
correction by means. Not verified on a device with the released package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from ..errors import KernelInputError, KernelUnavailableError, MissingExtraError

TILE = 128
"""Rows and keys of a tile that FlashAttention-4 skips or computes on Hopper."""
PARTS = 2
"""Blocks at the end of either side that may be no whole tile: the rest of the video, and text."""
Part = tuple[torch.Tensor, torch.Tensor]


def flash_blocks(
    own: Callable[..., Part],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_sizes: torch.Tensor,
    key_sizes: torch.Tensor,
    kept: torch.Tensor,
    *,
    scale: float,
    mean_keys: torch.Tensor | None,
    mean_values: torch.Tensor | None,
    tile: int | None,
) -> Part:
    """As :func:`vlm_budget.ops.block_sparse_attention`, for blocks of ``tile=128``.

    Args:
        own: That function, for what FlashAttention-4 cannot take.

    Raises:
        KernelInputError: Blocks of another size, or float32.
        KernelUnavailableError: The device is no Hopper.
        MissingExtraError: FlashAttention-4 is not installed.
    """
    attend = require_flash()
    if tile != TILE:
        raise KernelInputError(f"backend='fa4' takes blocks of tile={TILE}, got tile={tile}. Take backend='auto'.")
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise KernelInputError(f"backend='fa4' takes bfloat16 and float16, got {query.dtype}. Take backend='auto'.")
    if not _hopper(query.device):
        raise KernelUnavailableError(
            f"backend='fa4' runs on NVIDIA Hopper (compute capability 9.0), and the tensors live on {query.device}. "
            "Take backend='auto'."
        )
    means = {"mean_keys": mean_keys, "mean_values": mean_values}
    rows, columns = (max(0, size.shape[2] - PARTS) for size in (query_sizes, key_sizes))
    top, left = rows * TILE, columns * TILE
    if not top or not left:
        return own(query, key, value, query_sizes, key_sizes, kept, scale=scale, **means)
    upper, of_upper = query[:, :, :top], kept[:, :, :rows]
    sizes = query_sizes[..., :rows]
    parts = [
        _whole_tiles(attend, upper, key[:, :, :left], value[:, :, :left], of_upper[..., :columns], scale),
        own(
            *(upper, key[:, :, left:], value[:, :, left:], sizes, key_sizes[..., columns:], of_upper[..., columns:]),
            scale=scale,
        ),
    ]
    if mean_keys is not None:  # without any keys, dropped blocks alone are counted
        parts.append(own(upper, key[:, :, :0], value[:, :, :0], sizes, key_sizes, of_upper, scale=scale, **means))
    done, lse = merged(parts)
    below = query_sizes[..., rows:], key_sizes, kept[:, :, rows:]
    rest, rest_lse = own(query[:, :, top:], key, value, *below, scale=scale, **means)
    return torch.cat([done.to(query.dtype), rest], 2), torch.cat([lse, rest_lse], 2)


def merged(parts: Sequence[Part]) -> Part:
    """One softmax out of several over different keys.

    Args:
        parts: Outputs [B, H, L, D], and [B, H, L] logarithms of their denominators; ``-inf`` where nothing was seen.

    Returns:
        [B, H, L, D] float32 and [B, H, L] float32.
    """
    levels = torch.stack([lse for _, lse in parts])
    peak = levels.amax(0)
    weights = (levels - torch.where(peak == -torch.inf, 0.0, peak)).exp()
    total = weights.sum(0)
    shares = weights / torch.where(total > 0, total, 1.0)
    out = torch.zeros(parts[0][0].shape, dtype=torch.float32, device=peak.device)
    for (part, _), share in zip(parts, shares, strict=True):
        out += part.float() * share[..., None]
    return out, peak + total.log()


def require_flash() -> Callable[..., Any]:
    """FlashAttention-4's attention.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        found: Callable[..., Any] = import_module("flash_attn.cute").flash_attn_func
    except (ImportError, AttributeError) as error:
        raise MissingExtraError(
            "backend='fa4' needs FlashAttention-4, which cannot be imported. Install it (pip install flash-attn-4), or "
            "take backend='auto'."
        ) from error
    return found


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _whole_tiles(
    attend: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
) -> Part:
    """Rows and keys that are whole tiles; FlashAttention-4 has heads behind tokens."""
    counts = kept.sum(-1, dtype=torch.int32)
    index = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).int()
    lists = {"full_block_cnt": counts, "full_block_idx": index}
    none = {"mask_block_cnt": torch.zeros_like(counts), "mask_block_idx": torch.zeros_like(index)}
    turned = (one.transpose(1, 2) for one in (query, key, value))
    out, lse = attend(*turned, softmax_scale=scale, **lists, **none, block_size=(TILE, TILE), return_lse=True)
    seen = counts.repeat_interleave(TILE, -1) > 0  # what it leaves in rows that see nothing is not documented
    out = torch.where(seen[..., None], out.transpose(1, 2), 0.0)
    return out, torch.where(seen, lse, -torch.inf)
