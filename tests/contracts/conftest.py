"""Fresh tiny models of every family, and what the reference expects of them under the method used for all modes."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from functools import cache

import pytest
import transformers

import tiny_models
import vlm_budget
from tiny_models import Tiny
from vlm_budget.registry import PRUNERS

from .patched import Prefill, compacted, forward
from .reference import Row, greedy, rows

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=UserWarning, module="transformers")

# `generate` reads the next token off the last column, which right padding fills with padding.
GENERATING = [name for name in tiny_models.SETUPS if not name.endswith("right_padded")]
METHOD, BUDGET = "hired", 0.4
TOKENS = 6
# Methods that act before the language model; those inside have contracts of their own (``test_layers``).
VISION = [name for name in vlm_budget.list_methods() if PRUNERS.get(name).stage == "vision"]
# Every set-up with the method used for all modes, and every other method on the plainest set-up.
EACH_ONCE = [(name, METHOD) for name in GENERATING] + [("llava", method) for method in VISION if method != METHOD]


@dataclass(frozen=True)
class Case:
    """A set-up with what the reference expects of it at ``METHOD`` and ``BUDGET``.

    Attributes:
        tiny: A fresh model of its own, not patched.
        full: The unpruned prompts.
        prefill: A forward of the patched model.
        compact: The prompts as the reference compacts them, in the model's default position mode.
        unpruned: Tokens per prompt without pruning.
        pruned: Tokens per prompt with pruning.
    """

    tiny: Tiny
    full: list[Row]
    prefill: Prefill
    compact: list[Row]
    unpruned: list[list[int]]
    pruned: list[list[int]]

    def patch(self, **options: object) -> vlm_budget.PatchHandle:
        """Patch the model."""
        return vlm_budget.patch(self.tiny.model, METHOD, BUDGET, **options)


@cache
def built(name: str) -> Tiny:
    """A set-up, built once."""
    return tiny_models.build(name)


def fresh(name: str) -> Tiny:
    """A set-up with a model of its own; copying is three times as fast as building."""
    made = built(name)
    return replace(made, model=copy.deepcopy(made.model))


@cache
def expected(name: str) -> Case:
    """Computed once per set-up, on a model that no test sees."""
    tiny = fresh(name)
    full = rows(tiny.model, tiny.clone())
    with vlm_budget.patch(tiny.model, METHOD, BUDGET) as handle:
        prefill = forward(handle, tiny.clone(), full)
    compact = compacted(prefill, packed=not full[0].multi_axis)
    unpruned = [greedy(row, TOKENS) for row in full]
    return Case(tiny, full, prefill, compact, unpruned, [greedy(row, TOKENS) for row in compact])


def case(name: str) -> Case:
    """What is expected, with a fresh model."""
    known = expected(name)
    return Case(fresh(name), known.full, known.prefill, known.compact, known.unpruned, known.pruned)


@pytest.fixture(params=list(tiny_models.SETUPS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Every set-up: one per family and kind of input."""
    return fresh(request.param)


@pytest.fixture(params=GENERATING)
def generating(request: pytest.FixtureRequest) -> Tiny:
    """Every set-up that ``generate`` can run."""
    return fresh(request.param)


@pytest.fixture(params=list(tiny_models.SETUPS))
def any_case(request: pytest.FixtureRequest) -> Case:
    """Every set-up with its expectation."""
    return case(request.param)


@pytest.fixture(params=GENERATING)
def generating_case(request: pytest.FixtureRequest) -> Case:
    """Every set-up that ``generate`` can run, with its expectation."""
    return case(request.param)


@pytest.fixture
def llava() -> Tiny:
    """The plainest set-up, for contracts that do not depend on the family."""
    return fresh("llava")


@pytest.fixture
def llava_case() -> Case:
    """The plainest set-up with its expectation."""
    return case("llava")
