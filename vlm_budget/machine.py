"""Names of what a measurement ran on, and the folder that measurements are kept in."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def processor_name() -> str | None:
    """The CPU's model name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def device_name(device: torch.device) -> str:
    """What stands behind a torch device: the GPU's or the CPU's name."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {processor_name() or platform.processor() or platform.machine()}"


def cache_folder() -> Path:
    """Where measurements of this machine are kept between processes.

    ``$VLM_BUDGET_CACHE``, else ``vlm-budget`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``. Not created here.
    """
    own = os.environ.get("VLM_BUDGET_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "vlm-budget"
