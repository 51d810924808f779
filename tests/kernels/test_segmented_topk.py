"""Top-k per segment: the kernel takes what the reference takes, and the reference what a plain loop takes."""

import pytest
import torch

from vlm_budget.errors import KernelInputError, KernelUnavailableError, OptionError
from vlm_budget.ops import mode, segmented_topk, use
from vlm_budget.triton_kernels.segmented_topk import segmented_topk_reference, segmented_topk_triton

SIZES = (1, 7, 63, 111, 577, 2881)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INFINITY, NAN = float("inf"), float("nan")


def by_hand(scores: torch.Tensor, segment: torch.Tensor, counts: list[int]) -> list[int]:
    """Python's stable sort of every segment; not-a-number first."""
    values, taken = scores.tolist(), []
    members: dict[int, list[int]] = {}
    for index, own in enumerate(segment.tolist()):
        members.setdefault(own, []).append(index)
    for own, count in enumerate(counts):
        ranked = sorted(members.get(own, []), key=lambda i: (values[i] == values[i], -values[i]))
        taken += ranked[:count]
    return sorted(taken)


def draw(n: int, segments: int, dtype: torch.dtype, *, ties: bool) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(n + segments)
    scores = torch.randn(n, generator=generator)
    if ties:
        scores = (scores * 2).round() / 2
    segment = torch.randint(-1, segments, (n,), generator=generator)
    sizes = [int((segment == own).sum()) for own in range(segments)]
    counts = [int(torch.randint(0, size + 1, (), generator=generator)) for size in sizes]
    counts[0] = sizes[0]  # one segment stays whole
    if segments > 1:
        counts[1] = 0
    return scores.to(dtype), segment, counts


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_kernel_equals_reference_equals_loop(n: int, dtype: torch.dtype, ties: bool) -> None:
    for segments in (1, 5) if n > 111 else (1, 5, 20):
        scores, segment, counts = draw(n, segments, dtype, ties=ties)
        on_device, total = torch.tensor(counts), sum(counts)
        expected = by_hand(scores, segment, counts)
        assert segmented_topk_reference(scores, segment, on_device, total).tolist() == expected
        assert segmented_topk_triton(scores, segment, on_device, total).tolist() == expected


@pytest.mark.parametrize("run", [segmented_topk_reference, segmented_topk_triton])
def test_special_values_rank_as_torch_ranks_them(run) -> None:
    scores = torch.tensor([0.0, -0.0, NAN, -INFINITY, INFINITY, -1.0, -NAN, 1e-45, -1e-45, 3.4e38])
    segment = torch.zeros(len(scores), dtype=torch.long)
    order = scores.argsort(descending=True, stable=True)
    for count in range(len(scores) + 1):
        taken = run(scores, segment, torch.tensor([count]), count)
        assert taken.tolist() == order[:count].sort().values.tolist()


@pytest.mark.parametrize("run", [segmented_topk_reference, segmented_topk_triton])
def test_empty_segments_and_no_segments(run) -> None:
    scores, segment = torch.arange(5.0), torch.tensor([2, 2, -1, 4, 9])  # 9: a segment that has no count
    assert run(scores, segment, torch.tensor([0, 0, 1, 0, 1]), 2).tolist() == [1, 3]
    assert run(scores, segment, torch.zeros(0, dtype=torch.long), 0).tolist() == []
    assert run(scores[:0], segment[:0], torch.tensor([0]), 0).tolist() == []


@pytest.mark.parametrize("run", [segmented_topk_reference, segmented_topk_triton])
def test_segments_and_counts_beyond_32_bits_are_not_folded(run) -> None:
    scores, segment = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 2**32, -(2**32)])
    assert run(scores, segment, torch.tensor([2**32 + 1]), 1).tolist() == [0]
    assert run(scores, segment, torch.tensor([-1]), 1).tolist() == [-1]


