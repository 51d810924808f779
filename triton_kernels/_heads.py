"""Tokens of every head, [B, H, N, D], and whole numbers per token or block that samples or heads may share."""

from __future__ import annotations

import torch

from vlm_budget.errors import KernelInputError, KernelUnavailableError

from ._launch import require_dtype, require_int32, require_rows, require_same_device, require_shape, tl

WIDEST = 1024
"""Channels of a head that a program takes at once."""
MOST_GROUPS = 2**16 - 1
"""Samples times heads: a launch has no more programs along its second axis."""


def lying(tensor: torch.Tensor) -> torch.Tensor:
    """Kernels read rows as they lie: what is strided along them is copied first."""
    return tensor if tensor.ndim == 0 or tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def require_tokens(**tensors: torch.Tensor) -> None:
    """Refuse what is not [B, H, N, D].

    Raises:
        KernelInputError: Some tensor has another number of dimensions.
    """
    for name, tensor in tensors.items():
        require_shape((None,) * 4, **{name: tensor})


def require_shared(batch: int, heads: int, length: int | None, **tensors: torch.Tensor) -> None:
    """Refuse what is not int32 [B or 1, H or 1, length]; None stands for any length.

    Raises:
        KernelInputError: Some tensor has another shape or element type.
    """
    for name, tensor in tensors.items():
        require_dtype((torch.int32,), **{name: tensor})
        fits = tensor.ndim == 3 and tensor.shape[0] in (1, batch) and tensor.shape[1] in (1, heads)
        if not fits or length not in (None, tensor.shape[2]):
            last = "any" if length is None else length
            raise KernelInputError(
                f"{name} must have shape [{batch} or 1, {heads} or 1, {last}], got {list(tensor.shape)}"
            )


def require_launchable(tokens: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Refuse what a launch per tile, and per sample and head, cannot take.

    Raises:
        KernelInputError: Sizes, strides or devices.
    """
    batch, heads, length, width = tokens.shape
    require_same_device(tokens=tokens, **others)
    require_rows(tokens=tokens, **others)
    require_int32(tokens=length + 4096, row_stride=tokens.stride(2))
    if batch * heads > MOST_GROUPS:
        raise KernelInputError(f"the kernel takes up to {MOST_GROUPS} samples times heads, got {batch} times {heads}")
    if width > WIDEST:
        raise KernelInputError(f"the kernel takes heads of up to {WIDEST} channels, got {width}")


def group_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Elements from one sample to the next, and from one head to the next; 0 where there is one for all."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1) if tensor.shape[1] > 1 else 0


def require_descriptors(**tensors: torch.Tensor) -> None:
    """Refuse what the tensor memory accelerator cannot read.

    Raises:
        KernelUnavailableError: This Triton has no tensor descriptors.
        KernelInputError: Addresses or strides are no multiples of 16 bytes.
    """
    if not hasattr(tl, "make_tensor_descriptor"):
        raise KernelUnavailableError("backend='tma' needs a Triton with tensor descriptors, 3.4 or later")
    for name, one in tensors.items():
        places = [one.data_ptr(), *(stride * one.element_size() for stride in one.stride()[:3])]
        if any(place % 16 for place in places):
            raise KernelInputError(f"backend='tma' reads rows of {name} at multiples of 16 bytes; call .contiguous()")
