import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import vlm_budget
from fingerprint import changes, fingerprint
from tiny_vit import images, tiny_vit
from vlm_budget.engine import vit
from vlm_budget.engine.vit import is_vit, patch_vit, unpatch_vit
from vlm_budget.engine.vit_hooks import BlockHooks
from vlm_budget.errors import (
    BudgetError,
    OptionError,
    PatchError,
    SelectionError,
    UnknownNameError,
    UnsupportedModelError,
)
from vlm_budget.pruners.tome import ToMe
from vlm_budget.registry import VIT_METHODS
from vlm_budget.vit import Reduced, VitContext, VitMethod

METHODS = list(VIT_METHODS)


@dataclass(frozen=True, kw_only=True)
class Blank(VitMethod):
    """Half of the tokens go at the first block, and the rest is blank."""

    fault: str = ""

    def schedule(self, tokens: int, keep: int | None, blocks: int) -> tuple[int, ...]:
        return (keep,) * (blocks - (self.fault == "schedule"))

    def reduce(self, ctx: VitContext, keep: int) -> Reduced:
        if self.fault == "error":
            raise ZeroDivisionError
        shape = (len(ctx.tokens), keep + (self.fault == "shape"), ctx.tokens.shape[2])
        return Reduced(ctx.tokens.new_zeros(shape))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_everything_kept_is_bit_identical(name: str, options: dict) -> None:
    model = tiny_vit(**options).float()
    pixels = images(model).float()
    expected = model(pixels)
    with patch_vit(model, name, ratio=1.0) as handle:
        assert torch.equal(model(pixels), expected)
        report = handle.report()
    assert report.tokens == report.kept_tokens == 16
    assert report.flops == report.flops_unpatched


@pytest.mark.parametrize("name", METHODS)
def test_undo_restores_every_object(name: str) -> None:
    model = tiny_vit(global_pool="avg")
    pixels = images(model)
    before, plain = fingerprint(model), model(pixels)
    handle = patch_vit(model, name, ratio=0.5)
    assert changes(before, fingerprint(model))
    assert not torch.equal(model(pixels), plain)
    handle.undo()
    assert not handle.active
    assert changes(before, fingerprint(model)) == []
    assert torch.equal(model(pixels), plain)
    handle.undo()
    assert changes(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}])
