"""Greedy determinants: the kernel chooses what the reference chooses, and the reference what determinants say."""

import pytest
import torch

import synthetic_items as make
from vlm_budget.errors import KernelInputError, KernelUnavailableError
from vlm_budget.greedy import CosineRows, map_dpp, unit_rows
from vlm_budget.ops import greedy_dpp, use
from vlm_budget.pruners.cdpruner import CDPruner
from vlm_budget.triton_kernels import greedy_dpp as module
from vlm_budget.triton_kernels.greedy_dpp import EXHAUSTED, PANEL, greedy_dpp_reference, greedy_dpp_triton

# Tokens, and how many to choose: more than one panel where there are as many.
SIZES = ((1, 1), (7, 7), (63, 40), (111, 70), (577, 34), (2881, 5))
HALVES = (torch.bfloat16, torch.float16)
INFINITY, NAN = float("inf"), float("nan")


def draw(n: int, width: int = 96, groups: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + width)
    return torch.randn(groups, n, width, generator=generator).to(dtype)


def quality(n: int, groups: int = 1) -> torch.Tensor:
    return (torch.rand(groups, n, generator=torch.Generator().manual_seed(n)) + 0.05).log()


def shortfall(features: torch.Tensor, log_quality: torch.Tensor, chosen: list[int]) -> float:
    """The most by which the log determinant's gain of any choice falls short of the best one at its step; float64."""
    unit = unit_rows(features.double())
    similar = unit @ unit.T
    left, level = torch.ones(len(unit), dtype=torch.float64), 2 * log_quality.double()
    open_, factor, worst = torch.ones(len(unit), dtype=torch.bool), unit.new_zeros(len(chosen), len(unit)), 0.0
    for step, token in enumerate(chosen):
        assert open_[token], "chosen twice"
        assert left[token] > 100 * EXHAUSTED, "the measure is for tokens of which something is left"
        gain = left.log() + level
        worst = max(worst, float(gain[open_].max() - gain[token]))
        open_[token] = False
        row = (similar[token] - factor[:step, token] @ factor[:step]) / left[token].sqrt()
        factor[step] = row
        left = (left - row * row).clamp_min(1e-300)
    return worst


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_kernel_equals_reference(n: int, k: int) -> None:
    features, level = draw(n), quality(n)
    for count in {1, k // 2 or 1, k} if n < 200 else {k}:
        expected = greedy_dpp_reference(features, level, count)
        assert torch.equal(greedy_dpp_triton(features, level, count), expected)
    assert torch.equal(expected[0], map_dpp(CosineRows(features[0]), level[0], len(expected[0])))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_halves_choose_the_best_within_rounding(n: int, k: int, dtype: torch.dtype) -> None:
    """At every step, given what the kernel chose before, the gain of its choice is within 1e-5 of the best.

    Gains are logarithms in float64, of the same rounded features. Where no two come so close, the choice is the same.
    """
    features, level = draw(n, dtype=dtype), quality(n)
    chosen = greedy_dpp_triton(features, level, k)
    assert shortfall(features[0], level[0], chosen[0].tolist()) < 1e-5
    assert torch.equal(chosen, greedy_dpp_reference(features, level, k))


def test_the_measure_of_near_ties_sees_a_worse_choice() -> None:
    features, level = draw(63), quality(63)
    chosen = greedy_dpp_reference(features.double(), level, 20)[0].tolist()
    assert shortfall(features[0], level[0], chosen) == 0
    chosen[7], chosen[19] = chosen[19], chosen[7]
    assert shortfall(features[0], level[0], chosen) > 1e-4


# --- ties, rank and strange rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [greedy_dpp_reference, greedy_dpp_triton])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_duplicates_and_tokens_without_quality_come_last(run, dtype: torch.dtype) -> None:
    features = torch.cat([torch.eye(4), torch.eye(4)])[None].to(dtype)
    given = torch.tensor([[0.5, 0.5, 0.0, 0.25, 0.5, 0.75, 0.5, 0.0]]).log()
    assert run(features, given, 8).tolist() == [[5, 0, 6, 3, 1, 4, 2, 7]]
    for even in (0.0, -INFINITY):
        assert run(features, torch.full((1, 8), even), 8).tolist() == [list(range(8))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beyond_the_rank_the_best_quality_follows(dtype: torch.dtype) -> None:
    """And panels of nothing but such tokens change nothing."""
    n = 2 * PANEL + 9
    features, level = draw(n, width=3, dtype=dtype), quality(n)
    chosen = greedy_dpp_triton(features, level, n)
    assert torch.equal(chosen, greedy_dpp_reference(features, level, n))
    rest = [token for token in range(n) if token not in chosen[0, :3].tolist()]
    assert chosen[0, 3:].tolist() == sorted(rest, key=lambda token: -float(level[0, token]))


def test_ties_across_blocks_go_to_the_lower_index() -> None:
    """2,048 tokens are one block of the kernel: of 2,881, every one is the same but for two."""
    features, level = torch.ones(1, 2881, 4), torch.zeros(1, 2881)
    features[0, 2500], features[0, 9] = torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]])
    expected = [[0, 9, 2500, 1, 2]]
    assert (
        greedy_dpp_triton(features, level, 5).tolist() == greedy_dpp_reference(features, level, 5).tolist() == expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_rows_without_a_finite_direction_come_last(dtype: torch.dtype) -> None:
    features, level = draw(40, dtype=dtype), quality(40)
    features[0, 3], features[0, 4], features[0, 5, 0], features[0, 6, 1] = 0.0, NAN, INFINITY, -INFINITY
    level[0, 3:7] = 9.0
    chosen = greedy_dpp_triton(features, level, 40)
    assert torch.equal(chosen, greedy_dpp_reference(features, level, 40))
    assert chosen[0, -4:].tolist() == [3, 4, 5, 6]


def test_quality_of_any_range_fits() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    chosen = greedy_dpp_triton(draw(9), order[None] * 3000.0, 9)
    assert chosen[0].tolist() == order.argsort(descending=True).tolist()
    level = torch.tensor([[NAN, INFINITY, -INFINITY, 1.0, 3e38, -3e38, 0.0, 2.0, -1.0]])
    assert torch.equal(greedy_dpp_triton(draw(9), level, 9), greedy_dpp_reference(draw(9), level, 9))


# --- batches, modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_equals_its_groups(dtype: torch.dtype, which) -> None:
    features, level = draw(63, groups=3, dtype=dtype), quality(63, groups=3)
    with use(which):
        batch = greedy_dpp(features, level, PANEL + 3)
        for group in range(3):
            assert torch.equal(batch[group], greedy_dpp(features[group], level[group], PANEL + 3))
        assert greedy_dpp(features, level, 0).shape == (3, 0)
        assert greedy_dpp(features[0], level[0], 0).shape == greedy_dpp(features[0, :0], level[0, :0], 0).shape == (0,)
        assert greedy_dpp(features[:0], level[:0], 3).shape == (0, 3)


def test_views_are_read_as_they_lie() -> None:
    features, level = draw(63, groups=3), quality(63, groups=3)
    apart = torch.full((3, 70, 100), NAN)
    apart[:, 5:68, 2:98] = features
    chosen = greedy_dpp_triton(apart[:, 5:68, 2:98], level.T.contiguous().T, 20)
    assert torch.equal(chosen, greedy_dpp_triton(features, level, 20))


def test_groups_far_apart_are_addressed() -> None:
    """Offsets are 64-bit: the second group's similarities begin beyond 2**31 elements of their storage."""
    n, k, beyond = 40, 12, 2**31 + 64
    features, level = draw(n, groups=2), quality(n, groups=2)
    similar = torch.empty(beyond + n * n).as_strided((2, n, n), (beyond, n, 1))
    unit = unit_rows(features)
    similar.copy_(unit @ unit.mT)
    chosen, factor = torch.empty(2, k, dtype=torch.int64), torch.zeros(2, PANEL, 1024)
    module._CHOOSE[1024].launch(
        (2,),
        *(similar, 2 * level, torch.ones(2, n), module.below_everything(level), factor, chosen),
        *(n, k, 0, k, beyond, n),
        LINES=8,
        PANEL=PANEL,
        EXHAUSTED=EXHAUSTED,
    )
    assert torch.equal(chosen, greedy_dpp_reference(features, level, k))


def test_compile_traces_past_the_operation() -> None:
    features, level = draw(63)[0], quality(63)[0]

    @torch.compile(backend="eager", fullgraph=True)
    def traced(features: torch.Tensor) -> torch.Tensor:
        return greedy_dpp(features * 2, level, 9) + 0

    assert traced(features).tolist() == greedy_dpp(features, level, 9).tolist()


def test_cdpruner_keeps_the_same_tokens_by_the_kernel() -> None:
    for item in (make.single(5), make.anyres(1, 2, side=3, pad=(0, 1))):
        ctx = make.context(item, width=16)
        for k in (1, len(item.candidates) // 2):
            expected = CDPruner().select(ctx, k).keep
            with use("triton"):
                assert torch.equal(CDPruner().select(ctx, k).keep, expected)


# --- bad input -------------------------------------------------------------------------------------------------------

FEATURES, LEVEL = torch.zeros(2, 5, 4), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": FEATURES.double()}, "features must be one of float32"),
        ({"features": FEATURES.char()}, "features must be one of float32"),
        ({"log_quality": LEVEL.double()}, "log_quality must be one of float32"),
        ({"features": torch.zeros(2, 5, 8)[..., ::2]}, "contiguous along its last dimension"),
        ({"features": FEATURES[0]}, "features must have shape"),
        ({"log_quality": LEVEL[:, :4]}, "log_quality must have shape"),
        ({"log_quality": LEVEL.to("meta")}, "one device"),
        ({"k": 6}, "cannot choose 6 of 5"),
        (
            {"features": torch.zeros(1, 1, 1).expand(2, 2**30, 1), "log_quality": torch.zeros(1).expand(2, 2**30)},
            "32 b",
        ),
    ],
)
def test_the_kernel_refuses_what_it_cannot_read(change, message) -> None:
    given = {"features": FEATURES, "log_quality": LEVEL, "k": 3}
    with pytest.raises(KernelInputError, match=message):
        greedy_dpp_triton(**{**given, **change})


