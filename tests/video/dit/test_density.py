"""From a budget to a density: FLOPs of a whole run are solved exactly, and what cannot be met is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from video_calls import ODD, call_of
from vlm_budget.budget import Budget
from vlm_budget.errors import BudgetError, InfeasibleBudgetError, LatencyError, OptionError
from vlm_budget.video.dit.call import Grid
from vlm_budget.video.dit.density import Run, Times, dense_flops, density_for, sparse_flops, time_calls
from vlm_budget.video.dit.method import rounded_up
from vlm_budget.video.dit.methods.block_topk import BlockTopK
from vlm_budget.video.dit.methods.dense import Dense
from vlm_budget.video.dit.methods.radial import Radial
from vlm_budget.video.dit.methods.sliding_tile import SlidingTile
from vlm_budget.video.dit.methods.svg2 import SVG2

WAN = Run(Grid(21, 45, 80), 0, 40, 128, 40, 50, warmup_steps=10, dense_layers=1, branches=2)
SMALL = Run(ODD, 6, 2, 16, 4, 10, warmup_steps=2, dense_layers=1)


def counted(method: SVG2, run: Run, density: float) -> float:
    """FLOPs of a run, call by call."""
    tokens, text, total = run.grid.tokens, run.text, 0.0
    for layer in range(run.layers):
        sparse_calls = 0
        for step in range(run.steps):
            if step < run.warmup_steps or layer < run.dense_layers:
                total += 4 * run.width * (tokens + text) ** 2
            else:
                sparse_calls += 1
                total += 4 * run.width * (density * tokens**2 + 2 * tokens * text + text**2)
        if sparse_calls:
            total += method.overhead(run.grid, run.width, sparse_calls)
    return total * run.heads * run.branches


@pytest.mark.parametrize("run", [WAN, SMALL, replace(SMALL, text=0, warmup_steps=0, dense_layers=0)], ids=str)
@pytest.mark.parametrize("method", [SVG2(), SVG2(correction=False, reuse=4), BlockTopK(extent=(2, 3, 4))], ids=str)
def test_flops_of_the_whole_run_are_met_exactly(method: SVG2, run: Run) -> None:
    share = 0.8
    density = density_for("80% flops", method, run)
    assert counted(method, run, density) == pytest.approx(share * counted(Dense(), run, 1.0), rel=1e-9)
    assert sparse_flops(method, run, density) == pytest.approx(counted(method, run, density), rel=1e-9)
    assert dense_flops(run) == pytest.approx(counted(Dense(), run, 1.0), rel=1e-12)
    absolute = Budget(share * dense_flops(run), "flops", relative=False)
    assert density_for(absolute, method, run) == pytest.approx(density, rel=1e-9)


def test_clustering_and_warm_up_are_paid_from_the_budget() -> None:
    plain = density_for("50% flops", SVG2(), WAN)
    assert plain < 0.5
    assert density_for("50% flops", SVG2(), replace(WAN, warmup_steps=0)) > plain
    assert density_for("50% flops", SVG2(init_iterations=50, reuse=1), WAN) < plain
    # Dense: 10 of 50 steps and 1 of 40 layers, so that 78 % of all calls are sparse.
    assert density_for("50% flops", Radial(), WAN) == pytest.approx((0.5 - 0.22) / 0.78, rel=1e-9)


def test_all_is_dense_and_a_ratio_is_the_density() -> None:
    for budget in (1.0, "100%", "100% flops", "100% ms", Budget(2 * dense_flops(WAN), "flops", relative=False)):
        assert density_for(budget, SVG2(), WAN) == 1.0
    assert density_for(0.25, SVG2(), WAN) == density_for("25%", SVG2(), WAN) == 0.25


def test_a_run_whose_warm_up_alone_is_too_much_names_the_nearest_budget() -> None:
    with pytest.raises(InfeasibleBudgetError) as error:
        density_for("20% flops", SVG2(), WAN)
    assert "10 of 50 steps and 1 of 40 layers stay dense" in str(error.value)
    (nearest,) = error.value.nearest
    found = density_for(nearest, SVG2(), WAN)
    assert SVG2().least_density(WAN.grid) <= found < 0.02
    with pytest.raises(InfeasibleBudgetError) as error:
        density_for("1 PFLOPs", SVG2(), WAN)
    (nearest,) = error.value.nearest
    assert not nearest.relative and density_for(nearest, SVG2(), WAN) < 0.02


def test_a_ratio_below_the_minimum_names_the_minimum() -> None:
    with pytest.raises(InfeasibleBudgetError, match="A density of 0.1 is too little for Radial") as error:
        density_for(0.1, Radial(), SMALL)
    assert density_for(error.value.nearest[0], Radial(), SMALL) == pytest.approx(Radial().least_density(ODD), rel=1e-3)


def test_where_no_call_is_sparse_only_everything_is_feasible() -> None:
    for run in (replace(SMALL, warmup_steps=10), replace(SMALL, dense_layers=4)):
        with pytest.raises(InfeasibleBudgetError) as error:
            density_for("90% flops", SVG2(), run)
        assert [str(budget) for budget in error.value.nearest] == ["100% flops"]


def times(base: float = 2.0, slope: float = 10.0, dense: float = 10.0) -> Times:
    return Times(dense, (0.1, base + 0.1 * slope), (0.6, base + 0.6 * slope))


def test_milliseconds_of_a_forward_are_met_on_the_line() -> None:
    run = replace(SMALL, dense_layers=1)  # of 4 layers: 40 ms dense
    for budget in ("75% ms", "30 ms"):
        density = density_for(budget, BlockTopK(extent=(2, 3, 4)), run, times)
        assert 10 + 3 * (2 + 10 * density) == pytest.approx(30)
    assert density_for("41 ms", BlockTopK(), run, times) == 1.0
    assert density_for("39.9 ms", BlockTopK(), run, lambda: times(base=-5.0)) < 1


def test_milliseconds_that_cannot_be_met_or_told_are_refused() -> None:
    method = BlockTopK(extent=(2, 3, 4))
    for budget in ("40% ms", "16 ms"):
        with pytest.raises(InfeasibleBudgetError, match="ms of self-attention in a forward is too little") as error:
            density_for(budget, method, SMALL, times)
        found = density_for(error.value.nearest[0], method, SMALL, times)
        assert found == pytest.approx(method.least_density(ODD), abs=2e-3)
    with pytest.raises(InfeasibleBudgetError) as error:
        density_for("90% ms", method, SMALL, lambda: times(base=50.0))
    assert [str(budget) for budget in error.value.nearest] == ["100% ms"]
    with pytest.raises(LatencyError, match="too close to tell"):
        density_for("50% ms", method, SMALL, lambda: times(slope=0.0))
    with pytest.raises(LatencyError, match="needs timings"):
        density_for("50% ms", method, SMALL)


def test_timing_a_call_leaves_its_state_alone() -> None:
    call = call_of(Grid(3, 5, 7), text=3)
    ran: list[int] = []
    found = time_calls(call, SVG2(reuse=3), lambda: ran.append(1), (0.45, 0.9))
    assert found.low[0] == 0.45 and found.high[0] == 0.9 and len(ran) > 1
    assert found.low[1] > 0 and found.high[1] > 0 and found.dense >= 0 and not call.state
    chosen = time_calls(call, BlockTopK(extent=(2, 3, 4)), lambda: torch.zeros(1))
    assert chosen.low[0] < chosen.high[0] <= 1


def test_budgets_that_say_nothing_and_options_beside_them_are_refused() -> None:
    for budget in (128, "128 tokens", "200 MB kv"):
        with pytest.raises(BudgetError, match="keeps every token"):
            density_for(budget, SVG2(), WAN)
    for method in (SVG2(top_p=0.9), SVG2(density=0.2), SlidingTile(window=(3, 3, 3)), Dense()):
        with pytest.raises(OptionError, match="already says how much is computed"):
            density_for(0.3, method, WAN)
    with pytest.raises(BudgetError, match="nothing says how many there are"):
        density_for("30% flops", SVG2(), replace(WAN, steps=None))


@pytest.mark.parametrize("share", [1e-6, 0.012345, 0.5, 0.77777, 0.99999, 1.0, 3e-300])
def test_shares_are_rounded_up_to_four_digits(share: float) -> None:
    assert share <= rounded_up(share) <= share * 1.001 or rounded_up(share) == 1.0