def test_images_of_a_batch_do_not_see_each_other(name: str, options: dict) -> None:
    model = tiny_vit(5, **options)
    pixels = images(model, batch=4)
    with patch_vit(model, name, ratio=0.4):
        together = model(pixels)
        alone = torch.cat([model(pixels[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 3}])
def test_prefix_tokens_pass_untouched(prefix: dict) -> None:
    # In the block that reduces, the MLP keeps tokens apart: what blanks patch tokens cannot reach the others.
    model = tiny_vit(depth=1, num_classes=0, global_pool="", **prefix)
    pixels, count = images(model), model.num_prefix_tokens
    expected = model(pixels)
    with patch_vit(model, Blank(), ratio=0.5):
        found = model(pixels)
    assert found.shape[1] == count + 8
    torch.testing.assert_close(found[:, :count], expected[:, :count])
    assert (found[:, count:] - expected[:, count : count + 8]).abs().min(-1).values.max() > 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_patched_on_its_own(name: str, clone) -> None:
    model = tiny_vit(global_pool="avg")
    pixels = images(model)
    plain = model(pixels)
    handle = patch_vit(model, name, ratio=0.5)
    patched = model(pixels)  # with a graph: a copy must not try to take it along
    twin = clone(model)
    torch.testing.assert_close(twin(pixels), patched)
    unpatch_vit(twin)
    assert torch.equal(twin(pixels), plain)
    assert torch.equal(model(pixels), patched)
    handle.undo()
    assert torch.equal(model(pixels), plain)


@pytest.mark.parametrize(
    ("fault", "error"), [("error", ZeroDivisionError), ("shape", SelectionError), ("schedule", SelectionError)]
)
def test_a_failing_method_leaves_nothing_behind(fault: str, error: type[Exception]) -> None:
    model = tiny_vit()
    pixels = images(model)
    before, plain = fingerprint(model), model(pixels)
    handle = patch_vit(model, Blank(fault=fault), ratio=0.5)
    with pytest.raises(error):
        model(pixels)
    assert handle._engine.now is None
    with pytest.raises(PatchError, match="no image has run"):
        handle.report()
    patch_vit(model, "tome", ratio=0.5)
    model(pixels)
    unpatch_vit(model)
    assert changes(before, fingerprint(model)) == []
    assert torch.equal(model(pixels), plain)


def test_a_pass_follows_an_interrupted_one() -> None:
    model = tiny_vit()
    pixels = images(model)
    with patch_vit(model, "tome", ratio=0.5):
        expected = model(pixels)
        hook = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        for interrupted in (model, model.forward_features):
            with pytest.raises(ZeroDivisionError):
                interrupted(pixels)
        hook.remove()
        assert torch.equal(model(pixels), expected)


def test_a_second_patch_replaces_the_first_and_a_failing_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    pixels = images(model)
    before = fingerprint(model)
    patch_vit(model, "tome", ratio=0.5)
    first = model(pixels)
    handle = patch_vit(model, "token_transforming", ratio=0.5)
    second = model(pixels)
    assert not torch.equal(first, second)
    with pytest.raises(UnknownNameError):
        patch_vit(model, "tomme", ratio=0.5)
    assert torch.equal(model(pixels), second)
    works = iter([True, False])  # the second block fails, once
    monkeypatch.setattr(vit, "BlockHooks", lambda *a: BlockHooks(*a) if next(works, True) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch_vit(model, "tome", ratio=0.5)
    assert handle.active
    assert torch.equal(model(pixels), second)
    handle.undo()
    assert changes(before, fingerprint(model)) == []


def test_report_counts_tokens_and_operations_exactly() -> None:
    model = tiny_vit(6)  # 36 tokens, width 24, MLP 96, patches of 3 * 4 * 4 values, 5 classes
    with patch_vit(model, "token_transforming", ratio=1 / 3, self_weight=1.0) as handle:
        model(images(model, batch=2))
        report = handle.report()
    assert [(block.entered, block.left) for block in report.blocks] == [(36, 36), (36, 28), (28, 20), (20, 12)]
    assert (report.batch, report.prefix, report.tokens, report.kept_tokens) == (2, 1, 36, 12)

    def operations(blocks: list[tuple[int, int]]) -> int:
        total = 2 * 36 * 48 * 24 + 2 * 24 * 5
        for entered, left in blocks:
            n, m = entered + 1, left + 1
            total += 2 * n * 24 * 72 + 2 * 2 * n * n * 24 + 2 * n * 24 * 24 + 2 * 2 * m * 24 * 96
            total += 2 * n * 24 if left < entered else 0  # the class token's row, once more
        return total

    assert report.flops_unpatched == operations([(36, 36)] * 4)
    assert report.flops == operations([(36, 36), (36, 28), (28, 20), (20, 12)])
    assert "36 36 28 20 12" in str(report)
    assert report.to_dict()["blocks"][1] == {"entered": 36, "left": 28}


def test_a_report_changes_nothing() -> None:
    model = tiny_vit(5, global_pool="avg", pos_drop_rate=0.2).train()
    pixels = images(model)
    with patch_vit(model, "tome", ratio=0.5) as handle:
        features = model.forward_features(pixels)
        torch.manual_seed(3)
        handle.report()
        assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))
        assert handle.report().batch == 3
        model.forward_head(features)


