"""Scores are computed and tokens chosen in float32, whatever ``torch.autocast`` the model runs under.

Autocast would take every matrix product of a method back to half precision, where close candidates tie, and a choice
would depend on rounding.
"""

from __future__ import annotations

import torch


def exactly(device: torch.device) -> torch.autocast:
    """A context without autocast on a device."""
    return torch.autocast(device.type, enabled=False)
