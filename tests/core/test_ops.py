"""Shared operations, against a loop that takes its time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_budget.ops import segmented_topk


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
