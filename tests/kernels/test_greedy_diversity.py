"""Max-min diversity: the kernel chooses what the reference chooses, and the reference what a plain loop does."""

import importlib

import pytest
import torch

import synthetic_items as make
from vlm_budget.errors import KernelInputError, KernelUnavailableError
from vlm_budget.greedy import CosineRows, max_min, unit_rows
from vlm_budget.ops import greedy_diversity, use
from vlm_budget.pruners.divprune import DivPrune
from vlm_budget.triton_kernels import greedy_diversity as module
from vlm_budget.triton_kernels.greedy_diversity import greedy_diversity_reference, greedy_diversity_triton

# Tokens, and how many to choose: the interpreter takes a millisecond or so per choice.
SIZES = ((1, 1), (7, 7), (63, 63), (111, 40), (577, 24), (1500, 8), (2881, 8))
HALVES = (torch.bfloat16, torch.float16)
INFINITY, NAN = float("inf"), float("nan")


def draw(n: int, width: int = 24, groups: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + width)
    return torch.randn(groups, n, width, generator=generator).to(dtype)


def places(n: int, dimensions: int = 3, groups: int = 1) -> torch.Tensor:
    return torch.rand(groups, n, dimensions, generator=torch.Generator().manual_seed(n)) * 4


def table(features: torch.Tensor | None, xyz: torch.Tensor | None, seed: int, weight: float) -> torch.Tensor:
    """[n, n] distances in float64, by the formula; rows of one group."""
    if features is not None:
        unit = unit_rows(features.double())
        cosine = 1 - unit @ unit.T
        if xyz is None:
            return cosine
    assert xyz is not None
    spatial = (xyz.double()[:, None] - xyz.double()[None]).square().sum(-1).sqrt()
    spatial = torch.where(spatial < INFINITY, spatial, 0.0)
    if features is None:
        return spatial
    return weight * spatial / max(float(spatial[seed].max()), 1e-6) + (1 - weight) * cosine


def by_hand(distance: torch.Tensor, first: int, k: int) -> list[int]:
    """One by one; Python's max takes the lower index of equals."""
    chosen = [first]
    while len(chosen) < k:
        left = [token for token in range(len(distance)) if token not in chosen]
        nearest = distance[:, chosen].amin(1).tolist()
        chosen.append(max(left, key=lambda token: nearest[token]))
    return chosen[:k]


def shortfall(distance: torch.Tensor, chosen: list[int]) -> float:
    """The most by which any choice but the first falls short of the best one at its step."""
    worst, left = 0.0, torch.ones(len(distance), dtype=torch.bool)
    for step, token in enumerate(chosen):
        if step:
            nearest = distance[:, chosen[:step]].amin(1)
            worst = max(worst, float(nearest[left].max() - nearest[token]))
        assert left[token], "chosen twice"
        left[token] = False
    return worst


