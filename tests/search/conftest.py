"""A tiny model with calibration prompts, and time for property tests: a shared machine may be slow."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import settings

import tiny_models
from tiny_parts import row_inputs

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@dataclass(frozen=True)
class Case:
    """A model and six prompts: two of every shape, three shapes, pixels of their own."""

    model: Any
    data: list[dict[str, Any]]


@cache
def _built(name: str) -> Any:
    return tiny_models.build(name)


def make_case(name: str = "llava", answers: bool = True) -> Case:
    """A fresh copy of a tiny model, and prompts made from its set-up's with other pixels and other words."""
    tiny = _built(name)
    generator = torch.Generator().manual_seed(5)
    data = []
    for row in (0, 1):
        for _ in range(3):
            one = row_inputs(tiny, row)
            ids = one["input_ids"]
            for key, value in one.items():
                if value.is_floating_point():
                    one[key] = torch.randn(value.shape, generator=generator) * (value != 0)
            one["input_ids"] = torch.where(ids < 60, (ids + int(torch.randint(40, (), generator=generator))) % 60, ids)
            data.append({**one, "answer": [3, 4]} if answers else one)
    return Case(copy.deepcopy(tiny.model), data)


@pytest.fixture
def case() -> Case:
    """LLaVA, three decoder layers."""
    return make_case()
