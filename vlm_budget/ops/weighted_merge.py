"""Mixtures of tokens, without the matrix of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import KernelInputError
from ..precision import exactly
from ..transfer import moved
from ..triton_kernels.weighted_merge import (
    assigned_merge_reference,
    assigned_merge_triton,
    softmax_merge_reference,
    softmax_merge_triton,
    weighted_merge_reference,
    weighted_merge_triton,
)
from .dispatch import operator, runs_kernel


@operator("weighted_merge", floating=("values", "weights"), whole=("index",))
def _weighted(values: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    run = weighted_merge_triton if runs_kernel(values) else weighted_merge_reference
    return run(values, index, weights)


@_weighted.register_fake
def _fake_weighted(values: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.new_empty(index.shape[0], values.shape[1])


@operator("assigned_merge", floating=("values", "weights"), whole=("owner", "among"))
def _assigned(
    values: torch.Tensor, weights: torch.Tensor, owner: torch.Tensor, count: int, among: torch.Tensor
) -> torch.Tensor:
    run = assigned_merge_triton if runs_kernel(values) else assigned_merge_reference
    return run(values, owner, weights, count, among)


@_assigned.register_fake
def _fake_assigned(
    values: torch.Tensor, weights: torch.Tensor, owner: torch.Tensor, count: int, among: torch.Tensor
) -> torch.Tensor:
    return values.new_empty(count, values.shape[1])


@operator("softmax_merge", floating=("values", "keys"), whole=("anchors", "among"))
def _softmax(
    values: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    temperature: float,
    among: torch.Tensor,
    self_weight: float,
) -> torch.Tensor:
    run = softmax_merge_triton if runs_kernel(values, keys) else softmax_merge_reference
    return run(values, keys, anchors, temperature, among, self_weight)


@_softmax.register_fake
def _fake_softmax(
    values: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    temperature: float,
    among: torch.Tensor,
    self_weight: float,
) -> torch.Tensor:
    return values.new_empty(anchors.shape[0], values.shape[1])


def weighted_merge(values: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of listed tokens.

    Args:
        values: [n, D].
        index: [m, t] int64 rows of ``values``; -1 for nothing.
        weights: [m, t] float32.

    Returns:
        [m, D] in the dtype and on the device of ``values``, accumulated in float32; zeros where nothing is listed.

    Raises:
        KernelInputError: Shapes that do not match.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    if values.ndim != 2 or index.ndim != 2 or index.shape != weights.shape:
        raise KernelInputError(
            "values must be [n, D], index and weights [m, t], got "
            f"{list(values.shape)}, {list(index.shape)}, {list(weights.shape)}"
        )
    merged: torch.Tensor = _weighted(values, moved(weights, values.device), moved(index, values.device))
    return merged


def assigned_merge(
    values: torch.Tensor,
    owner: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    *,
    among: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sums of the tokens that belong to each owner, always added in the same order.

    Args:
        values: [n, D].
        owner: [N] int64 below ``count``; -1 for none.
        weights: [N] float32.
        count: Owners.
        among: [N] int64 rows of ``values`` that the owners and weights are of; all by default.

    Returns:
        [count, D] in the dtype and on the device of ``values``, accumulated in float32; zeros for one without tokens.

    Raises:
        KernelInputError: Shapes that do not match.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    rows = torch.arange(len(values), device=values.device) if among is None else moved(among, values.device)
    if values.ndim != 2 or not rows.shape == owner.shape == weights.shape:
        raise KernelInputError(
            "values must be [n, D], owner and weights one number per token of among, got "
            f"{list(values.shape)}, {list(owner.shape)}, {list(weights.shape)}, {list(rows.shape)}"
        )
    if count < 0:
        raise KernelInputError(f"count must be at least 0, got {count}")
    merged: torch.Tensor = _assigned(values, moved(weights, values.device), moved(owner, values.device), count, rows)
    return merged


def softmax_merge(
    values: torch.Tensor,
    keys: torch.Tensor,
    anchors: torch.Tensor,
    temperature: float,
    *,
    among: torch.Tensor | None = None,
    self_weight: float = 0.0,
) -> torch.Tensor:
    """Every anchor as the mixture of all tokens: softmax over the cosines of keys. Keys are not differentiated.

    Args:
        values: [n, D].
        keys: [n, C].
        anchors: [m] int64 rows of both.
        temperature: Above 0, of the softmax.
        among: [N] int64 distinct rows to mix, the anchors among them; all by default.
        self_weight: w in [0, 1]: the result is ``(1 - w) * softmax @ values + w * values[anchors]``.

    Returns:
        [m, D] in the dtype and on the device of ``values``. The kernel rounds the softmax to that dtype.

    Raises:
        KernelInputError: Shapes that do not match, or a temperature that is not above 0.
        KernelUnavailableError: The kernel was asked for by name and cannot run.
    """
    if values.ndim != 2 or keys.ndim != 2 or len(values) != len(keys) or anchors.ndim != 1:
        raise KernelInputError(
            "values must be [n, D], keys [n, C] and anchors [m], got "
            f"{list(values.shape)}, {list(keys.shape)}, {list(anchors.shape)}"
        )
    if not temperature > 0:
        raise KernelInputError(f"temperature must be above 0, got {temperature}")
    rows = torch.arange(len(values), device=values.device) if among is None else moved(among, values.device)
    if len(anchors) and not len(rows):
        raise KernelInputError("there are no tokens to mix: among is empty")
    keys, anchors = moved(keys.detach(), values.device), moved(anchors, values.device)
    mixed: torch.Tensor = _softmax(values, keys, anchors, float(temperature), rows, float(self_weight))
    return mixed


def _differentiable(operator: Any, tensors: int, reference: Callable[..., torch.Tensor]) -> None:
    """Give an operator, whose first arguments are ``tensors`` that may want gradients, those of its reference."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        kept = [value for value in inputs if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*kept)
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]

    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).detach() if value is None else value for value in ctx.others]
        wanted = [place for place in range(tensors) if ctx.needs_input_grad[place]]
        with torch.enable_grad(), exactly(gradient.device):
            for place in wanted:
                inputs[place].requires_grad_()
            found = torch.autograd.grad(reference(*inputs), [inputs[place] for place in wanted], gradient)
        by_place = dict(zip(wanted, found, strict=True))
        return tuple(by_place.get(place) for place in range(len(inputs)))

    operator.register_autograd(backward, setup_context=keep)


_differentiable(_weighted, 2, lambda values, weights, index: weighted_merge_reference(values, index, weights))
_differentiable(
    _assigned,
    2,
    lambda values, weights, owner, count, among: assigned_merge_reference(values, owner, weights, count, among),
)
_differentiable(_softmax, 1, softmax_merge_reference)
