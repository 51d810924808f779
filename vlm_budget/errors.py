"""Every error a user can meet, in one place.

Each message says what was got, what was expected and what to do. All of them derive from :class:`VLMBudgetError`, and
from the builtin that fits, so that ``except ValueError`` keeps working for callers who do not know this library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class VLMBudgetError(Exception):
    """Base of all errors raised by vlm-budget."""


class BudgetError(VLMBudgetError, ValueError):
    """A budget that cannot be parsed, or cannot be met by the input at hand."""


class InfeasibleBudgetError(BudgetError):
    """A budget that the input at hand cannot meet.

    Attributes:
        reason: Why, without the advice.
        nearest: Budgets near it that can be met; any of them will do.
    """

    def __init__(self, reason: str, nearest: Sequence[Any] = ()) -> None:
        self.reason, self.nearest = reason, tuple(nearest)
        names = [_short(budget) for budget in self.nearest]
        words = f"{names[0]} (or {names[1]})" if len(names) > 1 else f"'{self.nearest[0]}'" if names else ""
        super().__init__(f"{reason} The nearest feasible budget is {words}." if names else reason)


def _short(budget: Any) -> str:
    """As a number where it is a share; ``1.0`` and not ``1``, which is one token."""
    number = f"{budget.amount:.4g}"
    return str(budget) if budget.unit != "ratio" else number if number != "1" else "1.0"


class LatencyError(BudgetError):
    """Milliseconds that cannot be predicted: nothing measured here, a damaged file, a prompt longer than measured."""


class PlanError(VLMBudgetError, ValueError):
    """A plan that is malformed, or does not fit the input it is applied to."""


class LayoutError(VLMBudgetError, ValueError):
    """Visual tokens and what the processor announced do not agree."""


class GeometryError(LayoutError):
    """Depth, poses or intrinsics that cannot be those of the prompt's pictures."""


class FrameScoreError(LayoutError):
    """Scores that cannot be those of the prompt's frames."""


class SelectionError(VLMBudgetError, RuntimeError):
    """A method returned something other than the tokens it promised."""


class PatchError(VLMBudgetError, RuntimeError):
    """A patch that cannot be applied, undone or used in this way."""


class VideoAttentionError(VLMBudgetError, ValueError):
    """A call of a video model's self-attention that cannot be computed sparsely: masks, shapes or values."""


class UnsupportedModelError(VLMBudgetError, TypeError):
    """No family knows this model class."""


class UnknownNameError(VLMBudgetError, LookupError):
    """A name that no registry holds."""


class ImageError(VLMBudgetError, ValueError):
    """An image file that cannot be used: missing, empty, truncated, or far too large."""


class VideoError(ImageError):
    """A video cannot be read."""


class OptionError(VLMBudgetError, ValueError):
    """An option, of a method or of the command line, whose value cannot be used."""


class ModelLoadError(VLMBudgetError, OSError):
    """A model that is not there, or cannot be loaded."""


class CalibrationError(VLMBudgetError, ValueError):
    """Calibration data that cannot be used: none, files that are missing, prompts that do not fit together."""


class JournalError(VLMBudgetError, ValueError):
    """A journal of another search, or one that cannot be read."""


class TaskError(VLMBudgetError, ValueError):
    """An evaluation task whose definition cannot be used."""


class DataError(VLMBudgetError, ValueError):
    """An evaluation dataset that is missing, or is not what its task says it is."""


class RunError(VLMBudgetError, RuntimeError):
    """An evaluation run that cannot be started, resumed or read: folder in use, another configuration, full disk."""


class KernelInputError(VLMBudgetError, ValueError):
    """Tensors or sizes that an operation of :mod:`vlm_budget.ops` cannot work on."""


class KernelUnavailableError(VLMBudgetError, RuntimeError):
    """A Triton kernel that was asked for by name and cannot run here."""


class MissingExtraError(VLMBudgetError, ImportError):
    """An optional library that is not installed; the message names the extra that brings it."""


class PlanMismatchWarning(UserWarning):
    """A recipe is used on prompts unlike those it was made on."""
