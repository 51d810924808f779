"""What every recorded result carries: where, when and with what it was measured."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "triton", "accelerate", "numpy", "pillow")


def environment(device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """Versions, device, threads, git hash and date of this run."""
    import torch

    from vlm_budget import __version__
    from vlm_budget.machine import processor_name

    found: dict[str, str] = {"vlm-budget": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    cuda = device.startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": git_hash(),
        "device": torch.cuda.get_device_name() if cuda else (processor_name() or platform.machine()),
        "device_type": "cuda" if cuda else device,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "versions": found,
    }


def git_hash() -> str | None:
    """Commit of the working tree, with ``+changes`` when it differs; None outside a checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Write a result, creating its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
