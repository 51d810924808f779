"""Errors: one base to catch, and the builtin that callers who do not know us would catch."""

import inspect
import pickle

import pytest

import vlm_budget
from vlm_budget import errors

BUILTINS = {
    "BudgetError": ValueError,
    "InfeasibleBudgetError": ValueError,
    "LatencyError": ValueError,
    "PlanError": ValueError,
    "LayoutError": ValueError,
    "GeometryError": ValueError,
    "FrameScoreError": ValueError,
    "ImageError": ValueError,
    "VideoAttentionError": ValueError,
    "VideoError": ValueError,
    "OptionError": ValueError,
    "ModelLoadError": OSError,
    "SelectionError": RuntimeError,
    "PatchError": RuntimeError,
    "UnsupportedModelError": TypeError,
    "UnknownNameError": LookupError,
    "CalibrationError": ValueError,
    "JournalError": ValueError,
    "TaskError": ValueError,
    "DataError": ValueError,
    "RunError": RuntimeError,
    "KernelInputError": ValueError,
    "KernelUnavailableError": RuntimeError,
    "MissingExtraError": ImportError,
}


def test_the_table_above_is_complete() -> None:
    kinds = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    defined = {name for name, kind in kinds.items() if not issubclass(kind, Warning)}
    assert defined == {"VLMBudgetError", *BUILTINS}


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_every_error_is_ours_and_the_builtin_that_fits(name: str, builtin: type[Exception]) -> None:
    error = getattr(vlm_budget, name)
    assert error is getattr(errors, name)
    with pytest.raises(errors.VLMBudgetError, match="what happened"):
        raise error("what happened")
    with pytest.raises(builtin, match="what happened"):
        raise error("what happened")


@pytest.mark.parametrize("name", BUILTINS)
def test_errors_cross_process_borders(name: str) -> None:
    error = pickle.loads(pickle.dumps(getattr(errors, name)("what happened")))
    assert type(error).__name__ == name and str(error) == "what happened"


def test_the_base_is_no_builtin_so_that_it_catches_ours_alone() -> None:
    assert errors.VLMBudgetError.__bases__ == (Exception,)
