"""Kernels on a CUDA device: right, without a wait, in a graph and under ``torch.compile``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import vlm_budget
from vlm_budget import ops
from vlm_budget.eval.device import count_waits
from vlm_budget.eval.large import FAMILIES, build
from vlm_budget.eval.op_cases import CASES as TOKEN_CASES
from vlm_budget.eval.op_work import OpCase, Sizes, Work, difference, tensors
from vlm_budget.eval.passes import METHODS
from vlm_budget.eval.video_ops import VIDEO_CASES

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (63, 111, 577, 2881)
CASES = [*TOKEN_CASES, *VIDEO_CASES]
CAPTURED = [case for case in CASES if not case.lists]


def named(case: OpCase) -> str:
    return f"{case.op}: {case.what}"


each_case = pytest.mark.parametrize("case", CASES, ids=map(named, CASES))


def work(case: OpCase, tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Work:
    sizes = Sizes(DEVICE, dtype, heads=8, head_dim=128, width=512)
    return case.make(sizes, tokens, torch.Generator(DEVICE).manual_seed(seed))


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds not-a-number, or the largest whole number: an output that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def kernel(made: Work) -> Any:
    with ops.use("triton"):
        return made.call()


@pytest.mark.filterwarnings("ignore")  # of algorithms that are not deterministic
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_a_kernel_gives_what_its_reference_gives(case: OpCase, dtype: torch.dtype, tokens: int) -> None:
    for seed in range(3):
        made = work(case, tokens, dtype, seed)
        with ops.use("reference"):
            wanted = made.call()
        with poisoned():
            found = kernel(made)
        made.compare(found, wanted)
        difference(kernel(made), found, 0.0)  # the same bits again


@each_case
def test_the_host_does_not_wait(case: OpCase) -> None:
    made = work(case, 577)
    kernel(made)  # compiling and tuning may
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(made)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CAPTURED, ids=map(named, CAPTURED))
def test_a_graph_replays_it(case: OpCase) -> None:
    made = work(case, 577)
    wanted = [tensor.clone() for tensor in tensors(kernel(made))]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tensors(kernel(made))
    for tensor in found:
        tensor.fill_(77)
    graph.replay()
    torch.cuda.synchronize()
    difference(found, wanted, 0.0)


@each_case
def test_torch_compile_traces_past_it(case: OpCase) -> None:
    made = work(case, 577)
    wanted = kernel(made)
    torch.compiler.reset()  # calls of one shape of code count against one limit
    with ops.use("triton"):
        found = torch.compile(made.call, backend="aot_eager", fullgraph=True)()
    difference(found, wanted, 0.0)


def test_inductor_takes_it() -> None:
    made = work(CASES[0], 577)
    with ops.use("triton"):
        difference(torch.compile(made.call, fullgraph=True)(), kernel(made), 0.0)


@each_case
def test_kernels_are_what_runs_here_by_default(case: OpCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to ask for them."""
    monkeypatch.delenv("VLM_BUDGET_KERNELS", raising=False)
    made = work(case, 111)
    assert ops.mode() == "auto"
    difference(made.call(), kernel(made), 0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_prompt_pass_waits_once_at_most(family: str, method: str) -> None:
    large = build(family, "tiny", DEVICE, torch.bfloat16)
    inputs = large.inputs(5, 2)
    with torch.no_grad(), vlm_budget.patch(large.model, method, 0.2):
        large.model(**inputs, logits_to_keep=1)
        torch.cuda.synchronize()
        found = count_waits(lambda: large.model(**inputs, logits_to_keep=1))
    assert found["ours"] <= 1, found["places"]
