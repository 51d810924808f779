"""Which of an operation's two halves runs: the torch reference or the Triton kernel.

``VLM_BUDGET_KERNELS`` says it: ``auto`` (the default) runs kernels on CUDA devices that can, for the element types that
they read, and references elsewhere; ``reference`` and ``triton`` name one, and what is named and cannot run raises.
Kernels run on the CPU only under ``TRITON_INTERPRET=1``, which is for tests. Autocast has no say in either half.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from inspect import signature
from typing import Any, Literal, get_args

import torch

from ..errors import OptionError
from ..precision import exactly
from ..triton_kernels._launch import require_dtype, require_same_device, tl

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


def operator(
    name: str, schema: str | None = None, *, floating: Sequence[str] = (), whole: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the custom operator ``vlm_budget::name``, which runs without autocast.

    Before either half runs, tensors on several devices and element types of another kind are refused
    (:class:`~vlm_budget.errors.KernelInputError`), so that both halves take the same.

    Args:
        name: Without the namespace.
        schema: Types of arguments and results where the function's annotations do not say them.
        floating: Tensors of floating point.
        whole: Tensors of int64.
    """

    def register(run: Callable[..., Any]) -> Any:
        names = tuple(signature(run).parameters)

        @wraps(run)
        def undisturbed(*args: Any) -> Any:
            given = {name: arg for name, arg in zip(names, args, strict=False) if isinstance(arg, torch.Tensor)}
            require_same_device(**given)
            require_dtype((*READABLE, torch.float64), **{name: given[name] for name in floating if name in given})
            require_dtype((torch.int64,), **{name: given[name] for name in whole if name in given})
            with exactly(next(iter(given.values())).device):
                return run(*args)

        return torch.library.custom_op(f"vlm_budget::{name}", undisturbed, mutates_args=(), schema=schema)

    return register


def runs_kernel(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernel is to run on these tensors; left to choose, not where there are none.

    Args:
        tensors: The operation's inputs of floating point; their device and element types count.
    """
    which = mode()
    if which != "auto":
        return which == "triton"
    given = [tensor for tensor in tensors if tensor is not None]
    return bool(given) and all(
        tensor.is_cuda and _able(tensor.device.index) and (tensor.dtype in READABLE or not tensor.is_floating_point())
        for tensor in given
    )


@lru_cache
def _able(index: int | None) -> bool:
    """The device is an NVIDIA one of compute capability 8.0 or later, and Triton can be imported."""
    return tl is not None and torch.version.cuda is not None and torch.cuda.get_device_capability(index)[0] >= 8