# --- kernel and reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_kernel_equals_reference_equals_loop_by_cosine(n: int, k: int) -> None:
    features = draw(n)
    for count in {1, k // 2 or 1, k} if n < 200 else {k}:
        expected = greedy_diversity_reference(features, None, None, count, 0.5)
        assert torch.equal(greedy_diversity_triton(features, None, None, count, 0.5), expected)
    if n < 200:
        distance = table(features[0], None, 0, 0.0)
        alone = distance.clone().fill_diagonal_(INFINITY).amin(1).tolist()
        slow = by_hand(distance, alone.index(max(alone)), k)
        assert greedy_diversity(features[0], k).tolist() == max_min(CosineRows(features[0]), k).tolist() == slow


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_kernel_equals_reference_equals_loop_with_coordinates(n: int, k: int, weight: float) -> None:
    features, xyz, seed = draw(n), places(n), n // 2
    first = torch.tensor([seed])
    for both in (features, None) if weight == 1.0 else (features,):
        expected = greedy_diversity_reference(both, xyz, first, k, weight)
        assert torch.equal(greedy_diversity_triton(both, xyz, first, k, weight), expected)
        if n < 200:
            distance = table(None if both is None else both[0], xyz[0], seed, weight)
            assert expected[0].tolist() == by_hand(distance, seed, k)


@pytest.mark.parametrize("dimensions", [1, 2, 4])
def test_points_of_one_to_four_coordinates(dimensions: int) -> None:
    xyz, first = places(63, dimensions), torch.tensor([5])
    chosen = greedy_diversity_triton(None, xyz, first, 20, 0.5)
    assert chosen[0].tolist() == by_hand(table(None, xyz[0], 5, 0.5), 5, 20)
    assert torch.equal(chosen, greedy_diversity_reference(None, xyz, first, 20, 0.5))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_halves_choose_the_farthest_within_rounding(n: int, k: int, dtype: torch.dtype) -> None:
    """The kernel scales products where the reference multiplies unit vectors: near-ties may go either way, no more.

    At every step, given what the kernel chose before, the distance of its choice is within 1e-5 of the best, by
    distances in float64 of the same rounded features.
    """
    features, xyz, seed = draw(n, dtype=dtype), places(n), torch.tensor([n // 3])
    distance = table(features[0], None, 0, 0.0)
    chosen = greedy_diversity_triton(features, None, None, k, 0.5)[0].tolist()
    assert shortfall(distance, chosen) < 1e-5
    apart = distance.clone().fill_diagonal_(INFINITY).amin(1)
    assert n == 1 or float(apart.max() - apart[chosen[0]]) < 1e-5
    fused = greedy_diversity_triton(features, xyz.to(dtype), seed, k, 0.4)[0].tolist()
    assert fused[0] == n // 3
    assert shortfall(table(features[0], xyz[0].to(dtype), n // 3, 0.4), fused) < 1e-5
    if n <= 577:  # no near-ties there: the same choice
        assert chosen == greedy_diversity_reference(features, None, None, k, 0.5)[0].tolist()


def test_the_measure_of_near_ties_sees_a_worse_choice() -> None:
    distance = table(draw(63)[0], None, 0, 0.0)
    chosen = by_hand(distance, 3, 20)
    assert shortfall(distance, chosen) == 0
    chosen[7], chosen[19] = chosen[19], chosen[7]
    assert shortfall(distance, chosen) > 1e-4


# --- ties and strange rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_equal_distances_go_to_the_lower_index(dtype: torch.dtype) -> None:
    axes = torch.eye(6, dtype=dtype)
    with use("triton"):
        assert greedy_diversity(axes, 6).tolist() == list(range(6))
        # Every token has a twin at distance 0, so that all seeds tie; and one axis is there in many lengths.
        assert greedy_diversity(torch.cat([axes, axes * 2]), 12).tolist() == list(range(12))
        assert greedy_diversity(axes[:1].expand(63, 6) * torch.ones(63, 1, dtype=dtype), 63).tolist() == list(range(63))
        corners = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2]], dtype=dtype).repeat(2, 1)
        assert greedy_diversity(None, 8, xyz=corners, seed=1).tolist() == [1, 2, 3, 0, 4, 5, 6, 7]


def test_ties_across_blocks_go_to_the_lower_index() -> None:
    """4,096 tokens are one block of the kernel for coordinates: 5,000 are two."""
    xyz = torch.zeros(1, 5000, 3)
    xyz[0, 4990], xyz[0, 17] = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    xyz[0, 4095:4097] = torch.tensor([0.0, 1.0, 0.0])
    first = torch.tensor([4999])
    assert greedy_diversity_triton(None, xyz, first, 6, 0.5).tolist() == [[4999, 17, 4095, 4990, 0, 1]]
    assert greedy_diversity_reference(None, xyz, first, 6, 0.5).tolist() == [[4999, 17, 4095, 4990, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_rows_without_a_finite_direction_have_cosine_zero(dtype: torch.dtype) -> None:
    features = draw(40, dtype=dtype)
    features[0, 3], features[0, 4], features[0, 5, 0], features[0, 6, 1] = 0.0, NAN, INFINITY, -INFINITY
    clean = features.clone()
    clean[0, 3:7] = 0.0
    for seed in (None, torch.tensor([4]), torch.tensor([11])):
        expected = greedy_diversity_reference(clean, None, seed, 40, 0.5)
        assert torch.equal(greedy_diversity_reference(features, None, seed, 40, 0.5), expected)
        assert torch.equal(greedy_diversity_triton(features, None, seed, 40, 0.5), expected)


def test_all_rows_without_direction_are_chosen_in_order() -> None:
    for value in (0.0, NAN, INFINITY):
        for dtype in (torch.float32, torch.bfloat16):
            features = torch.full((1, 63, 8), value, dtype=dtype)
            assert greedy_diversity_triton(features, None, None, 63, 0.5).tolist() == [list(range(63))]


def test_scale_of_the_rows_changes_nothing() -> None:
    features = draw(111, dtype=torch.bfloat16)
    lengths = 2.0 ** torch.arange(111).remainder(60).sub(30)
    scaled = (features * lengths[:, None]).bfloat16()
    assert torch.equal(
        greedy_diversity_triton(scaled, None, None, 30, 0.5), greedy_diversity_triton(features, None, None, 30, 0.5)
    )


def test_points_without_coordinates_are_far_from_nothing() -> None:
    xyz, first = places(40), torch.tensor([2])
    xyz[0, 7, 1], xyz[0, 8, 0], xyz[0, 9] = NAN, INFINITY, -INFINITY
    chosen = greedy_diversity_triton(None, xyz, first, 40, 0.5)
    assert torch.equal(chosen, greedy_diversity_reference(None, xyz, first, 40, 0.5))
    assert chosen[0, -3:].tolist() == [7, 8, 9]
    nowhere = torch.full((1, 9, 3), NAN)
    fused = greedy_diversity_triton(draw(9), nowhere, first, 9, 0.5)
    assert torch.equal(fused, greedy_diversity_triton(draw(9), None, first, 9, 0.5))


def test_all_points_in_one_place_leave_the_cosine() -> None:
    features, seed = draw(63), torch.tensor([1])
    chosen = greedy_diversity_triton(features, torch.ones(1, 63, 3), seed, 30, 0.7)
    assert torch.equal(chosen, greedy_diversity_triton(features, None, seed, 30, 0.7))


# --- batches, seeds, modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_equals_its_groups(dtype: torch.dtype, which) -> None:
    features, xyz, seeds = draw(111, groups=3, dtype=dtype), places(111, groups=3), torch.tensor([4, 110, 0])
    with use(which):
        for given, points, first in ((features, None, None), (features, xyz, seeds), (None, xyz, seeds)):
            batch = greedy_diversity(given, 20, xyz=points, seed=first)
            for group in range(3):
                one = greedy_diversity(
                    None if given is None else given[group],
                    20,
                    xyz=None if points is None else points[group],
                    seed=None if first is None else int(first[group]),
                )
                assert torch.equal(batch[group], one)
        assert torch.equal(greedy_diversity(features, 9, seed=7), greedy_diversity(features, 9, seed=torch.tensor(7)))


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_nothing_to_choose(which) -> None:
    with use(which):
        assert greedy_diversity(draw(7)[0], 0).shape == (0,)
        assert greedy_diversity(draw(7, groups=2), 0).shape == (2, 0)
        assert greedy_diversity(torch.zeros(0, 8), 0).shape == (0,)
        assert greedy_diversity(torch.zeros(0, 7, 8), 3).shape == (0, 3)
        assert greedy_diversity(None, 0, xyz=places(7), seed=0).dtype == torch.int64


@pytest.mark.parametrize("run", [greedy_diversity_reference, greedy_diversity_triton])
def test_a_seed_on_the_device_that_lies_outside_counts_as_the_nearest_inside(run) -> None:
    features = draw(63, groups=2)
    outside, inside = torch.tensor([-5, 99]), torch.tensor([0, 62])
    for xyz in (None, places(63, groups=2)):
        assert torch.equal(run(features, xyz, outside, 9, 0.5), run(features, xyz, inside, 9, 0.5))
        assert torch.equal(run(features, xyz, inside.int(), 9, 0.5), run(features, xyz, inside, 9, 0.5))


def test_left_to_choose_more_tokens_than_fit_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    public = importlib.import_module("vlm_budget.ops.greedy_diversity")  # not the function of that name
    monkeypatch.setattr(public, "runs_kernel", lambda *tensors: True)  # as on a CUDA device
    assert public.chooses_by_kernel(torch.empty(1, 11585, 1)) and public.chooses_by_kernel(torch.empty(16, 2880, 1))
    assert not public.chooses_by_kernel(torch.empty(1, 11586, 1))
    with use("triton"):
        assert public.chooses_by_kernel(torch.empty(1, 11586, 1))


def test_views_are_read_as_they_lie() -> None:
    features, xyz, seeds = draw(63, groups=3), places(63, groups=3), torch.tensor([4, 60, 0])
    apart = torch.full((3, 70, 30), NAN)
    apart[:, 5:68, 2:26], apart[:, 5:68, 27:] = features, xyz
    strided = torch.tensor([4, 0, 60, 0, 0, 0])[::2]
    for given, whole in ((apart[:, 5:68, 2:26], features), (None, None)):
        chosen = greedy_diversity_triton(given, apart[:, 5:68, 27:], strided, 20, 0.5)
        assert torch.equal(chosen, greedy_diversity_triton(whole, xyz, seeds, 20, 0.5))


def test_groups_far_apart_are_addressed() -> None:
    """Offsets are 64-bit: the second group's products begin beyond 2**31 elements of their storage."""
    n, k, beyond = 40, 12, 2**31 + 64
    products = torch.empty(beyond + n * n).as_strided((2, n, n), (beyond, n, 1))
    unit = unit_rows(draw(n, groups=2))
    products.copy_(unit @ unit.mT)
    nearest, chosen = torch.empty(2, n), torch.empty(2, k, dtype=torch.int64)
    lengths = 2.0 ** torch.arange(2 * n).remainder(5).view(2, n)
    products.mul_(lengths[:, :, None]).mul_(lengths[:, None, :])
    module._nearest.launch((2 * 5,), products, 1 / lengths, nearest, n, beyond, n)
    assert torch.equal(products, unit @ unit.mT)
    module._FARTHEST[1024].launch((2,), products, nearest.argmax(1), chosen, n, k, beyond, n, ROOMY=True)
    assert torch.equal(chosen, greedy_diversity_reference(unit, None, None, k, 0.5))


def test_compile_traces_past_the_operation() -> None:
    features = draw(63)[0]

    @torch.compile(backend="eager", fullgraph=True)
    def traced(features: torch.Tensor) -> torch.Tensor:
        return greedy_diversity(features * 2, 9) + 0

    assert traced(features).tolist() == greedy_diversity(features, 9).tolist()


def test_divprune_keeps_the_same_tokens_by_the_kernel() -> None:
    for item in (make.single(5), make.anyres(1, 2, side=3, pad=(0, 1)), make.frames(3, 2, 3)):
        ctx = make.context(item, width=16)
        for k in (1, len(item.candidates) // 2):
            expected = DivPrune().select(ctx, k).keep
            with use("triton"):
                assert torch.equal(DivPrune().select(ctx, k).keep, expected)


# --- bad input -------------------------------------------------------------------------------------------------------

FEATURES, XYZ, SEED = torch.zeros(2, 5, 4), torch.zeros(2, 5, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": None, "xyz": None}, "give features, or xyz with a seed"),
        ({"xyz": XYZ, "seed": None}, "give features, or xyz with a seed"),
        ({"features": FEATURES.double()}, "features must be one of float32"),
        ({"features": FEATURES.char()}, "features must be one of float32"),
        ({"xyz": XYZ.double()}, "xyz must be one of float32"),
        ({"seed": SEED.short()}, "seed must be one of int64"),
        ({"features": torch.zeros(2, 5, 8)[..., ::2]}, "contiguous along its last dimension"),
        ({"features": FEATURES[0]}, "features must have shape"),
        ({"xyz": torch.zeros(2, 6, 3)}, "xyz must have shape"),
        ({"xyz": torch.zeros(2, 5, 5)}, "1 to 4 coordinates"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, "seed must have shape"),
        ({"seed": SEED.to("meta")}, "one device"),
        ({"xyz": XYZ.to("meta")}, "one device"),
        ({"k": 6}, "cannot choose 6 of 5"),
        ({"features": torch.zeros(1, 1, 1).expand(2, 16385, 1), "xyz": None}, "at most 16384 tokens per group"),
        ({"features": torch.zeros(1, 1, 1).expand(2, 2**30, 1), "xyz": None}, "32 bits"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_read(change, message) -> None:
    given = {"features": FEATURES, "xyz": XYZ, "seed": SEED, "k": 3, "weight": 0.5}
    with pytest.raises(KernelInputError, match=message):
        greedy_diversity_triton(**{**given, **change})


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (FEATURES, {"k": 6}, "cannot choose 6 of 5"),
        (FEATURES, {"k": -1}, "cannot choose -1 of 5"),
        (None, {}, "nothing to tell tokens apart by"),
        (FEATURES[0, 0], {}, "must be"),
        (FEATURES, {"xyz": XYZ[0], "seed": 0}, "must be"),
        (FEATURES, {"xyz": XYZ}, "xyz needs a seed"),
        (FEATURES, {"xyz": XYZ, "seed": 5}, "seed must lie between 0 and 4, got 5"),
        (FEATURES, {"seed": torch.zeros(3, dtype=torch.int64)}, r"one per group \(2\), got shape \[3\]"),
        (FEATURES, {"xyz": XYZ, "seed": 0, "weight": 1.5}, r"weight must lie in \[0, 1\]"),
        (FEATURES, {"xyz": XYZ, "seed": 0, "weight": NAN}, r"weight must lie in \[0, 1\]"),
    ],
)
def test_mistakes_are_refused(given, options, message) -> None:
    with pytest.raises(KernelInputError, match=message):
        greedy_diversity(given, **{"k": 3, **options})


def test_a_kernel_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_budget.triton_kernels import _launch

    monkeypatch.setattr(_launch.Kernel, "interpreted", property(lambda self: False))
    with use("triton"), pytest.raises(KernelUnavailableError, match="runs on CUDA devices"):
        greedy_diversity(FEATURES, 3)


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("n", [577, 1500, 2880, 5000, 10000])
def test_on_the_device_every_choice_is_the_farthest_within_rounding(n: int, dtype: torch.dtype) -> None:
    """As in the interpreter: within 1e-5 of the best at every step; every padded size up to 16,384 is launched."""
    features, xyz, seed = (given.cuda() for given in (draw(n, 256, dtype=dtype), places(n), torch.tensor([n // 3])))
    for points, first, weight in ((None, None, 0.0), (xyz, seed, 0.4)):
        chosen = greedy_diversity(features, 200, xyz=points, seed=first, weight=weight)[0].tolist()
        points = None if points is None else points[0]
        assert shortfall(table(features[0], points, n // 3, weight).cpu(), chosen) < 1e-5
    chosen = greedy_diversity(None, 200, xyz=xyz, seed=seed)[0].tolist()
    assert shortfall(table(None, xyz[0], n // 3, 0.5).cpu(), chosen) < 1e-5


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    features, xyz, seed = draw(577, dtype=torch.bfloat16).cuda(), places(577).cuda(), torch.zeros(1).long().cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        greedy_diversity(features, 30), greedy_diversity(features.float(), 30)
        greedy_diversity(features, 30, xyz=xyz, seed=seed), greedy_diversity(None, 30, xyz=xyz, seed=3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
