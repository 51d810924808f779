"""The engine on a CUDA device: the contracts that a CPU cannot show."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlm_budget
from tiny_models import SETUPS, build
from vlm_budget.decoder import DecoderPruner, Step

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


@dataclass(frozen=True, kw_only=True)
class Drawn(DecoderPruner):
    """Half of the tokens from layer 2 on, an eighth from layer 4 on, drawn alike on every device."""

    scores: ClassVar = "previous"
    twice: bool = False

    @property
    def fixed(self):
        """The schedule is the fields'."""
        return True

    def schedule(self, tokens, spend, layers):
        """Two steps."""
        return (Step(2, tokens // 2), Step(4, tokens // 8))

    def pick(self, ctx, k):
        """Any; or one token twice."""
        assert ctx.attention(ctx.last).isfinite().all()
        draw = torch.Generator().manual_seed(100 * ctx.layer + ctx.order)
        keep = torch.randperm(len(ctx.alive), generator=draw)[:k].to(ctx.device)
        return keep * 0 if self.twice else keep


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma"])
def test_dropping_at_layers_equals_the_cpu(name):
    """The same tokens are left at every layer on both devices, and the answers agree in float32."""
    tiny = build(name, layers=6)
    inputs = {key: value.to("cuda") for key, value in tiny.clone().items()}
    model = copy.deepcopy(tiny.model).to("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad(), vlm_budget.patch(model, Drawn()) as device, vlm_budget.patch(tiny.model, Drawn()) as host:
        got, expected = model(**inputs).logits.cpu(), tiny.model(**tiny.clone()).logits
        assert [item.steps for item in device.kept()] == [item.steps for item in host.kept()]
        assert device.report().drop_ms > 0
    real = tiny.inputs["attention_mask"].bool()
    assert (got - expected).abs()[real].max() < 2e-3 * expected.abs().max()


def test_a_token_taken_twice_at_a_layer_is_caught():
    """The device is not asked at the layer, but behind the last one."""
    tiny = build("llava", layers=6)
    inputs = {key: value.to("cuda") for key, value in tiny.clone().items()}
    model = tiny.model.to("cuda")
    with (
        torch.no_grad(),
        vlm_budget.patch(model, Drawn(twice=True)),
        pytest.raises(vlm_budget.SelectionError, match="promised"),
    ):
        model(**inputs)


def test_drops_read_the_device_a_bounded_number_of_times(recwarn):
    """The layers do not wait for the device once per token."""
    tiny = build("llava_next", layers=6)
    inputs = {key: value.to("cuda") for key, value in tiny.clone().items()}
    images, model = len(inputs["image_sizes"]), tiny.model.to("cuda")
    with torch.no_grad(), vlm_budget.patch(model, "fastv", 0.5):
        model(**inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ours = [w for w in recwarn if "vlm_budget" in str(w.filename) or "pruners" in str(w.filename)]
    assert len(ours) <= 8 + 8 * images
