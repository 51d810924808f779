"""Sparse video attention on a CUDA device: kernels at real sizes, whole calls, and pipelines."""

import os
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import vlm_budget
from vlm_budget import ops
from vlm_budget.eval.device import count_waits
from vlm_budget.eval.op_work import TOLERANCE, OpCase, Sizes, difference
from vlm_budget.eval.video_ops import VIDEO_CASES, attention, block_means_of
from vlm_budget.eval.video_shapes import (
    HUNYUAN,
    Shape,
    attended_rows,
    cut,
    cut_rows,
    planted,
    sampled,
)
from vlm_budget.registry import VIDEO_METHODS
from vlm_budget.triton_kernels.block_sparse_attention import WORKSPACE
from vlm_budget.video.dit.attend import attend
from vlm_budget.video.dit.call import Call, Grid, Moment
from vlm_budget.video.dit.method import SparseAttention

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
MIDDLE = Shape("middle", Grid(5, 30, 52), 77, 3, 128, (29, 71), 0.0)
"""7,800 tokens of video, and text: a few frames of Wan at 480p."""
SPARSE = ("block_topk", "radial", "sliding_tile", "svg1", "svg2")


def call_of(shape: Shape, dtype: torch.dtype = torch.bfloat16, step: int = 0, state: Any = None) -> Call:
    moment = Moment(step, 50, 1, 40)
    tensors = planted(shape, DEVICE, dtype)
    return Call(*tensors, shape.grid, 0, None, False, shape.scale, moment, {} if state is None else state)


def method_of(name: str, shape: Shape = MIDDLE, **options: Any) -> SparseAttention:
    """At the density that it can promise on this grid, and a quarter at least."""
    plain = VIDEO_METHODS.get(name)(**options)
    if options.get("top_p") is not None:
        return plain
    return replace(plain, density=max(0.25, min(1.0, plain.least_density(shape.grid) + 1e-3)))


