"""A vision tower on the CPU before a language model on a CUDA device gives what the model gives on the CPU.

As with accelerate's ``device_map``, whose hooks carry inputs to where a module is: scores and keys are on the CPU then,
features and all of the language model on the device. The device is played by the CPU (``pretend_device``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import tiny_models
import vlm_budget
from pretend_device import PretendDevice
from tiny_models import Tiny
from vlm_budget.pruners.hired import HiRED
from vlm_budget.pruners.token_transforming import TokenTransforming

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None,
    reason=f"torch {torch.__version__} is built without CUDA, so that it cannot even pretend (Linux wheels can)",
)
BUDGET = 0.6
MERGING = HiRED(merge=TokenTransforming())
EXCLUSIVE = HiRED(merge=TokenTransforming(exclusive=True))


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel can run on a device that is none."""
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")


def carry(device: str) -> Callable[[Any, Any, Any], Any]:
    """A hook that brings what a module is given to ``device``."""

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return tuple(map(there, args)), {name: there(value) for name, value in kwargs.items()}

    return hook


@cache
def offloaded(name: str) -> tuple[Tiny, Any, dict[str, Any]]:
    """The model on the CPU, and its twin with all but the tower on the device; inputs there."""
    tiny = tiny_models.build(name, layers=4)
    with PretendDevice(), torch.no_grad():
        twin = copy.deepcopy(tiny.model).to("cuda")
        twin.model.vision_tower.to("cpu").register_forward_pre_hook(carry("cpu"), with_kwargs=True)
        twin.model.multi_modal_projector.register_forward_pre_hook(carry("cuda"), with_kwargs=True)
        return tiny, twin, {key: value.to("cuda") for key, value in tiny.clone().items()}


def check(name: str, method: Any) -> None:
    tiny, twin, inputs = offloaded(name)
    with torch.no_grad(), vlm_budget.patch(tiny.model, method, BUDGET) as handle:
        expected, stayed = tiny.model(**tiny.clone()).logits, handle.kept()
    with PretendDevice(), torch.no_grad():
        tower = next(twin.model.vision_tower.parameters())
        assert tower.device.type == "cpu"
        with vlm_budget.patch(twin, method, BUDGET) as handle:
            got, kept = twin(**{key: value.clone() for key, value in inputs.items()}).logits, handle.kept()
        assert got.device.type == "cuda"
        assert [entry.positions for entry in kept] == [entry.positions for entry in stayed]
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("method", [*vlm_budget.list_methods(), MERGING, EXCLUSIVE], ids=str)
def test_every_method_chooses_as_on_one_device(method: Any) -> None:
    check("llava_next", method)


@pytest.mark.parametrize("method", ["hired", "visionzip"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "gemma3", "paligemma"])
def test_other_models_are_offloaded_too(name: str, method: str) -> None:
    check(name, method)
