"""vlm-budget: make vision-language models spend tokens on purpose.

>>> import vlm_budget
>>> handle = vlm_budget.patch(model, "hired", budget=0.2)  # doctest: +SKIP

Importing this package is cheap: torch, transformers and the methods load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Budget": "budget",
    "BudgetError": "errors",
    "CalibrationError": "errors",
    "DataError": "errors",
    "Fit": "geometry",
    "FrameScoreError": "errors",
    "Front": "search.front",
    "GeometryError": "errors",
    "ImageError": "errors",
    "InfeasibleBudgetError": "errors",
    "JournalError": "errors",
    "Latency": "latency",
    "KernelInputError": "errors",
    "KernelUnavailableError": "errors",
    "LatencyError": "errors",
    "LayoutError": "errors",
    "MissingExtraError": "errors",
    "ModelLoadError": "errors",
    "OptionError": "errors",
    "PatchError": "errors",
    "PatchHandle": "patching",
    "Plan": "plan",
    "PlanError": "errors",
    "PlanMismatchWarning": "errors",
    "Pruner": "pruner",
    "Recipe": "recipe",
    "Report": "report",
    "RunError": "errors",
    "Selection": "pruner",
    "SelectionError": "errors",
    "TaskError": "errors",
    "UnknownNameError": "errors",
    "UnsupportedModelError": "errors",
    "VLMBudgetError": "errors",
    "VideoAttentionError": "errors",
    "VideoError": "errors",
    "VisualLayout": "layout",
    "autotune": "search.autotune",
    "calibrate": "calibration",
    "gsearch": "search.gsearch",
    "list_families": "registry",
    "list_methods": "registry",
    "list_video_methods": "registry",
    "list_video_models": "registry",
    "patch": "patching",
    "psigmoid": "search.psigmoid",
    "token_coordinates": "geometry",
    "unpatch": "patching",
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604 - the names are the table above

if TYPE_CHECKING:
    from .budget import Budget as Budget
    from .calibration import calibrate as calibrate
    from .errors import BudgetError as BudgetError
    from .errors import CalibrationError as CalibrationError
    from .errors import DataError as DataError
    from .errors import FrameScoreError as FrameScoreError
    from .errors import GeometryError as GeometryError
    from .errors import ImageError as ImageError
    from .errors import InfeasibleBudgetError as InfeasibleBudgetError
    from .errors import JournalError as JournalError
    from .errors import KernelInputError as KernelInputError
    from .errors import KernelUnavailableError as KernelUnavailableError
    from .errors import LatencyError as LatencyError
    from .errors import LayoutError as LayoutError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import ModelLoadError as ModelLoadError
    from .errors import OptionError as OptionError
    from .errors import PatchError as PatchError
    from .errors import PlanError as PlanError
    from .errors import PlanMismatchWarning as PlanMismatchWarning
    from .errors import RunError as RunError
    from .errors import SelectionError as SelectionError
    from .errors import TaskError as TaskError
    from .errors import UnknownNameError as UnknownNameError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .errors import VideoAttentionError as VideoAttentionError
    from .errors import VideoError as VideoError
    from .errors import VLMBudgetError as VLMBudgetError
    from .geometry import Fit as Fit
    from .geometry import token_coordinates as token_coordinates
    from .latency import Latency as Latency
    from .layout import VisualLayout as VisualLayout
    from .patching import PatchHandle as PatchHandle
    from .patching import patch as patch
    from .patching import unpatch as unpatch
    from .plan import Plan as Plan
    from .pruner import Pruner as Pruner
    from .pruner import Selection as Selection
    from .recipe import Recipe as Recipe
    from .registry import list_families as list_families
    from .registry import list_methods as list_methods
    from .registry import list_video_methods as list_video_methods
    from .registry import list_video_models as list_video_models
    from .report import Report as Report
    from .search.autotune import autotune as autotune
    from .search.front import Front as Front
    from .search.gsearch import gsearch as gsearch
    from .search.psigmoid import psigmoid as psigmoid


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
