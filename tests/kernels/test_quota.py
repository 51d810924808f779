"""The split on the device is the host's split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_budget.allocate import split
from vlm_budget.errors import KernelInputError
from vlm_budget.ops import quota, use
from vlm_budget.triton_kernels.quota import MOST, quota_reference, quota_triton

RUNS = [quota_reference, quota_triton]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("n", [1, 7, 63, 111, 577])
def test_whole_weights_split_as_on_the_host(run, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    for draw in range(3 if n < 100 else 1):
        weights = torch.randint(0, 9, (n,), generator=generator).double()
        caps = torch.randint(0, 40, (n,), generator=generator)
        for total in {0, int(caps.sum()) // (draw + 2), *([int(caps.sum())] if n < 100 else [])}:
            expected = split(total, weights.tolist(), caps.tolist())
            assert run(total, weights, caps).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 3000)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_any_whole_weights_split_as_on_the_host(shares: list[tuple[int, int]], part: float) -> None:
    """Weights of up to 20 bits beside a power of two: rounding to 30 bits changes none of them."""
    weights, caps = [w for w, _ in shares] + [2**20], [cap for _, cap in shares] + [5]
    total = round(part * sum(caps))
    for run in RUNS:
        found = run(total, torch.tensor(weights, dtype=torch.float64), torch.tensor(caps)).tolist()
        assert found == split(total, weights, caps)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_real_weights_split_as_on_the_host(run, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (5, 60, 200):
        weights = torch.rand(n, generator=generator).to(dtype)
        caps = torch.full((n,), 576)
        total = 576 * n // 5
        assert run(total, weights, caps).tolist() == split(total, weights.tolist(), caps.tolist())


@pytest.mark.parametrize("run", RUNS)
def test_ties_go_to_the_earlier_share_and_what_is_full_passes_on(run) -> None:
    assert run(5, torch.ones(3), torch.tensor([9, 9, 9])).tolist() == [2, 2, 1]
    assert run(9, torch.tensor([4.0, 1.0, 1.0]), torch.tensor([2, 9, 9])).tolist() == [2, 4, 3]
    assert run(6, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3, 1, 4])).tolist() == [3, 1, 2]
    assert run(4, torch.zeros(3), torch.tensor([1, 4, 3])).tolist() == split(4, [0, 0, 0], [1, 4, 3])
    assert run(7, torch.tensor([1e-30, 1.0]), torch.tensor([9, 3])).tolist() == [4, 3]


@pytest.mark.parametrize("run", RUNS)
def test_what_is_not_a_weight_counts_as_none(run) -> None:
    weights = torch.tensor([float("nan"), -1.0, float("inf"), 2.0])
    assert run(5, weights, torch.tensor([5, 5, 5, 3])).tolist() == split(5, [0, 0, 0, 2], [5, 5, 5, 3])


@pytest.mark.parametrize("run", RUNS)
def test_more_than_fits_fills_every_share(run) -> None:
    assert run(100, torch.tensor([1.0, 0.0]), torch.tensor([3, 4])).tolist() == [3, 4]
    assert run(0, torch.ones(2), torch.tensor([3, 4])).tolist() == [0, 0]
    assert run(3, torch.ones(0), torch.ones(0, dtype=torch.long)).tolist() == []
    assert quota(3, torch.ones(0), torch.ones(0, dtype=torch.int32)).tolist() == []


def test_as_many_shares_as_fit_and_one_more() -> None:
    weights, caps = torch.arange(MOST).float(), torch.full((MOST,), 3)
    assert quota_triton(999, weights, caps).tolist() == split(999, weights.tolist(), caps.tolist())
    with pytest.raises(KernelInputError, match=f"at most {MOST} shares, got {MOST + 1}"):
        quota_triton(1, torch.ones(MOST + 1), torch.ones(MOST + 1).long())


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_public_operation(which) -> None:
    with use(which):
        assert quota(5, torch.ones(3), torch.tensor([9, 9, 9], dtype=torch.int32)).tolist() == [2, 2, 1]
        with pytest.raises(KernelInputError, match="total must lie between 0"):
            quota(-1, torch.ones(3), torch.ones(3).long())
        with pytest.raises(KernelInputError, match=r"must have shape \[3\]"):
            quota(1, torch.ones(3), torch.ones(2).long())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, torch.ones(2, dtype=torch.int32), torch.ones(2).long()), "weights must be one of float64"),
        ((1, torch.ones(2), torch.ones(2)), "caps must be one of int64"),
        ((1, torch.ones(2), torch.ones(2, device="meta").long()), "one device"),
        ((2**31, torch.ones(2), torch.ones(2).long()), "32 bits"),
        ((1, torch.ones(2), torch.ones(4).long()[::2]), "contiguous"),
    ],
)
def test_bad_input_is_refused(given, message) -> None:
    with pytest.raises(KernelInputError, match=message):
        quota_triton(*given)