def named(case: OpCase) -> str:
    return f"{case.op}: {case.what}"


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VIDEO_CASES, ids=map(named, VIDEO_CASES))
def test_a_kernel_gives_what_its_reference_gives_at_a_real_size(case: OpCase) -> None:
    sizes = Sizes(DEVICE, torch.bfloat16, heads=12, head_dim=128)
    made = case.make(sizes, 9001, torch.Generator(DEVICE).manual_seed(0))
    with ops.use("reference"):
        wanted = made.call()
    with ops.use("triton"):
        found = made.call()
        made.compare(found, wanted)
        difference(made.call(), found, 0.0)  # the same bits again


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("tile", [None, 128], ids=["uneven", "blocks of 128"])
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(128, torch.bfloat16), (128, torch.float16), (128, torch.float32), (64, torch.float32)]
    + [(width, torch.bfloat16) for width in (64, 96, 72, 32, 16)],
    ids=str,
)
def test_attention_is_exact_for_every_width_and_type(
    head_dim: int, dtype: torch.dtype, tile: int | None, corrected: bool
) -> None:
    shape = replace(MIDDLE, head_dim=head_dim)
    tensors, blocks = planted(shape, DEVICE, dtype), cut(shape, "random", tile, 0.25, DEVICE)
    means = block_means_of(*tensors[1:], blocks) if corrected else None
    with ops.use("triton"):
        out, lse = attention(*tensors, blocks, shape.scale, means)()
    rows = sampled(shape.length, DEVICE)
    wanted = cut_rows(tensors, blocks, means, rows, shape.scale)
    difference((out[0][:, rows].float(), lse[0][:, rows]), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
def test_the_kernel_takes_at_most_its_workspace_beside_inputs_and_outputs(corrected: bool) -> None:
    """At HunyuanVideo's size, as CUDA's allocator saw it."""
    tensors, blocks = planted(HUNYUAN, DEVICE, torch.bfloat16), cut(HUNYUAN, "clustered", None, 0.25, DEVICE)
    means = block_means_of(*tensors[1:], blocks) if corrected else None
    call = attention(*tensors, blocks, HUNYUAN.scale, means)
    with ops.use("triton"):
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
    own = sum(tensor.numel() * tensor.element_size() for tensor in result)
    assert torch.cuda.max_memory_allocated() - before - own <= WORKSPACE


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPARSE)
def test_a_call_computes_what_its_blocks_say(name: str) -> None:
    call, method = call_of(MIDDLE), method_of(name)
    with ops.use("triton"):
        blocks = method.blocks(call)
        out, lse = attend(call, blocks)
    rows = sampled(MIDDLE.length, DEVICE)
    wanted = attended_rows(call, blocks, rows)
    difference((out[0][:, rows].float(), lse[0][:, rows]), wanted, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("options", [{}, {"cut": "fixed"}], ids=["clusters", "fixed"])
def test_all_of_the_mass_is_dense_attention(options: dict[str, Any]) -> None:
    call, method = call_of(MIDDLE), method_of("svg2", top_p=1.0, **options)
    with ops.use("triton"):
        out = attend(call, method.blocks(call))[0]
    dense = scaled_dot_product_attention(call.query.float(), call.key.float(), call.value.float())
    difference(out.float(), dense, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_call_does_not_make_the_host_wait(name: str) -> None:
    state: dict[str, Any] = {}
    method = method_of(name)
    calls = [replace(call_of(MIDDLE), moment=Moment(step, 50, 1, 40), state=state) for step in range(4)]
    with ops.use("triton"):
        for call in calls[:2]:  # kernels are compiled and chosen, and tables of the grid are sent
            attend(call, method.blocks(call))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls[2:]:
                attend(call, method.blocks(call))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_run_repeats_itself_to_the_bit() -> None:
    found = []
    with ops.use("triton"):
        for _ in range(2):
            state: dict[str, Any] = {}
            calls = [call_of(MIDDLE, step=step, state=state) for step in range(3)]
            found.append([attend(call, method_of("svg2").blocks(call))[0] for call in calls])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


# --- pipelines -------------------------------------------------------------------------------------------------------


def pipeline(name: str) -> Any:
    pytest.importorskip("diffusers", reason="the pipelines under test are diffusers'")
    from tiny_pipelines import tiny_pipeline

    tiny = tiny_pipeline(name)
    tiny.pipe.to(DEVICE)
    moved = {name: value.to(DEVICE) for name, value in tiny.arguments.items() if isinstance(value, torch.Tensor)}
    return replace(tiny, arguments={**tiny.arguments, **moved})


def svg2(tiny: Any) -> Any:
    """Clusters so few that a toy's density can be kept, no step and no layer dense."""
    options = {"query_clusters": 4, "key_clusters": 8, "density": 0.75, "warmup": 0.0, "dense_layers": 0.0}
    return vlm_budget.patch(tiny.pipe, "svg2", force=True, **options)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_a_patched_pipeline_gives_with_kernels_what_it_gives_with_references(name: str) -> None:
    tiny, made = pipeline(name), {}
    with svg2(tiny) as handle:
        for which in ("reference", "triton"):
            with mock.patch.dict(os.environ, {"VLM_BUDGET_KERNELS": which}):
                made[which] = tiny(steps=3)
        assert handle.report().sparse_calls > 0
    torch.testing.assert_close(made["triton"], made["reference"], rtol=1e-3, atol=1e-3)


def test_undoing_a_patch_gives_back_the_dense_pipeline_to_the_bit() -> None:
    tiny = pipeline("wan")
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        before = tiny(steps=2)
        with svg2(tiny):
            assert not torch.equal(tiny(steps=2), before)
        assert torch.equal(tiny(steps=2), before)
        with vlm_budget.patch(tiny.pipe, "svg2", 1.0, force=True):
            assert torch.equal(tiny(steps=2), before)


def test_a_step_of_a_patched_pipeline_does_not_wait_for_us() -> None:
    """But for the first timestep of a run, which is read to be sure whose it is."""
    tiny = pipeline("wan")
    with torch.no_grad(), svg2(tiny):
        tiny(steps=2)
        torch.cuda.synchronize()
        found = {steps: count_waits(partial(tiny, steps=steps)) for steps in (2, 6)}
    assert found[6]["ours"] == found[2]["ours"] <= 1, found[6]["places"]
