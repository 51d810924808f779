"""Whether something is a diffusion model, told without importing diffusers; and the way to what patches it."""

from __future__ import annotations

import importlib
from typing import Any

# A string, so that this floor imports nothing of the upper one.
_HOME = "vlm_budget.video.dit.handle"
_LIBRARY = "diffusers"


def is_diffusion(model: Any) -> bool:
    """The model is a pipeline or a model of diffusers, or a subclass of one; compiled or not."""
    inner = getattr(model, "_orig_mod", model)
    return any(cls.__module__.partition(".")[0] == _LIBRARY for cls in type(inner).__mro__)


def patch_diffusion(model: Any, *args: Any, **options: Any) -> Any:
    """:func:`vlm_budget.video.dit.handle.patch_video`, loaded when it is first needed."""
    return importlib.import_module(_HOME).patch_video(model, *args, **options)


def unpatch_diffusion(model: Any) -> None:
    """:func:`vlm_budget.video.dit.handle.unpatch_video`, loaded when it is first needed."""
    importlib.import_module(_HOME).unpatch_video(model)
