"""Kernels run in Triton's interpreter, into memory that is poisoned: an output that is not written is not a number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlm_budget import ops


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "meta" or tensor.numel() > 2**24:
            return tensor  # no memory, or more than a test may touch
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)

    return made


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def kernels() -> Any:
    """Operations run their kernels, in the interpreter."""
    with ops.use("triton"):
        yield
