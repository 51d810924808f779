"""Max-min diversity."""

from __future__ import annotations

import torch

from ..errors import KernelInputError
from ..triton_kernels._cosines import WHOLE_UP_TO
from ..triton_kernels.greedy_diversity import greedy_diversity_reference, greedy_diversity_triton
from .dispatch import mode, operator, runs_kernel


@operator(
    "greedy_diversity",
    "(Tensor? features, Tensor? xyz, Tensor? seed, int k, float weight) -> Tensor",
    floating=("features", "xyz"),
    whole=("seed",),
)
def _operator(
    features: torch.Tensor | None, xyz: torch.Tensor | None, seed: torch.Tensor | None, k: int, weight: float
) -> torch.Tensor:
    run = greedy_diversity_triton if chooses_by_kernel(features, xyz) else greedy_diversity_reference
    return run(features, xyz, seed, k, weight)


@_operator.register_fake
def _fake(
    features: torch.Tensor | None, xyz: torch.Tensor | None, seed: torch.Tensor | None, k: int, weight: float
) -> torch.Tensor:
    given = features if features is not None else xyz
    assert given is not None
    return given.new_empty(given.shape[0], k, dtype=torch.int64)


def chooses_by_kernel(features: torch.Tensor | None, xyz: torch.Tensor | None = None) -> bool:
    """Whether the kernel is to choose among [G, n, ...] tokens: it keeps all similarities."""
    given = features if features is not None else xyz
    if given is None or not runs_kernel(features, xyz):
        return False
    # Left to choose, the reference makes the rows of more tokens one by one.
    return mode() == "triton" or given.shape[0] * given.shape[1] ** 2 <= WHOLE_UP_TO


def greedy_diversity(
    features: torch.Tensor | None,
    k: int,
    *,
    xyz: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    weight: float = 0.5,
) -> torch.Tensor:
    """Tokens far apart: each next one is the farthest from its nearest chosen one.

    The distance is ``1 - cos`` of the features; the Euclidean distance of the coordinates, where these come alone; with
    both, SeGPruner's fusion ``weight d / d_x + (1 - weight) (1 - cos)``, d_x being the largest coordinate distance from
    the seed (arXiv 2603.29437, Eq. 4 to 9).

    Equally far tokens are chosen in order. Features of bfloat16 and float16 are compared in float32; the kernel takes
    their products on tensor cores, so that distances differ from the reference's by rounding in float32 (about 1e-6),
    and of tokens that are closer together than that either may be chosen.

    Args:
        features: [n, C], or [G, n, C]: every group for itself. Zeros and rows that hold no finite numbers have cosine 0
            with everything.
        k: How many, at most n.
        xyz: [n, d] or [G, n, d] coordinates with d from 1 to 4. Distances that are not finite count as 0: tokens
            without coordinates come late.
        seed: The first token, as a number or [] or [G] int64 or int32 on the device; one outside counts as the nearest
            inside. None, for features alone: the token whose nearest neighbour is farthest.
        weight: Share of the coordinates where both are given, 0 to 1.

    Returns:
        [k] or [G, k] int64 indices in the order of choice.

    Raises:
        KernelInputError: Shapes that do not match, k above n, a seed that is missing or outside.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    given = features if features is not None else xyz
    if given is None:
        raise KernelInputError("give features, or xyz, or both: there is nothing to tell tokens apart by")
    if given.ndim not in (2, 3) or (xyz is not None and xyz.shape[:-1] != given.shape[:-1]):
        shapes = [None if tensor is None else list(tensor.shape) for tensor in (features, xyz)]
        raise KernelInputError(f"features and xyz must be [n, C] and [n, d], or [G, n, C] and [G, n, d]: got {shapes}")
    groups, n = (given.shape[0], given.shape[1]) if given.ndim == 3 else (1, given.shape[0])
    check_count(k, n)
    if xyz is not None and seed is None:
        raise KernelInputError("xyz needs a seed: the first token is chosen by features only where these are alone")
    if not 0 <= weight <= 1:
        raise KernelInputError(f"weight must lie in [0, 1], got {weight}")
    first = _seeds(seed, groups, n, given.device)
    if not k:
        return torch.empty(*given.shape[:-2], 0, dtype=torch.int64, device=given.device)
    if given.ndim == 2:
        features, xyz = (None if tensor is None else tensor[None] for tensor in (features, xyz))
    features, xyz = (None if tensor is None else tensor.detach() for tensor in (features, xyz))
    chosen: torch.Tensor = _operator(features, xyz, first, k, float(weight))
    return chosen[0] if given.ndim == 2 else chosen


def check_count(k: int, n: int) -> None:
    """Refuse to choose fewer than none or more than there are.

    Raises:
        KernelInputError: That was asked for.
    """
    if not 0 <= k <= n:
        raise KernelInputError(f"cannot choose {k} of {n} tokens")


def _seeds(seed: int | torch.Tensor | None, groups: int, n: int, device: torch.device) -> torch.Tensor | None:
    """[G] on the device."""
    if seed is None:
        return None
    if isinstance(seed, torch.Tensor):
        if seed.ndim > 1 or seed.numel() not in (1, groups):
            raise KernelInputError(f"seed must be one number or one per group ({groups}), got shape {list(seed.shape)}")
        return (seed.long() if seed.dtype == torch.int32 else seed).expand(groups)
    if n and not 0 <= seed < n:
        raise KernelInputError(f"seed must lie between 0 and {n - 1}, got {seed}")
    return torch.full((groups,), seed, dtype=torch.int64, device=device)
