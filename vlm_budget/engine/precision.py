"""Scores are computed and tokens chosen in float32, whatever ``torch.autocast`` the model runs under.

Autocast would take every matrix product of a method back to half precision, where close candidates tie, and a choice
would depend on rounding. A method that calls back into the model (its projector) finds the model's own autocast again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Rows = Callable[[torch.Tensor], torch.Tensor]


def exactly(device: torch.device) -> torch.autocast:
    """A context without autocast on a device."""
    return torch.autocast(device.type, enabled=False)


def as_the_model(call: Rows, device: torch.device) -> Rows:
    """``call`` under the autocast that is on now, wherever it is called from."""
    kind, enabled = device.type, torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(kind)

    def called(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            return call(rows)

    return called
