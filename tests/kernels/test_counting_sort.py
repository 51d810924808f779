"""The order by cluster: both halves give torch's stable sort, without sorting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm_budget import ops
from vlm_budget.errors import KernelInputError
from vlm_budget.triton_kernels import counting_sort as module
from vlm_budget.triton_kernels.counting_sort import counting_sort_triton

SIZES = (1, 7, 63, 111, 577)
BOTH = pytest.mark.parametrize("which", ["reference", "triton"])


def draw(n: int, clusters: int, batch: int = 2, heads: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + clusters)
    return torch.randint(clusters, (batch, heads, n), generator=generator, dtype=torch.int32)


def by_hand(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Python's own stable sort, and a count of every cluster."""
    rows = labels.flatten(0, 1).tolist()
    order = [sorted(range(len(row)), key=lambda token: row[token]) for row in rows]
    sizes = [[row.count(cluster) for cluster in range(clusters)] for row in rows]
    shape = labels.shape[:2]
    return torch.tensor(order).int().view(labels.shape), torch.tensor(sizes).int().view(*shape, clusters)


def check(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == torch.int32 and torch.equal(own, other)


@BOTH
@pytest.mark.parametrize("clusters", [1, 5, 100])
@pytest.mark.parametrize("n", SIZES)
def test_the_order_is_that_of_a_stable_sort(n: int, clusters: int, which: Any) -> None:
    labels = draw(n, clusters)
    with ops.use(which):
        check(ops.counting_sort(labels, clusters), by_hand(labels, clusters))


@BOTH
def test_several_chunks(which: Any) -> None:
    labels = draw(2 * module.CHUNK + 333, 50, 1)
    with ops.use(which):
        check(ops.counting_sort(labels, 50), by_hand(labels, 50))


@BOTH
@pytest.mark.parametrize("clusters", [1000, 4096])
def test_more_clusters_than_tokens_and_most_of_them_empty(clusters: int, which: Any) -> None:
    labels = draw(577, clusters, 1)
    with ops.use(which):
        check(ops.counting_sort(labels, clusters), by_hand(labels, clusters))


@BOTH
@pytest.mark.parametrize("only", [0, 4, 9])
def test_one_cluster_may_have_all_tokens(only: int, which: Any) -> None:
    with ops.use(which):
        order, sizes = ops.counting_sort(torch.full((1, 2, 1500), only, dtype=torch.int32), 10)
    assert torch.equal(order, torch.arange(1500).int().expand(1, 2, -1))
    assert sizes.sum() == 3000 and (sizes[..., only] == 1500).all()


@BOTH
def test_clusters_that_keep_few_tokens_in_a_far_chunk(which: Any) -> None:
    """Chunks in which a cluster has no token still pass on where its later ones go."""
    labels = torch.zeros(1, 1, 5 * module.CHUNK + 3, dtype=torch.int32)
    labels[..., [5, 4 * module.CHUNK + 1]] = 2
    labels[..., -1] = 1
    with ops.use(which):
        check(ops.counting_sort(labels, 4), by_hand(labels, 4))


@BOTH
def test_many_chunks(which: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the scan takes at once."""
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "STEP", 8)
    labels = draw(16 * 40 + 5, 70, 1, 2)
    with ops.use(which):
        check(ops.counting_sort(labels, 70), by_hand(labels, 70))


@BOTH
def test_labels_outside_count_as_the_nearest(which: Any) -> None:
    labels = draw(111, 9) - 2
    with ops.use(which):
        check(ops.counting_sort(labels, 5), by_hand(labels.clamp(0, 4), 5))


@BOTH
def test_strided_labels(which: Any) -> None:
    labels = draw(111, 10)
    shared, apart = labels[:1, :1].expand(2, 3, -1), labels.transpose(1, 2).contiguous().transpose(1, 2)
    with ops.use(which):
        check(ops.counting_sort(apart, 10), by_hand(labels, 10))
        check(ops.counting_sort(shared, 10), by_hand(shared, 10))
        check(ops.counting_sort(labels[..., 1::2], 10), by_hand(labels[..., 1::2], 10))


@BOTH
def test_nothing_to_sort(which: Any) -> None:
    with ops.use(which):
        for shape in ((1, 2, 0), (0, 2, 7), (2, 0, 7)):
            order, sizes = ops.counting_sort(torch.zeros(shape, dtype=torch.int32), 3)
            assert order.shape == shape and sizes.shape == (*shape[:2], 3) and not sizes.any()


def test_the_kernel_sorts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a sort")

    labels = draw(111, 10)
    want = by_hand(labels, 10)
    for owner in (torch, torch.Tensor):
        for name in ("sort", "argsort", "topk"):
            monkeypatch.setattr(owner, name, refused)
    check(counting_sort_triton(labels, 10), want)


def test_compile_traces_past_the_operation() -> None:
    labels = draw(63, 10)

    @torch.compile(backend="eager", fullgraph=True)
    def found(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order, sizes = ops.counting_sort(labels + 0, 10)
        return order + 0, sizes + 0

    check(found(labels), by_hand(labels, 10))


@BOTH
@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [
        (torch.zeros(1, 2, 7), 3, "labels must be one of int32"),
        (torch.zeros(1, 2, 7, dtype=torch.long), 3, "labels must be one of int32"),
        (torch.zeros(2, 7, dtype=torch.int32), 3, r"labels must have shape \[any, any, any\]"),
        (torch.zeros(1, 2, 7, dtype=torch.int32), 0, "clusters must be at least 1, got 0"),
        (torch.zeros(1, 2, 7, dtype=torch.int32), -1, "clusters must lie between 0 and"),
    ],
)
def test_bad_input_is_refused(labels: torch.Tensor, clusters: int, message: str, which: Any) -> None:
    with ops.use(which), pytest.raises(KernelInputError, match=message):
        ops.counting_sort(labels, clusters)


def test_the_kernel_says_what_it_cannot_take() -> None:
    with pytest.raises(KernelInputError, match="65535 samples times heads, got 256 times 256"):
        counting_sort_triton(torch.zeros(256, 256, 1, dtype=torch.int32), 2)
    with pytest.raises(KernelInputError, match="contiguous along its last dimension"):
        counting_sort_triton(torch.zeros(1, 1, 8, dtype=torch.int32)[..., ::2], 2)
