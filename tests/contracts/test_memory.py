"""What is remembered of a prompt is freed with it."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

import tiny_models
import vlm_budget
from tiny_models import Tiny
from vlm_budget.engine.selection import Observation

from .conftest import fresh


def observations() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking what old objects are may warn
        return sum(type(one) is Observation for one in gc.get_objects())


@pytest.mark.parametrize("name", list(tiny_models.SETUPS))
@pytest.mark.parametrize("grad", [False, True])
def test_no_prompt_outlives_the_next(name: str, grad: bool) -> None:
    before = observations()
    tiny = fresh(name)
    with vlm_budget.patch(tiny.model, "hired", 0.4), torch.set_grad_enabled(grad):
        for _ in range(3):
            tiny.model(**tiny.clone())
        assert observations() == before


@pytest.mark.filterwarnings("ignore:.*beside the prompt")
@pytest.mark.parametrize("name", ["llava_onevision_video", "llava_next_video"])
def test_frames_from_before_the_pooling_are_freed_too(name: str) -> None:
    before = observations()
    tiny: Tiny = fresh(name)
    with vlm_budget.patch(tiny.model, "quota", 0.4), torch.no_grad():
        for _ in range(3):
            tiny.model(**tiny.clone())
        assert observations() == before
