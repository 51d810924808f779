"""The engine on a CUDA device: the contracts that a CPU cannot show."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlm_budget
from host_waits import CALLS
from tiny_models import SETUPS, build
from vlm_budget.decoder import DecoderPruner, Step
from vlm_budget.eval.device import count_waits

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(name: str, dtype: torch.dtype, layers: int = 3):
    """A tiny model and its inputs on the device."""
    tiny = build(name, layers)
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


# Gemma 3's sliding windows let nothing be dropped inside, which is where FastV drops.
WAITING = [
    (name, method)
    for name in sorted(SETUPS)
    for method in ("hired", "fastv", "divprune")
    if (name, method) != ("gemma3", "fastv")
]


@pytest.mark.parametrize(("name", "method"), WAITING)
def test_a_prefill_waits_for_the_device_at_most_once(name, method):
    """And transformers waits no more often than without the patch."""
    model, inputs = on_gpu(name, torch.bfloat16, layers=4)
    with torch.no_grad():
        model(**inputs)
        alone = count_waits(lambda: model(**inputs))
        with vlm_budget.patch(model, method, 0.6):
            model(**inputs)  # kernels are compiled and tuned in the first, which waits
            found = count_waits(lambda: model(**inputs))
    assert alone["ours"] == 0, alone["places"]
    assert found["ours"] <= 1, found["places"]
    assert found["total"] - found["ours"] <= alone["total"], (found["places"], alone["places"])


@pytest.mark.parametrize("method", ["hired", "fastv", "divprune"])
def test_decoding_does_not_wait_for_the_device(method):
    """What is waited for once is waited for in the prefill, however many tokens follow."""
    model, inputs = on_gpu("llava_next", torch.bfloat16, layers=4)
    options = {"max_new_tokens": 6, "do_sample": False}
    with vlm_budget.patch(model, method, 0.6):
        model.generate(**inputs, **options)
        found = count_waits(lambda: model.generate(**inputs, **options))
    assert found["ours"] <= 1, found["places"]


@pytest.mark.parametrize(("call", "kind"), CALLS)
def test_a_real_device_makes_the_host_wait_as_the_pretended_one_does(call, kind):
    """So that what the tests without a device count is what a device does, and that anything is counted here."""
    table, numbers = torch.arange(12.0, device="cuda").view(3, 4), torch.arange(3, device="cuda")
    call(table.clone(), numbers.clone())
    found = count_waits(lambda: call(table, numbers))
    assert bool(found["total"]) == (kind is not None)


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
