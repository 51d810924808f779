"""Which of an operation's two halves runs: the torch reference or the Triton kernel.

``VLM_BUDGET_KERNELS`` says it: ``auto`` (the default) runs kernels on CUDA devices that can, for the element types that
they read, and references elsewhere; ``reference`` and ``triton`` name one, and what is named and cannot run raises.
Kernels run on the CPU only under ``TRITON_INTERPRET=1``, which is for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from ..errors import OptionError

Mode = Literal["auto", "reference", "triton"]
VARIABLE = "VLM_BUDGET_KERNELS"
READABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that kernels read."""

_chosen: ContextVar[Mode | None] = ContextVar("vlm_budget_kernels", default=None)


def mode() -> Mode:
    """The mode in force: that of :func:`use`, else that of ``VLM_BUDGET_KERNELS``.

    Raises:
        OptionError: The variable holds something else.
    """
    return _chosen.get() or _checked(os.environ.get(VARIABLE, "auto"))


@contextmanager
def use(which: Mode) -> Iterator[None]:
    """Choose references or kernels for this thread while the context lasts.

    Raises:
        OptionError: ``which`` is no mode.
    """
    token = _chosen.set(_checked(which))
    try:
        yield
    finally:
        _chosen.reset(token)


def _checked(name: str) -> Mode:
    for known in get_args(Mode):
        if name == known:
            return known
    raise OptionError(f"{VARIABLE} must be one of {', '.join(get_args(Mode))}, got {name!r}")


def runs_kernel(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernel is to run on these tensors.

    Args:
        tensors: The operation's inputs of floating point; their device and element types count.
    """
    which = mode()
    if which != "auto":
        return which == "triton"
    given = [tensor for tensor in tensors if tensor is not None]
    return all(tensor.is_cuda and _able(tensor.device.index) for tensor in given) and all(
        tensor.dtype in READABLE for tensor in given if tensor.is_floating_point()
    )


@lru_cache
def _able(index: int | None) -> bool:
    """The device is an NVIDIA one of compute capability 8.0 or later, and Triton is installed."""
    return (
        torch.version.cuda is not None
        and torch.cuda.get_device_capability(index)[0] >= 8
        and find_spec("triton") is not None
    )
