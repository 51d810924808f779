"""Errors that only the command line can meet."""

from __future__ import annotations

from ..errors import VLMBudgetError


class ModelLoadError(VLMBudgetError, OSError):
    """A model that is not there, or cannot be loaded."""


class OptionError(VLMBudgetError, ValueError):
    """A command line option whose value cannot be used."""
