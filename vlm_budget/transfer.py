"""Copies of tensors to other devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on ``device``. The host waits for the copy, unless it goes to a CUDA device.

    There, what the host does with its memory next cannot reach the copy, and the device's work comes in order. A copy
    to the host would be read before it is complete, and MPS reads the host's memory late, when a temporary is gone.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def counts_on(device: torch.device, numbers: Sequence[int]) -> torch.Tensor:
    """[n] int32 on ``device``, numbers that the host knows."""
    return moved(torch.tensor(numbers, dtype=torch.int32, device="cpu"), device)
