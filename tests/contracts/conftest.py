"""Fresh tiny models of every family; every test must leave its model unpatched or say so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import tiny_models
import transformers

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=UserWarning, module="transformers")

# `generate` reads the next token off the last column, which right padding fills with padding.
RIGHT_PADDED = [name for name in tiny_models.SETUPS if name.endswith("right_padded")]
GENERATING = [name for name in tiny_models.SETUPS if name not in RIGHT_PADDED]


@pytest.fixture(params=list(tiny_models.SETUPS))
def tiny(request: pytest.FixtureRequest) -> Iterator[tiny_models.Tiny]:
    """Every set-up: one per family and kind of input."""
    yield tiny_models.build(request.param)


@pytest.fixture(params=GENERATING)
def generating(request: pytest.FixtureRequest) -> Iterator[tiny_models.Tiny]:
    """Every set-up that ``generate`` can run."""
    yield tiny_models.build(request.param)


@pytest.fixture
def llava() -> tiny_models.Tiny:
    """The plainest set-up, for contracts that do not depend on the family."""
    return tiny_models.build("llava")