def test_mistakes_are_refused() -> None:
    with pytest.raises(KernelInputError, match="cannot choose 6 of 5"):
        greedy_dpp(FEATURES, LEVEL, 6)
    with pytest.raises(KernelInputError, match="cannot choose -1 of 5"):
        greedy_dpp(FEATURES, LEVEL, -1)
    for features, level in ((FEATURES, LEVEL[0]), (FEATURES[0, 0], LEVEL[0, 0])):
        with pytest.raises(KernelInputError, match="features and log_quality must be"):
            greedy_dpp(features, level, 1)


def test_a_kernel_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_budget.triton_kernels import _launch

    monkeypatch.setattr(_launch.Kernel, "interpreted", property(lambda self: False))
    with use("triton"), pytest.raises(KernelUnavailableError, match="runs on CUDA devices"):
        greedy_dpp(FEATURES, LEVEL, 3)


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("n", [577, 2880])
def test_on_the_device_every_choice_is_the_best_within_rounding(n: int, dtype: torch.dtype) -> None:
    """As in the interpreter: within 1e-5 of the best gain at every step."""
    features, level = draw(n, 512, dtype=dtype), quality(n)
    chosen = greedy_dpp(features.cuda(), level.cuda(), 200)[0].tolist()
    assert shortfall(features[0], level[0], chosen) < 1e-5


@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    features, level = draw(577, dtype=torch.bfloat16).cuda(), quality(577).cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        greedy_dpp(features, level, 70), greedy_dpp(features.float(), level, 70)
    finally:
        torch.cuda.set_sync_debug_mode("default")
