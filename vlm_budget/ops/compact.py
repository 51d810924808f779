"""Compaction of ragged keeps into a padded batch, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from ..errors import KernelInputError
from ..triton_kernels.compact import (
    Index,
    compact_reference,
    compact_triton,
    compaction_index_reference,
    compaction_index_triton,
    require_slots,
    take_columns_reference,
    take_columns_triton,
    visual_rows_reference,
)
from .dispatch import operator, runs_kernel


class Compacted(NamedTuple):
    """What :func:`compact` gives back.

    Attributes:
        embeds: [B, K, D]; a padding slot holds what its column held.
        positions: [..., B, K], 0 in padding slots; None if none were given.
        visual: [B, K] bool, False in padding slots; None if none were given.
        deepstack: Per level, [M, D], the rows of the visual columns that are kept.
    """

    embeds: torch.Tensor
    positions: torch.Tensor | None
    visual: torch.Tensor | None
    deepstack: list[torch.Tensor]


# --- where columns go ------------------------------------------------------------------------------------------------


@operator("compaction_index", "(Tensor keep, SymInt slots, bool right_padded) -> (Tensor, Tensor, Tensor)")
def _index(keep: torch.Tensor, slots: int, right_padded: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    run = compaction_index_triton if runs_kernel(keep) else compaction_index_reference
    return run(keep, slots, right_padded)


@_index.register_fake
def _(keep: torch.Tensor, slots: int, right_padded: bool) -> Index:
    whole, shape = torch.int64, (len(keep), slots)
    return keep.new_empty(shape, dtype=whole), keep.new_empty(shape), keep.new_empty(keep.shape, dtype=whole)


def compaction_index(keep: torch.Tensor, slots: int, right_padded: bool) -> Index:
    """Where columns go when each row of a batch keeps some, and where they come back from.

    Args:
        keep: [B, L] bool, columns that survive.
        slots: K, at least the largest number of survivors in any row.
        right_padded: Rows of fewer survivors are padded on the right, else on the left.

    Returns:
        [B, K] int64, the column of every slot: survivors in order, columns that do not survive in padding slots;
        [B, K] bool, slots that hold a survivor; [B, L] int64, the slot that every column is grown from: its own, else
        that of the last survivor before it, else that of the first.

    Raises:
        KernelInputError: More slots than columns, or flags that are not [B, L] bool.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    if keep.ndim != 2 or keep.dtype != torch.bool:
        raise KernelInputError(f"keep must be [B, L] bool, got {list(keep.shape)} {keep.dtype}")
    require_slots(slots, keep.shape[1])
    found: Index = _index(_rows(keep), slots, right_padded)
    return found


# --- one tensor ------------------------------------------------------------------------------------------------------


@operator("take_columns", "(Tensor values, Tensor index) -> Tensor", whole=("index",))
def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    run = take_columns_triton if runs_kernel(values) else take_columns_reference
    return run(values, index)


