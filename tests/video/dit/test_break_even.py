"""Where sparse attention begins to pay."""

import pytest
import torch

from vlm_budget.errors import OptionError
from vlm_budget.video.dit.break_even import BREAK_EVEN, BreakEven, Timing, crossing, fastest_dense, measure


def timing(tokens: int, speedup: float) -> Timing:
    return Timing(tokens, speedup, "FLASH", 1.0)


def test_the_crossing_lies_between_two_lengths_in_logarithms() -> None:
    assert crossing([timing(10_000, 0.5), timing(40_000, 2.0)]) == 20_000
    assert crossing([timing(10_000, 0.5), timing(20_000, 1.0), timing(40_000, 2.0)]) == 20_000


def test_a_length_that_wins_by_accident_before_one_that_loses_is_not_the_crossing() -> None:
    found = crossing([timing(1_000, 1.1), timing(10_000, 0.5), timing(40_000, 2.0)])
    assert found == 20_000


def test_sparse_attention_that_never_wins_has_no_crossing_and_one_that_always_wins_the_first_length() -> None:
    assert crossing([timing(1_000, 0.1), timing(2_000, 0.2)]) is None
    assert crossing([timing(1_000, 1.1), timing(2_000, 1.2)]) == 1_000
    assert "above 2,000" in str(BreakEven(None, (timing(2_000, 0.2),), "a card"))


def test_measuring_times_both_at_every_length_and_says_that_a_cpu_says_nothing() -> None:
    found = measure(heads=1, head_dim=16, density=0.5, device="cpu", dtype=torch.float32, lengths=(100, 200), steps=2)
    assert [one.tokens for one in found.timings] == [128, 256]  # whole rows of 64
    assert all(one.dense_ms > 0 and one.sparse_ms > 0 for one in found.timings)
    assert "without a GPU" in str(found)


def test_the_fastest_back_end_of_several_is_named() -> None:
    query = torch.randn(1, 1, 64, 16)
    milliseconds, name = fastest_dense(query, query, query, repeats=1)
    assert milliseconds > 0
    assert name in ("FLASH", "EFFICIENT", "MATH", "CUDNN")


@pytest.mark.parametrize("lengths", [(), (200, 100), (100, 100), (0, 5)])
def test_lengths_that_do_not_ascend_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="ascending"):
        measure(device="cpu", lengths=lengths)


def test_the_default_is_an_estimate_and_says_so() -> None:
    import inspect

    from vlm_budget.video.dit import break_even

    assert BREAK_EVEN == 24_000
    text = inspect.getsource(break_even).split("BREAK_EVEN = 24_000", 1)[1].split('"""')[1]
    assert "estimate, not a measurement" in text