def test_features_and_head_in_two_calls_are_the_model() -> None:
    model = tiny_vit(5, global_pool="avg")
    pixels = images(model)
    with patch_vit(model, "tome", ratio=0.5):
        features = model.forward_features(pixels)
        split = model.forward_head(features)
        assert features.shape[1] == 1 + 13
        assert torch.equal(model(pixels), split)
        for foreign in (features + 1, features[:, :5]):
            model.forward_features(pixels)
            with pytest.raises(PatchError, match="forward_features"):
                model.forward_head(foreign)
        model(pixels)
        with pytest.raises(PatchError, match="forward_features"):
            model.forward_head(features)


def test_no_tensor_outlives_its_pass() -> None:
    model = tiny_vit(5, global_pool="avg")
    with patch_vit(model, "tome", ratio=0.5):
        seen = []
        for module in (*model.blocks, model.norm, model.fc_norm):
            module.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
        model(images(model))
        gc.collect()
        assert len(seen) == 6
        assert all(tensor() is None for tensor in seen)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_every_weight(name: str) -> None:
    model = tiny_vit(5).train()
    with patch_vit(model, name, ratio=0.5):
        model(images(model)).square().sum().backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum()]
    assert missing == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
def test_half_precision_runs_close_to_full(name: str, dtype: torch.dtype | str) -> None:
    model = tiny_vit(5)
    pixels = images(model)
    half = copy.deepcopy(model).float() if dtype == "autocast" else copy.deepcopy(model).to(dtype)
    with patch_vit(half, name, ratio=0.5), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        found = half(pixels.float() if dtype == "autocast" else pixels.to(dtype))
    assert found.dtype == (torch.bfloat16 if dtype == "autocast" else dtype)
    with patch_vit(model, name, ratio=0.5):
        expected = model(pixels)
    assert torch.cosine_similarity(found.double(), expected).min() > 0.98


def test_a_compiled_model_is_patched_too() -> None:
    model = tiny_vit(5)
    pixels = images(model)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(pixels)
    with patch_vit(model, "tome", ratio=0.5):
        torch.testing.assert_close(compiled(pixels), model(pixels))
        assert (compiled(pixels) - plain).abs().max() > 1e-3
    torch.testing.assert_close(compiled(pixels), plain)


def test_threads_keep_their_passes_apart() -> None:
    model = tiny_vit(5, global_pool="avg")
    batches = [images(model, batch=size, seed=size) for size in (1, 2, 3, 4)] * 4
    with patch_vit(model, "tome", ratio=0.5), torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [model(batch) for batch in batches]
        found = list(pool.map(torch.no_grad()(model), batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_undo_waits_for_a_thread_inside() -> None:
    model = tiny_vit()
    pixels, inside, go_on = images(model), threading.Event(), threading.Event()
    handle = patch_vit(model, "tome", ratio=0.5)

    def wait(*_: object) -> None:
        inside.set()
        assert go_on.wait(30)

    hook = model.blocks[1].register_forward_hook(wait)
    worker = threading.Thread(target=model, args=(pixels,))
    worker.start()
    assert inside.wait(30)
    with pytest.raises(PatchError, match="other thread"):
        handle.undo()
    go_on.set()
    worker.join()
    hook.remove()
    handle.undo()
    assert not handle.active


def test_the_verbs_of_the_library_take_a_vision_transformer() -> None:
    model = tiny_vit()
    pixels = images(model)
    plain = model(pixels)
    handle = vlm_budget.patch(model, "tome", budget=0.5)
    model(pixels)
    assert handle.report().kept_tokens == 8
    vlm_budget.unpatch(model)
    assert torch.equal(model(pixels), plain)
    with vlm_budget.patch(model, "token_transforming", ratio=0.5, self_weight=0.5) as handle:
        model(pixels)
        assert str(handle.method) == "VitTokenTransforming(self_weight=0.5)"


def test_a_budget_may_be_said_in_three_ways() -> None:
    model = tiny_vit(5)
    pixels = images(model)
    for spend in ({"ratio": 0.4}, {"budget": "40%"}, {"budget": 10}):
        with patch_vit(model, "token_transforming", **spend) as handle:
            model(pixels)
            assert handle.report().kept_tokens == 10
    assert patch_vit(model, ToMe(r=2)).budget is None
    unpatch_vit(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("tome",), BudgetError, "needs a ratio"),
        (("tome", 0.5, {"plan": "x"}), OptionError, "plan='x' is for VLMs"),
        (("tome", 0.5, {"positions": "packed"}), OptionError, "positions='packed' is for VLMs"),
        (("tome", 0.5, {"ratio": 0.5}), BudgetError, "not both"),
        (("tome", 0.5, {"r": 3}), BudgetError, "without a budget"),
        (("tome", None, {"ratio": 0}), BudgetError, r"\(0, 1\]"),
        (("tome", None, {"ratio": 1.2}), BudgetError, r"\(0, 1\]"),
        (("tome", None, {"ratio": True}), BudgetError, r"\(0, 1\]"),
        (("tome", "20 ms"), BudgetError, "number of patch tokens"),
        (("tomee", 0.5), UnknownNameError, "'tome'"),
        (("tome", 0.5, {"rr": 3}), UnknownNameError, "'r'"),
        ((3, 0.5), UnknownNameError, "tome"),
        (("hired", 0.5), PatchError, "VLM"),
        ((ToMe(), 0.5, {"r": 3}), PatchError, "configure the instance"),
    ],
)
def test_mistakes_raise_typed_errors_and_change_nothing(arguments: tuple, error: type, message: str) -> None:
    model = tiny_vit()
    before = fingerprint(model)
    method, budget, options = (*arguments, None, None)[:3]
    with pytest.raises(error, match=message):
        patch_vit(model, method, budget, **(options or {}))
    assert changes(before, fingerprint(model)) == []


