"""Vision transformers on a CUDA device: the backends that take log(size) as a mask, and copies of what has run."""

import copy

import pytest
import torch

import vlm_budget

pytest.importorskip("timm", reason="the models under test are timm's")
from tiny_vit import images, tiny_vit
from vlm_budget.eval.device import count_waits

pytestmark = pytest.mark.gpu
METHODS = ("tome", "token_transforming")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "reg_tokens": 2}], ids=["class token", "average"])
def test_patched_model_equals_the_cpu(method: str, options: dict) -> None:
    model = tiny_vit(7, **options)
    pixels = images(model)
    with vlm_budget.patch(model, method, ratio=0.5):
        expected = model(pixels)
    on_gpu = copy.deepcopy(model).cuda()
    with vlm_budget.patch(on_gpu, method, ratio=0.5):
        torch.testing.assert_close(on_gpu(pixels.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_runs_and_everything_kept_is_bit_identical(method: str, dtype: torch.dtype) -> None:
    model = tiny_vit(7).to("cuda", dtype)
    pixels = images(model).to("cuda", dtype)
    expected = model(pixels)
    with vlm_budget.patch(model, method, ratio=1.0):
        assert torch.equal(model(pixels), expected)
    with vlm_budget.patch(model, method, ratio=0.5) as handle:
        assert model(pixels).isfinite().all()
        assert handle.report().kept_tokens == 25
        twin = copy.deepcopy(model)  # the account holds device events, which a copy must not try to take along
        assert twin(pixels).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_reducing_does_not_wait_for_the_device(method: str) -> None:
    model = tiny_vit(7).cuda()
    pixels = images(model).cuda()
    with torch.no_grad(), vlm_budget.patch(model, method, ratio=0.5):
        model(pixels)  # kernels are compiled in the first, which waits
        found = count_waits(lambda: model(pixels))
    assert found["total"] == 0, found["places"]
