"""Shared operations: top-k against a loop that takes its time, and what holds for all of them."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretend_device import PretendDevice
from vlm_budget import greedy, ops
from vlm_budget.errors import KernelInputError
from vlm_budget.ops import dispatch, segmented_topk
from vlm_budget.transfer import moved


def slowly(scores: list[float], segment: list[int], counts: list[int]) -> list[int]:
    kept: list[int] = []
    for name, count in enumerate(counts):
        members = [i for i, s in enumerate(segment) if s == name]
        kept += sorted(members, key=lambda i: (-scores[i], i))[:count]
    return sorted(kept)


@given(st.data(), st.integers(1, 5), st.sampled_from([1, 7, 63, 111]))
def test_segmented_topk_equals_sorting_every_segment(data: st.DataObject, segments: int, length: int) -> None:
    segment = data.draw(st.lists(st.integers(-1, segments - 1), min_size=length, max_size=length))
    levels = st.sampled_from([-torch.inf, -1.0, 0.0, 0.25, 0.5, 1.0])  # few levels, so that ties abound
    scores = data.draw(st.lists(levels, min_size=length, max_size=length))
    counts = [data.draw(st.integers(0, segment.count(name))) for name in range(segments)]
    kept = segmented_topk(torch.tensor(scores), torch.tensor(segment), counts)
    assert kept.dtype == torch.long
    assert kept.tolist() == slowly(scores, segment, counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ties_go_to_the_lower_index_in_every_dtype(dtype: torch.dtype) -> None:
    segment = torch.arange(577) % 3
    kept = segmented_topk(torch.full((577,), 0.5, dtype=dtype), segment, [5, 0, 2])
    assert kept.tolist() == [0, 2, 3, 5, 6, 9, 12]


def test_outsiders_are_never_taken_however_high_they_score() -> None:
    scores = torch.tensor([9.0, 1.0, 9.0, 2.0])
    assert segmented_topk(scores, torch.tensor([-1, 0, -1, 0]), [2]).tolist() == [1, 3]


# --- other devices ---------------------------------------------------------------------------------------------------

pretended = pytest.mark.skipif(
    torch.version.cuda is None,
    reason=f"torch {torch.__version__} is built without CUDA, so that it cannot even pretend (Linux wheels can)",
)


@pretended
@pytest.mark.parametrize("scores_on", ["cpu", "cuda"])
@pytest.mark.parametrize("segment_on", ["cpu", "cuda"])
@pytest.mark.parametrize("counts_on", [None, "cpu", "cuda"])
def test_scores_segments_and_counts_may_be_on_different_devices(
    scores_on: str, segment_on: str, counts_on: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")
    scores, segment, counts = torch.rand(63), torch.arange(63) // 21, [1, 7, 5]
    expected = segmented_topk(scores, segment, counts)
    with PretendDevice():
        given: Any = counts if counts_on is None else torch.tensor(counts).to(counts_on)
        found = segmented_topk(scores.to(scores_on), segment.to(segment_on), given, sum(counts))
        assert found.device.type == scores_on
        assert torch.equal(found.cpu(), expected)


@pretended
def test_the_host_waits_for_a_copy_to_itself_and_for_none_to_cuda() -> None:
    numbers = torch.arange(7)
    with PretendDevice() as device:
        with device.watch() as waits:
            there = moved(numbers, torch.device("cuda", 0))
        assert not waits
        assert torch.equal(moved(there, torch.device("cpu")), numbers)


@pytest.mark.parametrize(("kind", "waits"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_copies_to_other_devices_are_waited_for(kind: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: asked.append(kwargs) or tensor)
    moved(torch.ones(1), torch.device(kind))
    assert asked == [{"non_blocking": not waits}]


# --- autocast --------------------------------------------------------------------------------------------------------


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


ROWS, KEYS, QUALITY, ANCHORS = numbers(63, 32), 3 * numbers(63, 24), numbers(63), torch.arange(0, 63, 4)
QUERY, HEADS = 3 * numbers(1, 4, 5, 16), numbers(1, 2, 50, 16)
KEEP = torch.arange(14).reshape(2, 7) % 3 > 0
INDEX, VALID, _ = ops.compaction_index(KEEP, 5, False)
OWNERS = torch.arange(63) % 7
TOKENS, SHUFFLED = numbers(1, 2, 50, 16), (torch.arange(50).int() * 7 % 50).expand(1, 2, -1)
CALLS: dict[str, Callable[[], Any]] = {
    "assign": lambda: ops.assign(KEYS, ANCHORS),
    "assigned_merge": lambda: ops.assigned_merge(ROWS, OWNERS, QUALITY, 7),
    "attention_rows": lambda: ops.attention_rows(QUERY, HEADS, 0.25),
    "block_means": lambda: ops.block_means(TOKENS, SHUFFLED, torch.full((1, 1, 5), 10).int()),
    "block_map": lambda: ops.block_map(QUERY, QUERY, torch.full((1, 1, 5), 10).int(), 0.25, top_p=0.5),
    "block_sparse_attention": lambda: ops.block_sparse_attention(
        *(TOKENS, TOKENS, TOKENS, torch.tensor([[[50]]]).int(), torch.full((1, 1, 5), 10).int()),
        torch.arange(5).reshape(1, 1, 1, 5) % 2 > 0,
        scale=0.25,
    ),
    "compact": lambda: ops.compact(numbers(2, 7, 8), INDEX, VALID, KEEP)[0],
    "compaction_index": lambda: ops.compaction_index(KEEP, 5, True),
    "counting_sort": lambda: ops.counting_sort(SHUFFLED // 5, 10),
    "greedy_diversity": lambda: ops.greedy_diversity(ROWS, 40),
    "greedy_dpp": lambda: ops.greedy_dpp(ROWS, QUALITY, 40),
    "kmeans_assign": lambda: ops.kmeans_assign(TOKENS, HEADS[:, :, :7].contiguous()),
    "nearest": lambda: ops.nearest(KEYS, ANCHORS, 5),
    "permute_tokens": lambda: ops.permute_tokens([TOKENS, HEADS], [SHUFFLED, SHUFFLED]),
    "quota": lambda: ops.quota(40, QUALITY.exp(), torch.full((63,), 2)),
    "received_attention": lambda: ops.received_attention(QUERY, HEADS, 0.25),
    "segmented_topk": lambda: segmented_topk(QUALITY, OWNERS, [3] * 7),
    "softmax_merge": lambda: ops.softmax_merge(ROWS, KEYS, ANCHORS, 0.1),
    "take_columns": lambda: ops.take_columns(numbers(2, 7, 8), INDEX),
    "unpermute_tokens": lambda: ops.unpermute_tokens(TOKENS, SHUFFLED),
    "weighted_merge": lambda: ops.weighted_merge(ROWS, ANCHORS.reshape(4, 4), numbers(4, 4)),
    "max_min": lambda: greedy.max_min(greedy.CosineRows(ROWS), 40),
    "map_dpp": lambda: greedy.map_dpp(greedy.CosineRows(ROWS), QUALITY, 40),
    "max_coverage": lambda: greedy.max_coverage(KEYS.abs(), 10),
}


def test_every_operation_is_called_here() -> None:
    public = {name for name, value in vars(ops).items() if inspect.isfunction(value)}
    operations = public - {name for name in public if getattr(ops, name).__module__ == dispatch.__name__}
    assert operations - {name for name in operations if name.startswith("_")} <= set(CALLS)
    assert "softmax_merge" in operations


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_no_bit_of_an_operation(name: str) -> None:
    expected = CALLS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        found = CALLS[name]()
    expected, found = ((each,) if isinstance(each, torch.Tensor) else each for each in (expected, found))
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("name", ["assigned_merge", "softmax_merge", "weighted_merge"])
def test_autocast_changes_no_bit_of_a_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = ROWS.clone().requires_grad_()
    monkeypatch.setitem(globals(), "ROWS", leaf)
    (expected,) = torch.autograd.grad(CALLS[name]().square().sum(), leaf)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(CALLS[name]().square().sum(), leaf)
    assert torch.equal(found, expected) and found.dtype == torch.float32


# --- which half runs -------------------------------------------------------------------------------------------------


def test_left_to_choose_no_kernel_runs_on_nothing_or_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert not ops.runs_kernel()
    assert not ops.runs_kernel(None, None)
    assert not ops.runs_kernel(ROWS)
    with ops.use("triton"):
        assert ops.runs_kernel() and ops.runs_kernel(None)


def test_a_triton_that_cannot_be_imported_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    able = dispatch._able.__wrapped__
    monkeypatch.setattr(dispatch, "tl", object())
    assert able(0)
    monkeypatch.setattr(dispatch, "tl", None)
    assert not able(0)


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_both_halves_refuse_the_same(which: ops.Mode) -> None:
    """Element types and shapes are told before anything runs."""
    features = torch.randn(7, 4)
    anchors, whole = torch.tensor([0, 1]), torch.zeros(7, 4, dtype=torch.int8)
    calls = [
        lambda: ops.nearest(whole, anchors, 2),
        lambda: ops.nearest(features, anchors.int(), 2),
        lambda: ops.assign(whole, anchors),
        lambda: ops.greedy_diversity(whole, 2),
        lambda: ops.greedy_diversity(features, 2, seed=torch.tensor(0.0)),
        lambda: ops.weighted_merge(whole, torch.zeros(2, 1).long(), torch.ones(2, 1)),
        lambda: ops.weighted_merge(features, torch.zeros(2, 1), torch.ones(2, 1)),
        lambda: ops.assigned_merge(features, torch.zeros(7), torch.ones(7), 2),
        lambda: ops.softmax_merge(whole, features, anchors, 1.0),
        lambda: ops.take_columns(features[None], torch.zeros(1, 2)),
        lambda: ops.attention_rows(whole[None, None], whole[None, None], 1.0),
        lambda: ops.received_attention(whole[None, None], whole[None, None], 1.0),
        lambda: ops.segmented_topk(features, torch.zeros(7).long(), [1]),
        lambda: ops.segmented_topk(features[:, 0], torch.zeros(6).long(), [1]),
        lambda: ops.segmented_topk(features[:, 0], torch.zeros(7), [1]),
        lambda: ops.quota(3, torch.ones(2), torch.ones(2)),
    ]
    with ops.use(which):
        for number, call in enumerate(calls):
            with pytest.raises(KernelInputError):
                call()
                pytest.fail(f"call {number} was taken")


def test_tensors_on_several_devices_are_refused_by_both_halves() -> None:
    """Asked below torch's dispatcher, which takes tensors without memory (``meta``) to the fake kernel."""
    run = ops.greedy_dpp.__globals__["_operator"]._init_fn
    for which in ("reference", "triton"):
        with ops.use(which), pytest.raises(KernelInputError, match="features on cpu, log_quality on meta"):
            run(torch.randn(1, 7, 4), torch.zeros(1, 7, device="meta"), 2)
