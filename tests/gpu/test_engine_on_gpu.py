"""The engine on a CUDA device: the contracts that a CPU cannot show."""

import copy

import pytest
import torch

import vlm_budget
from tiny_models import SETUPS, build

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(name: str, dtype: torch.dtype):
    """A tiny model and its inputs on the device."""
    tiny = build(name)
    inputs = {
        key: value.to("cuda", dtype if value.is_floating_point() else None)
        for key, value in tiny.inputs.items()
        if isinstance(value, torch.Tensor)
    }
    return copy.deepcopy(tiny.model).to("cuda", dtype), inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(SETUPS))
def test_full_budget_is_bit_identical(name, dtype):
    """``budget=1.0`` changes no bit on the device either."""
    model, inputs = on_gpu(name, dtype)
    with torch.no_grad():
        expected = model(**inputs).logits
        with vlm_budget.patch(model, "hired", 1.0):
            got = model(**inputs).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", sorted(SETUPS))
def test_pruned_model_equals_the_cpu(name):
    """The same seeded tokens are kept on both devices, and the answers agree in float32."""
    model, inputs = on_gpu(name, torch.float32)
    host = {key: value.cpu() for key, value in inputs.items()}
    cpu = build(name).model
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad(), vlm_budget.patch(model, "random", 0.3), vlm_budget.patch(cpu, "random", 0.3):
        got, expected = model(**inputs).logits.cpu(), cpu(**host).logits
    real = host["attention_mask"].bool()
    assert (got - expected).abs()[real].max() < 2e-3 * expected.abs().max()


def test_counts_and_times_are_reported_from_the_device():
    """Counts are exact, and times come from the device's own events."""
    model, inputs = on_gpu("llava_next", torch.bfloat16)
    with vlm_budget.patch(model, "hired", 0.3) as handle:
        promised = handle.plan(**inputs)
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        report = handle.report()
    assert report.plan == promised
    assert report.prefill_ms > 0 and report.select_ms > 0 and report.decode_steps == 3


def test_prefill_reads_the_device_a_bounded_number_of_times(recwarn):
    """Selection and compaction do not wait for the device once per token or per layer."""
    model, inputs = on_gpu("llava_next", torch.bfloat16)
    images = len(inputs["image_sizes"])
    with torch.no_grad(), vlm_budget.patch(model, "hired", 0.3):
        model(**inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ours = [w for w in recwarn if "vlm_budget" in str(w.filename) or "pruners" in str(w.filename)]
    assert len(ours) <= 8 + 12 * images
