"""Means of blocks: both halves give what a plain loop over the rows of every block gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretend_device import PretendDevice
from vlm_budget import ops
from vlm_budget.errors import KernelInputError
from vlm_budget.triton_kernels.block_means import block_means_triton, require_blocks

SIZES = (1, 7, 63, 111, 577)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("which", ["reference", "triton"])
TOLERANCE = {"atol": 2e-6, "rtol": 2e-6}
"""Of sums of up to some hundred numbers in float32, whatever type they come in."""


def draw(
    n: int, clusters: int, width: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values of two samples of two heads, an order of their own for each, and sizes of which some are 0."""
    generator = torch.Generator().manual_seed(n + clusters)
    values = torch.randn(2, 2, n, width, generator=generator).to(dtype)
    order = torch.rand(2, 2, n, generator=generator).argsort(-1).int()
    labels = torch.randint(-2, clusters, (2, 2, n), generator=generator).clamp_min(0)
    sizes = torch.zeros(2, 2, clusters, dtype=torch.int32)
    return values, order, sizes.scatter_add_(2, labels, torch.ones_like(order))


def by_hand(
    values: torch.Tensor, order: torch.Tensor | None, sizes: torch.Tensor, otherwise: torch.Tensor | None = None
) -> torch.Tensor:
    batch, heads, n, width = values.shape
    order = torch.arange(n) if order is None else order.long()
    order, sizes = order.expand(batch, heads, n), sizes.expand(batch, heads, -1)
    means = torch.zeros(batch, heads, sizes.shape[2], width) if otherwise is None else otherwise.clone()
    for b in range(batch):
        for h in range(heads):
            for block, rows in enumerate(order[b, h, : int(sizes[b, h].sum())].split(sizes[b, h].tolist())):
                if len(rows):
                    means[b, h, block] = values[b, h, rows].double().mean(0).float()
    return means


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_means_are_those_of_a_loop(n: int, dtype: torch.dtype, which: Any) -> None:
    for clusters in (1, 6):
        values, order, sizes = draw(n, clusters, dtype=dtype)
        otherwise = torch.randn(2, 2, clusters, 32)
        with ops.use(which):
            for given in ((order, sizes, otherwise), (order, sizes, None), (None, sizes, otherwise)):
                means = ops.block_means(values, *given)
                assert means.dtype == torch.float32 and means.is_contiguous()
                torch.testing.assert_close(means, by_hand(values, *given), **TOLERANCE)


@BOTH
@pytest.mark.parametrize("width", [1, 16, 32, 64, 80, 96, 128, 300])
def test_heads_of_any_width(width: int, which: Any) -> None:
    values, order, sizes = draw(111, 7, width)
    with ops.use(which):
        torch.testing.assert_close(ops.block_means(values, order, sizes), by_hand(values, order, sizes), **TOLERANCE)


@BOTH
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 2)])
def test_samples_and_heads_may_share_orders_and_sizes(batch: int, heads: int, which: Any) -> None:
    values, order, sizes = draw(111, 5)
    with ops.use(which):
        for given in ((order[:batch, :heads], sizes), (order, sizes[:batch, :heads])):
            torch.testing.assert_close(ops.block_means(values, *given), by_hand(values, *given), **TOLERANCE)


@BOTH
def test_an_empty_block_has_what_it_is_given(which: Any) -> None:
    values, otherwise = torch.randn(1, 1, 7, 16), torch.randn(1, 1, 4, 16)
    sizes = torch.tensor([[[0, 7, 0, 0]]], dtype=torch.int32)
    with ops.use(which):
        means = ops.block_means(values, None, sizes, otherwise)
        bare = ops.block_means(values, None, sizes)
    assert torch.equal(means[0, 0, [0, 2, 3]], otherwise[0, 0, [0, 2, 3]])
    assert not bare[0, 0, [0, 2, 3]].any() and torch.equal(bare[0, 0, 1], means[0, 0, 1])


@BOTH
def test_rows_behind_the_last_block_count_for_none_and_missing_ones_are_not_read(which: Any) -> None:
    values = torch.arange(10.0).view(1, 1, 10, 1).repeat(1, 1, 1, 16)
    values[:, :, 8:] = torch.nan
    order = torch.arange(10).flip(0).view(1, 1, 10).int()
    with ops.use(which):
        few = ops.block_means(values, None, torch.tensor([[[3, 5]]]).int())
        many = ops.block_means(values[:, :, :8], None, torch.tensor([[[3, 9, 4]]]).int())
        back = ops.block_means(values[:, :, :8], order[..., 2:], torch.tensor([[[2, 3]]]).int())
    assert few[0, 0, :, 0].tolist() == [1, 5]
    assert many[0, 0, :, 0].tolist() == [1, 5, 0]
    assert back[0, 0, :, 0].tolist() == [6.5, 4]


@BOTH
def test_what_is_not_a_number_stays_in_its_block(which: Any) -> None:
    values, order, sizes = draw(111, 5)
    clean = by_hand(values, order, sizes)
    values[0, 0, order[0, 0, 0], 3] = torch.nan
    with ops.use(which):
        means = ops.block_means(values, order, sizes)
    assert means.isnan().sum() == 1 and means[0, 0, 0, 3].isnan()
    torch.testing.assert_close(means.nan_to_num(7), torch.where(means.isnan(), 7.0, clean), **TOLERANCE)