@pytest.mark.parametrize("run", [segmented_topk_reference, segmented_topk_triton])
def test_counts_that_a_segment_cannot_meet_leave_slots_marked(run) -> None:
    scores, segment = torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1])
    assert run(scores, segment, torch.tensor([5, 0]), 4).tolist() == [0, 1, 2, -1]
    assert run(scores, segment, torch.tensor([3, 1]), 2).tolist() == [0, 1]  # more than promised: cut off


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_public_operation_takes_a_list_or_a_tensor(which) -> None:
    scores, segment, counts = draw(63, 4, torch.float32, ties=True)
    with use(which):
        listed = segmented_topk(scores, segment, counts)
        given = segmented_topk(scores, segment.int(), torch.tensor(counts, dtype=torch.int32), total=sum(counts))
    assert listed.tolist() == given.tolist() == by_hand(scores, segment, counts)


def test_strings_of_scores_far_apart_are_addressed() -> None:
    """Offsets are 64-bit: a view that begins beyond 2**31 elements of its storage is read where it lies."""
    whole = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    scores = whole[2**31 :]
    scores.copy_(torch.tensor([1, 5, 3, 5, 0, 2, 4, 6], dtype=torch.bfloat16))
    segment = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert segmented_topk_triton(scores, segment, torch.tensor([2, 1]), 3).tolist() == [1, 3, 7]


def test_compile_traces_past_the_operation() -> None:
    scores, segment, counts = draw(111, 3, torch.float32, ties=False)
    on_device = torch.tensor(counts)

    @torch.compile(backend="eager", fullgraph=True)
    def doubled(scores: torch.Tensor) -> torch.Tensor:
        return segmented_topk(scores * 2, segment, on_device, total=sum(counts)) + 0

    assert doubled(scores).tolist() == by_hand(scores, segment, counts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(4, dtype=torch.float64)}, "scores must be one of float32"),
        ({"segment": torch.zeros(4, dtype=torch.int16)}, "segment must be one of int64"),
        ({"scores": torch.zeros(8)[::2]}, "contiguous"),
        ({"scores": torch.zeros(2, 2)}, r"must have shape \[any\]"),
        ({"segment": torch.zeros(4, dtype=torch.long, device="meta")}, "one device"),
        ({"segment": torch.zeros(3, dtype=torch.long)}, "one segment per score"),
        ({"scores": torch.zeros(1).expand(2**31), "segment": torch.zeros(1).long().expand(2**31)}, "32 bits"),
    ],
)
def test_bad_input_is_refused(change, message) -> None:
    given = {"scores": torch.zeros(4), "segment": torch.zeros(4).long(), "counts": torch.tensor([1]), "total": 1}
    with pytest.raises(KernelInputError, match=message):
        segmented_topk_triton(**{**given, **change})


def test_counts_the_host_knows_are_checked() -> None:
    scores, segment = torch.zeros(4), torch.zeros(4).long()
    with pytest.raises(KernelInputError, match="cannot take 5 of 4"):
        segmented_topk(scores, segment, [5])
    with pytest.raises(KernelInputError, match="at least 0"):
        segmented_topk(scores, segment, [3, -1])
    with pytest.raises(KernelInputError, match="total="):
        segmented_topk(scores, segment, torch.tensor([1]))


def test_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode() == "auto"
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")
    assert mode() == "reference"
    with use("triton"):
        assert mode() == "triton"
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "tritn")
    with pytest.raises(OptionError, match="VLM_BUDGET_KERNELS must be one of auto, reference, triton, got 'tritn'"):
        segmented_topk(torch.zeros(2), torch.zeros(2).long(), [1])


def test_a_kernel_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU outside the interpreter, and without Triton, it raises."""
    from vlm_budget.triton_kernels import _launch

    monkeypatch.setattr(_launch.Kernel, "interpreted", property(lambda self: False))
    with use("triton"), pytest.raises(KernelUnavailableError, match="runs on CUDA devices"):
        segmented_topk(torch.zeros(2), torch.zeros(2).long(), [1])
    monkeypatch.setattr(_launch, "triton", None)
    with use("triton"), pytest.raises(KernelUnavailableError, match="needs Triton"):
        segmented_topk(torch.zeros(2), torch.zeros(2).long(), [1])