def test_other_models_and_other_blocks_are_refused() -> None:
    from timm.models.vision_transformer import Attention, ParallelScalingBlock, ResPostBlock

    assert is_vit(tiny_vit())
    assert not is_vit(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="Linear"):
        patch_vit(nn.Linear(2, 2), "tome", ratio=0.5)
    for block in (ParallelScalingBlock, ResPostBlock):
        with pytest.raises(UnsupportedModelError, match=f"block 0 .*{block.__name__}|block 0 .*without"):
            patch_vit(tiny_vit(block_fn=block), "tome", ratio=0.5)
    model = tiny_vit()
    model.blocks[2].attn.__class__ = type("OtherAttention", (Attention,), {})
    with pytest.raises(UnsupportedModelError, match="block 2 .*OtherAttention"):
        patch_vit(model, "tome", ratio=0.5)
    pooled = tiny_vit(global_pool="map")
    with pytest.raises(PatchError, match="proportional=False"):
        patch_vit(pooled, "tome", ratio=0.5)
    with patch_vit(pooled, "tome", ratio=0.5, proportional=False):
        assert pooled(images(pooled)).isfinite().all()


def test_what_would_go_wrong_silently_is_refused() -> None:
    model = tiny_vit()
    pixels = images(model)
    with pytest.raises(PatchError, match="not patched"):
        unpatch_vit(model)
    handle = patch_vit(model, "tome", ratio=0.5)
    with pytest.raises(PatchError, match="no image has run"):
        handle.report()
    with pytest.raises(PatchError, match="on its own"):
        model.blocks[2](torch.zeros(1, 17, 24).double())
    with pytest.raises(PatchError, match="attn_mask"):
        model(pixels, attn_mask=torch.zeros(17, 17).double())
    model.set_grad_checkpointing()
    with pytest.raises(PatchError, match="checkpoint"):
        model(pixels)
    with torch.no_grad():
        model(pixels)
    with pytest.raises(BudgetError, match="nearest feasible"):
        patch_vit(model, "tome", 17)
        with torch.no_grad():
            model(pixels)
    unpatch_vit(model)
    with pytest.raises(PatchError, match="undone"):
        handle.report()