@BOTH
def test_strided_tokens(which: Any) -> None:
    values, order, sizes = draw(111, 4, 64)
    with ops.use(which):
        want = ops.block_means(values, order, sizes)
        for given in (
            values.transpose(1, 2).contiguous().transpose(1, 2),
            torch.cat([values, values], -1)[..., :64],
            values.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            assert torch.equal(ops.block_means(given, order, sizes), want)
        apart = torch.stack([order, order], -1)[..., 0]
        assert torch.equal(ops.block_means(values, apart, sizes), want)


def test_the_same_bits_whatever_else_is_in_the_call() -> None:
    """Sums of the kernel depend on the block alone."""
    values, order, sizes = draw(577, 5)
    together = block_means_triton(values, order, sizes, None)
    assert torch.equal(block_means_triton(values, order, sizes, None), together)
    alone = block_means_triton(values[1:, 1:], order[1:, 1:], sizes[1:, 1:], None)
    assert torch.equal(alone, together[1:, 1:])


@BOTH
def test_one_step_of_k_means(which: Any) -> None:
    """Assignment, order and means together give every cluster the mean of its members, and empty ones keep theirs."""
    points, _, _ = draw(577, 1)
    centroids = torch.cat([points[:, :, :9], torch.full((2, 2, 2, 32), 99.0)], 2)
    with ops.use(which):
        labels = ops.kmeans_assign(points, centroids)
        order, sizes = ops.counting_sort(labels, 11)
        means = ops.block_means(points, order, sizes, centroids)
    assert (sizes[..., :9] > 0).all() and not sizes[..., 9:].any()
    members = torch.nn.functional.one_hot(labels.long(), 11).double()
    want = members.mT @ points.double() / members.sum(2)[..., None]
    torch.testing.assert_close(means[:, :, :9], want[:, :, :9].float(), **TOLERANCE)
    assert torch.equal(means[:, :, 9:], centroids[:, :, 9:])


@pytest.mark.skipif(torch.version.cuda is None, reason=f"torch {torch.__version__} is built without CUDA")
def test_no_reference_of_a_step_makes_the_host_wait() -> None:
    points = torch.randn(1, 2, 63, 16)
    with PretendDevice() as device, ops.use("reference"):
        there = points.to("cuda")
        with device.watch() as waits:
            labels = ops.kmeans_assign(there, there[:, :, :5].contiguous())
            order, sizes = ops.counting_sort(labels, 5)
            means = ops.block_means(there, order, sizes)
            (taken,) = ops.permute_tokens([there], [order])
            back = ops.unpermute_tokens(taken, order)
        assert not waits
        assert means.is_cuda and torch.equal(back.cpu(), points)


@BOTH
def test_nothing_to_average(which: Any) -> None:
    with ops.use(which):
        for shape in ((1, 2, 0, 32), (0, 2, 5, 32)):
            sizes = torch.zeros(shape[0], 2, 3, dtype=torch.int32)
            means = ops.block_means(torch.zeros(shape), None, sizes)
            assert means.shape == (*shape[:2], 3, 32) and not means.any()
        assert ops.block_means(torch.ones(1, 1, 5, 8), None, torch.zeros(1, 1, 0).int()).shape == (1, 1, 0, 8)


def test_compile_traces_past_the_operation() -> None:
    values, order, sizes = draw(63, 10)

    @torch.compile(backend="eager", fullgraph=True)
    def found(values: torch.Tensor) -> torch.Tensor:
        return ops.block_means(values * 1, order, sizes) + 0

    assert torch.equal(found(values), ops.block_means(values, order, sizes))


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 7, 32)}, r"values must have shape \[any, any, any, any\]"),
        ({"values": torch.zeros(1, 2, 7, 32, dtype=torch.int32)}, "values must be one of float32"),
        ({"order": torch.zeros(1, 2, 7, dtype=torch.long)}, "order must be one of int32"),
        ({"order": torch.zeros(1, 2, 8, dtype=torch.int32)}, r"order must have shape \[1 or 1, 2 or 1, 7\]"),
        ({"order": torch.zeros(2, 2, 7, dtype=torch.int32)}, "order must have shape"),
        ({"sizes": torch.zeros(1, 3, 4, dtype=torch.int32)}, r"sizes must have shape \[1 or 1, 2 or 1, any\]"),
        ({"sizes": torch.zeros(1, 2, 4)}, "sizes must be one of int32"),
        ({"otherwise": torch.zeros(1, 2, 5, 32)}, r"otherwise must have shape \[1, 2, 4, 32\]"),
        ({"otherwise": torch.zeros(1, 2, 4, 32).half()}, "otherwise must be one of float32"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, which: Any) -> None:
    sizes, order = torch.zeros(1, 2, 4, dtype=torch.int32), torch.zeros(1, 2, 7, dtype=torch.int32)
    given = {"values": torch.zeros(1, 2, 7, 32), "order": order, "sizes": sizes, "otherwise": None, **change}
    with ops.use(which), pytest.raises(KernelInputError, match=message):
        ops.block_means(**given)


def test_both_halves_refuse_several_devices() -> None:
    values, sizes = torch.zeros(1, 2, 7, 32), torch.zeros(1, 2, 4, dtype=torch.int32)
    with pytest.raises(KernelInputError, match="one device, got values on cpu, sizes on meta"):
        require_blocks(values, None, sizes.to("meta"), None)


def test_the_kernel_says_what_it_cannot_take() -> None:
    sizes = torch.zeros(1, 1, 2, dtype=torch.int32)
    for values, message in (
        (torch.zeros(1, 1, 7, 16).double(), "values must be one of float32, bfloat16, float16"),
        (torch.zeros(1, 1, 7, 32)[..., ::2], "contiguous along its last dimension"),
        (torch.zeros(1, 1, 7, 1025), "up to 1024 channels, got 1025"),
    ):
        with pytest.raises(KernelInputError, match=message):
            block_means_triton(values, None, sizes, None)
