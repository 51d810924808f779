"""K-means assignment: the kernel finds what the reference finds, and the reference what plain distances say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm_budget import ops
from vlm_budget.errors import KernelInputError
from vlm_budget.triton_kernels import kmeans_assign as module
from vlm_budget.triton_kernels._launch import recorded
from vlm_budget.triton_kernels.kmeans_assign import kmeans_assign_reference, kmeans_assign_triton, require_points

SIZES = (1, 7, 63, 111, 577)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("which", ["reference", "triton"])


def draw(
    n: int, clusters: int, width: int = 32, dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiples of an eighth up to one: every order of adding gives the same, in every element type, and ties occur."""
    generator = torch.Generator().manual_seed(n + clusters)
    points = torch.randint(-8, 9, (batch, heads, n, width), generator=generator) / 8
    centroids = torch.randint(-8, 9, (batch, heads, clusters, width), generator=generator) / 8
    return points.to(dtype), centroids


def by_hand(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The first of the smallest distances; squares are exact, and roots of different ones differ."""
    apart = torch.cdist(points.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return apart.argmin(-1).int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_kernel_equals_reference_equals_distances(n: int, dtype: torch.dtype) -> None:
    for clusters in (1, 5, 130):
        points, centroids = draw(n, clusters, dtype=dtype, batch=1, heads=2)
        want = by_hand(points, centroids)
        assert torch.equal(kmeans_assign_reference(points, centroids), want)
        assert torch.equal(kmeans_assign_triton(points, centroids), want)


@BOTH
@pytest.mark.parametrize("width", [1, 16, 32, 64, 80, 96, 128])
def test_heads_of_any_width(width: int, which: Any) -> None:
    points, centroids = draw(63, 10, width, torch.bfloat16, heads=1)
    with ops.use(which):
        assert torch.equal(ops.kmeans_assign(points, centroids), by_hand(points, centroids))


@BOTH
@pytest.mark.parametrize("clusters", [1000, 4096])
def test_many_clusters(clusters: int, which: Any) -> None:
    points, centroids = draw(7, clusters, 16, batch=1, heads=1)
    with ops.use(which):
        assert torch.equal(ops.kmeans_assign(points, centroids), by_hand(points, centroids))


@BOTH
def test_ties_go_to_the_lower_index(which: Any) -> None:
    """Also across tiles of centroids."""
    points, centroids = draw(111, 40, batch=1)
    twice = torch.cat([centroids, centroids, torch.zeros_like(centroids), centroids.flip(2)], 2)
    with ops.use(which):
        label = ops.kmeans_assign(points, twice)
    assert torch.equal(label, by_hand(points, twice))
    assert (label < 120).all() and not ((label >= 40) & (label < 80)).any()


@BOTH
def test_strided_tokens(which: Any) -> None:
    """As attention has them: [B, L, H, D] transposed, parts of it, every other token, or channels apart."""
    points, centroids = draw(111, 10, 64)
    want = by_hand(points, centroids)
    transposed = points.transpose(1, 2).contiguous().transpose(1, 2)
    inside = torch.cat([points, points], -1)[..., :64]
    apart = points.transpose(2, 3).contiguous().transpose(2, 3)
    shared = points[:, :1].expand(-1, 3, -1, -1)
    with ops.use(which):
        for given in (transposed, inside, apart):
            assert torch.equal(ops.kmeans_assign(given, centroids), want)
        assert torch.equal(ops.kmeans_assign(points[:, :, ::2], centroids), want[:, :, ::2])
        assert torch.equal(ops.kmeans_assign(shared, centroids), by_hand(shared, centroids))


@BOTH
def test_samples_and_heads_do_not_see_each_other(which: Any) -> None:
    points, centroids = torch.randn(2, 3, 111, 32), torch.randn(2, 3, 10, 32)
    with ops.use(which):
        together = ops.kmeans_assign(points, centroids)
        for b in range(2):
            for h in range(3):
                one = slice(b, b + 1), slice(h, h + 1)
                assert torch.equal(ops.kmeans_assign(points[one], centroids[one]), together[one])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_centroids_are_rounded_to_the_points_type_first(dtype: torch.dtype, which: Any) -> None:
    """And so are the lengths that they are compared by: what is found is the nearest of the rounded ones."""
    points = torch.full((1, 1, 1, 16), 1.0, dtype=dtype)
    fine = 1 + torch.tensor([0.003, 0.001])  # bfloat16 has 1 and 1 + 1/128 only
    centroids = fine.view(1, 1, 2, 1).expand(-1, -1, -1, 16).contiguous()
    with ops.use(which):
        assert ops.kmeans_assign(points, centroids).item() == (0 if dtype == torch.bfloat16 else 1)


@BOTH
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_a_number_is_nobodys_and_goes_to_the_first(dtype: torch.dtype, which: Any) -> None:
    points, centroids = draw(63, 150, dtype=dtype, batch=1, heads=1)
    want = by_hand(points, centroids[:, :, 1:140]) + 1
    points[0, 0, 5, 3] = torch.nan
    want[0, 0, 5] = 0
    centroids[0, 0, 0, 2] = torch.nan
    centroids[0, 0, 140:] = torch.inf
    with ops.use(which):
        label = ops.kmeans_assign(points, centroids)
        nowhere = ops.kmeans_assign(points, torch.full_like(centroids, torch.nan))
    assert torch.equal(label, want)
    assert not nowhere.any()


@BOTH
def test_nothing_to_assign(which: Any) -> None:
    with ops.use(which):
        for shape in ((1, 2, 0, 32), (0, 2, 5, 32), (2, 0, 5, 32)):
            label = ops.kmeans_assign(torch.zeros(shape), torch.zeros(*shape[:2], 4, 32))
            assert label.shape == shape[:3] and label.dtype == torch.int32


def test_the_reference_works_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = draw(111, 10)
    monkeypatch.setattr(module, "ENTRIES", 500)
    assert torch.equal(kmeans_assign_reference(points, centroids), by_hand(points, centroids))


def test_the_matrix_of_distances_is_never_made() -> None:
    """Nothing that a launch is given, or gives, is of that size."""
    points, centroids = torch.zeros(1, 2, 4000, 16), torch.zeros(1, 2, 1000, 16)
    with recorded() as made:
        kmeans_assign_triton(points, centroids)
    given = [value for launch in made for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    assert given and all(tensor.numel() <= points.numel() for tensor in given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_finds_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = torch.randn(1, 2, 111, 64).to(dtype), torch.randn(1, 2, 130, 64)
    used = module._singles if dtype == torch.float32 else module._halves
    found = []
    for config in used.configs:
        assert module.MOST_COLUMNS % config.meta["COLUMNS"] == 0
        monkeypatch.setattr(used, "configs", (config,))
        found.append(kmeans_assign_triton(points, centroids))
    assert all(torch.equal(one, found[0]) for one in found)


def test_compile_traces_past_the_operation() -> None:
    points, centroids = draw(63, 10)

    @torch.compile(backend="eager", fullgraph=True)
    def labels(points: torch.Tensor) -> torch.Tensor:
        return ops.kmeans_assign(points * 1, centroids) + 0

    assert torch.equal(labels(points), ops.kmeans_assign(points, centroids))


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(2, 7, 32)}, r"points must have shape \[any, any, any, any\]"),
        ({"points": torch.zeros(1, 2, 7, 32, dtype=torch.int32)}, "points must be one of float32"),
        ({"centroids": torch.zeros(1, 2, 4, 32).half()}, "centroids must be one of float32"),
        ({"centroids": torch.zeros(1, 1, 4, 32)}, r"centroids must have shape \[1, 2, C, 32\].*got \[1, 1, 4, 32\]"),
        ({"centroids": torch.zeros(1, 2, 4, 16)}, r"centroids must have shape \[1, 2, C, 32\]"),
        ({"centroids": torch.zeros(1, 2, 0, 32)}, "C from 1 to 4096"),
        ({"centroids": torch.zeros(1, 2, 4097, 32)}, "C from 1 to 4096"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, which: Any) -> None:
    given = {"points": torch.zeros(1, 2, 7, 32), "centroids": torch.zeros(1, 2, 4, 32), **change}
    with ops.use(which), pytest.raises(KernelInputError, match=message):
        ops.kmeans_assign(**given)


def test_both_halves_refuse_several_devices() -> None:
    with pytest.raises(KernelInputError, match="one device, got points on cpu, centroids on meta"):
        require_points(torch.zeros(1, 2, 7, 32), torch.zeros(1, 2, 4, 32, device="meta"))


def test_the_kernel_says_what_it_cannot_take() -> None:
    with pytest.raises(KernelInputError, match="up to 128 channels, got 256.*VLM_BUDGET_KERNELS=auto"):
        kmeans_assign_triton(torch.zeros(1, 1, 7, 256), torch.zeros(1, 1, 2, 256))
    with pytest.raises(KernelInputError, match="65535 samples times heads"):
        kmeans_assign_triton(torch.zeros(1, 1, 1, 1).expand(256, 256, 1, 1), torch.zeros(256, 256, 1, 1))
    with pytest.raises(KernelInputError, match="points must be one of float32, bfloat16, float16"):
        kmeans_assign_triton(torch.zeros(1, 1, 7, 16).double(), torch.zeros(1, 1, 2, 16))
    assert ops.kmeans_assign(torch.ones(1, 1, 7, 256), torch.ones(1, 1, 2, 256)).shape == (1, 1, 7)
