"""Greedy MAP of a determinantal point process."""

from __future__ import annotations

import torch

from ..errors import KernelInputError
from ..triton_kernels.greedy_dpp import greedy_dpp_reference, greedy_dpp_triton
from .dispatch import operator, runs_kernel
from .greedy_diversity import check_count, chooses_by_kernel


@operator("greedy_dpp", floating=("features", "log_quality"))
def _operator(features: torch.Tensor, log_quality: torch.Tensor, k: int) -> torch.Tensor:
    by_kernel = chooses_by_kernel(features) and runs_kernel(log_quality)
    return (greedy_dpp_triton if by_kernel else greedy_dpp_reference)(features, log_quality, k)


@_operator.register_fake
def _fake(features: torch.Tensor, log_quality: torch.Tensor, k: int) -> torch.Tensor:
    return features.new_empty(features.shape[0], k, dtype=torch.int64)


def greedy_dpp(features: torch.Tensor, log_quality: torch.Tensor, k: int) -> torch.Tensor:
    """Greedy MAP of a determinantal point process with the kernel ``diag(q) S diag(q)``, S the cosines of the features.

    *Fast Greedy MAP Inference for Determinantal Point Process to Improve Recommendation Diversity*, arXiv 1709.05135
    (NeurIPS 2018): each step adds the token that raises the determinant most, and one row to an incremental Cholesky
    factor. The factor here is that of S; a token's gain is its squared quality times what is left of its squared
    length. Tokens without gain (duplicates of chosen ones, tokens beyond the rank, zero quality) follow when nothing
    else is left, by quality. Equal gains go to the lower index.

    The kernel sums in another order than the reference, and gains are logarithms in float32: of tokens whose gains
    differ by less than about 1e-6, either may be chosen. Like the reference, it follows torch's precision of float32
    matrix products: with TF32 allowed, the chosen tokens are taken out of the similarities in TF32.

    Args:
        features: [n, C], or [G, n, C]: every group for itself.
        log_quality: [n] or [G, n] logarithm of the quality, so that any range of it fits; ``-inf`` for zero.
        k: How many, at most n.

    Returns:
        [k] or [G, k] int64 indices in the order of choice.

    Raises:
        KernelInputError: Shapes that do not match, or k above n.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    if features.ndim not in (2, 3) or log_quality.shape != features.shape[:-1]:
        raise KernelInputError(
            "features and log_quality must be [n, C] and [n], or [G, n, C] and [G, n]: got "
            f"{list(features.shape)} and {list(log_quality.shape)}"
        )
    check_count(k, features.shape[-2])
    if not k:
        return torch.empty(*features.shape[:-2], 0, dtype=torch.int64, device=features.device)
    single = features.ndim == 2
    if single:
        features, log_quality = features[None], log_quality[None]
    chosen: torch.Tensor = _operator(features.detach(), log_quality.detach(), k)
    return chosen[0] if single else chosen
