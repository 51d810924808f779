"""The model's own autocast, for what a method calls back into: everything else of it runs :func:`exactly`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..precision import exactly as exactly

Rows = Callable[[torch.Tensor], torch.Tensor]


def as_the_model(call: Rows, device: torch.device) -> Rows:
    """``call`` under the autocast that is on now, wherever it is called from."""
    kind, enabled = device.type, torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(kind)

    def called(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            return call(rows)

    return called
