"""Which blocks of keys a block of queries attends to, chosen by the means of both."""

from __future__ import annotations

import torch

from ..errors import KernelInputError
from ..triton_kernels.block_map import block_map_reference, block_map_triton, require_blocks
from .dispatch import operator, runs_kernel

_SCHEMA = (
    "(Tensor query_means, Tensor key_means, Tensor key_sizes, float scale, float? top_p, float? density, float floor)"
    " -> Tensor"
)


@operator("block_map", _SCHEMA, floating=("query_means", "key_means"))
def _operator(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    top_p: float | None,
    density: float | None,
    floor: float,
) -> torch.Tensor:
    require_blocks(query_means, key_means, key_sizes)
    run = block_map_triton if runs_kernel(query_means, key_means) else block_map_reference
    return run(query_means, key_means, key_sizes, scale, top_p, density, floor)


@_operator.register_fake
def _fake(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    top_p: float | None,
    density: float | None,
    floor: float,
) -> torch.Tensor:
    return query_means.new_empty((*query_means.shape[:3], key_means.shape[2]), dtype=torch.bool)


def block_map(
    query_means: torch.Tensor,
    key_means: torch.Tensor,
    key_sizes: torch.Tensor,
    scale: float,
    *,
    top_p: float | None = None,
    density: float | None = None,
    floor: float = 0.0,
) -> torch.Tensor:
    """The key blocks that every query block attends to, by the mass that their means promise (SVG2, arXiv:2505.18875).

    The mass of query block i on key block j is ``n_j exp(scale q_i . k_j) / sum_k n_k exp(scale q_i . k_k)``, of their
    means and the sizes ``n`` of the key blocks, in float32. Blocks are taken by falling mass, ties by the lower index,
    and how far is said by ``top_p`` or by ``density``. Empty key blocks are never taken. A score that is not a number
    comes last. Nothing of it is differentiated, and the host does not wait.

    Args:
        query_means: [B, H, Cq, D]. Rows of empty query blocks get some blocks, too.
        key_means: [B, H, Ck, D], with 1 to 4,096 blocks.
        key_sizes: [B or 1, H or 1, Ck] int32, keys of each block.
        scale: Factor on the logits.
        top_p: In (0, 1]: until the mass first reaches it, the block that crosses it included. 1 takes every block that
            has keys.
        density: In (0, 1], instead of ``top_p``: as long as the blocks' keys are at most this share of all; it stops at
            the first that does not fit, and always takes the best.
        floor: In [0, 1], with ``top_p``: in any case until this share of the keys is reached.

    Returns:
        [B, H, Cq, Ck] bool, True where a pair is to be computed.

    Raises:
        KernelInputError: Not exactly one of ``top_p`` and ``density``, shares that are none, or tensors that do not fit
            together.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    if (top_p is None) == (density is None):
        raise KernelInputError(f"give either top_p or density, got top_p={top_p} and density={density}")
    for name, share in (("top_p", top_p), ("density", density)):
        if share is not None and not 0 < share <= 1:
            raise KernelInputError(f"{name} must be above 0 and at most 1, got {share}")
    if not 0 <= floor <= 1 or (floor and density is not None):
        raise KernelInputError(f"floor must lie between 0 and 1 and goes with top_p, got {floor} (density={density})")
    require_blocks(query_means, key_means, key_sizes)
    kept: torch.Tensor = _operator(
        query_means.detach(), key_means.detach(), key_sizes, float(scale), top_p, density, float(floor)
    )
    return kept