@_take.register_fake
def _(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.new_empty(*index.shape, values.shape[-1])


def _remember_index(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, index = inputs
    ctx.length = values.shape[1]
    ctx.save_for_backward(index)


def _put_back(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    (index,) = ctx.saved_tensors
    return _scattered(gradient, index, ctx.length), None


def _scattered(gradient: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
    """[B, L, D], the gradients of slots summed up where their columns are."""
    whole = gradient.new_zeros(len(gradient), length, gradient.shape[-1])
    return whole.scatter_add(1, index[..., None].expand(-1, -1, gradient.shape[-1]), gradient)


_take.register_autograd(_put_back, setup_context=_remember_index)


def take_columns(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather columns, in either direction: by the column of every slot, or by the slot of every column.

    Args:
        values: [B, L, ...] of any element type of 1, 2, 4 or 8 bytes. Gradients flow through.
        index: [B, K] int64 on the same device, each from 0 to L - 1, which a CUDA device does not check.

    Returns:
        [B, K, ...].

    Raises:
        KernelInputError: Shapes that do not match; element types or sizes that the kernel cannot work on.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    if values.ndim < 2 or index.ndim != 2 or len(index) != len(values):
        raise KernelInputError(
            f"index must be [B, K] for values [B, L, ...]: {list(index.shape)}, {list(values.shape)}"
        )
    trailing = values.shape[2:]
    flat = _rows(values.reshape(*values.shape[:2], prod(trailing)))
    taken: torch.Tensor = _take(flat, index)
    return taken.reshape(*index.shape, *trailing)


# --- a call's tensors at once ----------------------------------------------------------------------------------------


@operator(
    "compact",
    "(Tensor embeds, Tensor index, Tensor valid, Tensor keep, Tensor? positions, Tensor? visual, "
    "Tensor[] deepstack, SymInt rows) -> Tensor[]",
    whole=("index",),
)
def _compact(
    embeds: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor,
    keep: torch.Tensor,
    positions: torch.Tensor | None,
    visual: torch.Tensor | None,
    deepstack: Sequence[torch.Tensor],
    rows: int,
) -> list[torch.Tensor]:
    run = compact_triton if runs_kernel(embeds, *deepstack) else compact_reference
    return run(embeds, index, valid, keep, positions, visual, deepstack, rows)


@_compact.register_fake
def _(
    embeds: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor,
    keep: torch.Tensor,
    positions: torch.Tensor | None,
    visual: torch.Tensor | None,
    deepstack: Sequence[torch.Tensor],
    rows: int,
) -> list[torch.Tensor]:
    taken = [embeds.new_empty(*index.shape, embeds.shape[-1])]
    if positions is not None:
        taken.append(positions.new_empty(len(positions), *index.shape))
    if visual is not None:
        taken.append(visual.new_empty(index.shape))
    return taken + [level.new_empty(rows, level.shape[-1]) for level in deepstack]


def _remember_call(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    embeds, index, _, keep, _, visual, deepstack, rows = inputs
    ctx.length, ctx.rows, ctx.levels = embeds.shape[1], rows, [len(level) for level in deepstack]
    ctx.save_for_backward(index, keep, visual)


def _put_call_back(ctx: Any, gradients: list[torch.Tensor]) -> tuple[Any, ...]:
    index, keep, visual = ctx.saved_tensors
    levels: list[torch.Tensor] = []
    if ctx.levels:
        source = visual_rows_reference(visual, keep, ctx.rows)
        for length, gradient in zip(ctx.levels, gradients[-len(ctx.levels) :], strict=True):
            whole = gradient.new_zeros(length, gradient.shape[-1])
            levels.append(whole.index_add(0, source, gradient))
    return _scattered(gradients[0], index, ctx.length), None, None, None, None, None, levels, None


_compact.register_autograd(_put_call_back, setup_context=_remember_call)


def compact(
    embeds: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor,
    keep: torch.Tensor,
    positions: torch.Tensor | None = None,
    visual: torch.Tensor | None = None,
    deepstack: Sequence[torch.Tensor] = (),
    rows: int = 0,
) -> Compacted:
    """Gather all that a language model is given per column, in one launch.

    Args:
        embeds: [B, L, D]. Gradients flow through these and through ``deepstack``.
        index: [B, K] int64, the column of every slot, as from :func:`compaction_index`.
        valid: [B, K] bool, slots that hold a survivor.
        keep: [B, L] bool, columns that survive.
        positions: [..., B, L] whole numbers, M-RoPE's with an axis in front.
        visual: [B, L] bool, visual columns.
        deepstack: Per level, [N, D], one row per visual column of the batch; needs ``visual``.
        rows: M, how many visual columns survive in the whole batch. The device is not asked.

    Raises:
        KernelInputError: Shapes that do not match, a wrong number of rows as far as the host knows it; element types or
            sizes that the kernel cannot work on.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    axes = None if positions is None else _rows(positions.reshape(-1, *positions.shape[-2:]))
    flags = None if visual is None else _rows(visual)
    levels = [_rows(level) for level in deepstack]
    taken = _compact(_rows(embeds), index, valid, keep, axes, flags, levels, rows if levels else 0)
    rest = iter(taken[1:])
    places = None if positions is None else next(rest).reshape(*positions.shape[:-1], index.shape[1])
    return Compacted(taken[0], places, None if visual is None else next(rest), list(rest))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Kernels read rows as they lie: what is strided along them is copied first."""
    return tensor if tensor.ndim == 0 or tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()
