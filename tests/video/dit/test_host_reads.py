"""Patched, a step waits for the device no more often than it did; a run does so twice when it begins.

Shown on a CUDA device that the CPU plays (``pretend_device``), with the references in the kernels' place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_budget
from pretend_device import PretendDevice, Wait
from tiny_pipelines import TinyPipeline, tiny_pipeline

DENSE = {"warmup": 0.0, "dense_layers": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "svg2": {"density": 0.7},
    "block_topk": {"density": 0.7},
    "radial": {},
    "sliding_tile": {"density": 0.7},
}


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel can run on a device that is none."""
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")


def on_device(name: str) -> TinyPipeline:
    tiny = tiny_pipeline(name)
    tiny.pipe.to("cuda")
    moved = {key: value.to("cuda") if torch.is_tensor(value) else value for key, value in tiny.arguments.items()}
    return TinyPipeline(tiny.pipe, moved, tiny.forwards, tiny.samples)


def ours(waits: list[Wait]) -> list[Wait]:
    return [wait for wait in waits if wait.by.owner == "ours" and not wait.by.reference]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_only_the_beginning_of_a_run_waits(name: str, method: str) -> None:
    with PretendDevice() as device:
        tiny = on_device(name)
        with vlm_budget.patch(tiny.pipe, method, force=True, **DENSE, **METHODS[method]):
            tiny(steps=1)  # tables of a shape are made once
            with device.watch() as short:
                tiny(steps=1)
            with device.watch() as long:
                tiny(steps=4)
    assert len(ours(long)) == len(ours(short)) == 2, "\n".join(map(str, ours(long)))
