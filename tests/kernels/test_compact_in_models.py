"""Compaction in a whole prompt pass: kernels change no bit of what a model answers."""

import pytest
import torch

import tiny_models
import vlm_budget
from vlm_budget import ops


@pytest.mark.parametrize("setup", ["llava", "llava_right_padded", "qwen3_vl", "qwen3_vl_video"])
def test_a_patched_model_gives_the_same(setup: str) -> None:
    tiny = tiny_models.build(setup)
    logits = {}
    for name in ("reference", "triton"):
        with vlm_budget.patch(tiny.model, "uniform", 0.4), ops.use(name), torch.no_grad():
            logits[name] = tiny.model(**tiny.clone()).logits
    assert torch.equal(logits["triton"], logits["reference"])
