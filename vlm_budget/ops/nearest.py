"""The tokens whose keys are most similar, and the most similar anchor of every token, without the map of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import KernelInputError
from ..triton_kernels.nearest import (
    MOST_NEIGHBOURS,
    assign_reference,
    assign_triton,
    nearest_reference,
    nearest_triton,
)
from .dispatch import mode, operator, runs_kernel


@operator(
    "nearest",
    "(Tensor keys, Tensor anchors, int count, Tensor among, int[] sizes, int[] shares, bool exclude_self)"
    " -> (Tensor, Tensor)",
    floating=("keys",),
    whole=("anchors", "among"),
)
def _nearest(
    keys: torch.Tensor,
    anchors: torch.Tensor,
    count: int,
    among: torch.Tensor,
    sizes: list[int],
    shares: list[int],
    exclude_self: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    few = count <= MOST_NEIGHBOURS or mode() == "triton"
    run = nearest_triton if few and runs_kernel(keys) else nearest_reference
    return run(keys, anchors, count, among, sizes, shares, exclude_self)


@_nearest.register_fake
def _fake_nearest(
    keys: torch.Tensor,
    anchors: torch.Tensor,
    count: int,
    among: torch.Tensor,
    sizes: list[int],
    shares: list[int],
    exclude_self: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (anchors.shape[0], count)
    return anchors.new_empty(shape), keys.new_empty(shape, dtype=torch.float32)


@operator(
    "assign",
    "(Tensor keys, Tensor anchors, Tensor among, int[] sizes, int[] shares) -> Tensor",
    floating=("keys",),
    whole=("anchors", "among"),
)
def _assign(
    keys: torch.Tensor, anchors: torch.Tensor, among: torch.Tensor, sizes: list[int], shares: list[int]
) -> torch.Tensor:
    run = assign_triton if runs_kernel(keys) else assign_reference
    return run(keys, anchors, among, sizes, shares)


@_assign.register_fake
def _fake_assign(
    keys: torch.Tensor, anchors: torch.Tensor, among: torch.Tensor, sizes: list[int], shares: list[int]
) -> torch.Tensor:
    return torch.empty_like(among)


def nearest(
    keys: torch.Tensor,
    anchors: torch.Tensor,
    count: int,
    *,
    among: torch.Tensor | None = None,
    sizes: Sequence[int] | None = None,
    shares: Sequence[int] | None = None,
    exclude_self: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar tokens of every anchor, by the cosine of keys. Nothing of it is differentiated.

    Args:
        keys: [n, C].
        anchors: [m] int64 rows of ``keys``.
        count: Tokens per anchor.
        among: [N] int64 distinct rows of ``keys`` that may be taken; all by default.
        sizes: Tokens of every group, summing to N: an anchor takes from its own group only. ``among`` lists them group
            by group, and so do the ``anchors``.
        shares: Anchors of every group, summing to m.
        exclude_self: An anchor does not take itself.

    Returns:
        [m, count] int64 rows of ``keys``, most similar first, ties to the one listed earlier, and [m, count] float32
        cosines. Where there are fewer, -1 and ``-inf``. A key that is not a number is near to none.

    Raises:
        KernelInputError: Groups that do not add up, or a negative count.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    if count < 0:
        raise KernelInputError(f"count must be at least 0, got {count}")
    given = _grouped(keys, anchors, among, sizes, shares)
    found: tuple[torch.Tensor, torch.Tensor] = _nearest(keys.detach(), anchors, count, *given, exclude_self)
    return found


def assign(
    keys: torch.Tensor,
    anchors: torch.Tensor,
    *,
    among: torch.Tensor | None = None,
    sizes: Sequence[int] | None = None,
    shares: Sequence[int] | None = None,
) -> torch.Tensor:
    """The most similar anchor of every token, by the cosine of keys. Nothing of it is differentiated.

    Args:
        keys: [n, C].
        anchors: [m] int64 distinct rows of ``keys``.
        among: [N] int64 distinct rows of ``keys`` to assign; all by default.
        sizes: Tokens of every group, as in :func:`nearest`.
        shares: Anchors of every group.

    Returns:
        [N] int64 places in ``anchors``, ties to the earlier; an anchor is its own. -1 in a group without anchors; a key
        that is not a number goes to the first.

    Raises:
        KernelInputError: Groups that do not add up.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    owner: torch.Tensor = _assign(keys.detach(), anchors, *_grouped(keys, anchors, among, sizes, shares))
    return owner


def _grouped(
    keys: torch.Tensor,
    anchors: torch.Tensor,
    among: torch.Tensor | None,
    sizes: Sequence[int] | None,
    shares: Sequence[int] | None,
) -> tuple[torch.Tensor, list[int], list[int]]:
    if keys.ndim != 2 or anchors.ndim != 1:
        raise KernelInputError(f"keys must be [n, C] and anchors [m], got {list(keys.shape)} and {list(anchors.shape)}")
    if (sizes is None) != (shares is None):
        raise KernelInputError("sizes= and shares= come together: tokens and anchors of every group")
    among = torch.arange(len(keys), device=keys.device) if among is None else among
    groups = ([len(among)], [len(anchors)]) if sizes is None or shares is None else (list(sizes), list(shares))
    for name, counts, whole in (("sizes", groups[0], len(among)), ("shares", groups[1], len(anchors))):
        if sum(counts) != whole or any(count < 0 for count in counts):
            raise KernelInputError(f"{name} must be at least 0 and sum to {whole}, got {counts}")
    if len(groups[0]) != len(groups[1]):
        raise KernelInputError(f"sizes and shares must name the same groups, got {len(groups[0])}, {len(groups[1])}")
    return among, *groups
