"""From what may be spent to the density of sparse calls.

Three kinds of budgets say what a run's video self-attention may cost: a ratio is the density itself; FLOPs are those of
the whole run, dense steps and layers, text, clustering and corrections counted, and are solved exactly; milliseconds
are those of one forward's self-attention, solved on the line through two timings. Whole tokens and bytes say nothing
here: no token leaves a sparse call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from vlm_budget.budget import Budget, Unit, in_words
from vlm_budget.errors import BudgetError, InfeasibleBudgetError, LatencyError, OptionError

from .call import Call, Grid
from .method import SparseAttention, rounded_up
from .timing import milliseconds, sparse_milliseconds

ALMOST_ALL = math.nextafter(1.0, 0.0)
"""Still sparse: a density of 1 leaves the processor untouched, and costs what dense attention does."""
ROUNDS = 4
"""Steps that are timed together, so that what is reused for some steps counts in part."""


@dataclass(frozen=True)
class Run:
    """What the self-attention of a run is made of.

    Attributes:
        grid: Tokens of the video.
        text: Text tokens beside them, which are always dense.
        heads: Of a layer.
        width: Dimensions of a head.
        layers: Of the transformer.
        steps: Denoising steps; None where nothing says how many, which FLOPs cannot do without.
        warmup_steps: First steps that stay dense.
        dense_layers: First layers that stay dense.
        branches: Samples of all forwards of a step: the batch, times those of classifier-free guidance.
    """

    grid: Grid
    text: int
    heads: int
    width: int
    layers: int
    steps: int | None
    warmup_steps: int = 0
    dense_layers: int = 0
    branches: int = 1


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call of self-attention.

    Attributes:
        dense: As the transformer computes it.
        low: A density, and the time of a sparse call at it.
        high: The same, at a larger one.
    """

    dense: float
    low: tuple[float, float]
    high: tuple[float, float]


def density_for(
    budget: Budget | str | float, method: SparseAttention, run: Run, times: Callable[[], Times] | None = None
) -> float:
    """The density of sparse calls that a budget buys.

    Args:
        budget: A ratio (``0.3``, ``"30%"``), FLOPs of the run's video self-attention (``"30% flops"``, ``"2 PFLOPs"``),
            or milliseconds of the self-attention of one forward (``"50% ms"``, ``"900 ms"``).
        method: Whose density it is.
        run: What is counted.
        times: Measures, for milliseconds.

    Returns:
        In (0, 1]; 1 where dense attention is within the budget.

    Raises:
        OptionError: The method's own options already say how much is computed.
        BudgetError: No such budget, whole tokens, bytes, or FLOPs of unknown steps.
        InfeasibleBudgetError: Less than the smallest density costs; names the nearest that can be met.
        LatencyError: Milliseconds that cannot be predicted.
    """
    budget = Budget.parse(budget)
    if method.settled:
        raise OptionError(f"{method} already says how much is computed; leave out budget='{budget}', or its options")
    if budget.unit in ("tokens", "bytes"):
        raise BudgetError(
            f"budget '{budget}' says nothing about sparse attention, which keeps every token. Give a density (0.3, "
            "'30%'), '30% flops' or '50% ms'."
        )
    if budget.relative and budget.amount >= 1:
        return 1.0
    if budget.unit == "flops":
        return _within_flops(budget, method, run)
    if budget.unit == "ms":
        return _within_ms(budget, method, run, times)
    least = method.least_density(run.grid)
    if budget.amount < least:
        raise InfeasibleBudgetError(_too_little(method, run, f"A density of {budget.amount:.4g}"), [_share(least)])
    return budget.amount


def dense_flops(run: Run) -> float:
    """FLOPs of a run's self-attention when nothing is sparse: 4 D per pair of a query and a key.

    Raises:
        BudgetError: Nothing says how many steps it has.
    """
    pairs = (run.grid.tokens + run.text) ** 2
    return float(_steps(run) * run.layers * run.branches * run.heads * 4 * run.width * pairs)


def sparse_flops(method: SparseAttention, run: Run, density: float) -> float:
    """FLOPs of a run's self-attention at a density of the sparse calls, everything counted.

    Raises:
        BudgetError: Nothing says how many steps it has.
    """
    fixed, per_density = _flops(method, run)
    return fixed + per_density * density


def _flops(method: SparseAttention, run: Run) -> tuple[float, float]:
    """FLOPs of a run that no density changes, and those that are a density's."""
    tokens, text, steps = run.grid.tokens, run.text, _steps(run)
    sparse_steps = max(steps - run.warmup_steps, 0)
    sparse_layers = max(run.layers - run.dense_layers, 0)
    sparse = sparse_steps * sparse_layers
    pair, samples = 4.0 * run.width, run.branches * run.heads
    dense_pairs = (steps * run.layers - sparse) * (tokens + text) ** 2 + sparse * (2 * tokens * text + text * text)
    beside = sparse_layers * method.overhead(run.grid, run.width, sparse_steps) if sparse else 0.0
    return samples * (dense_pairs * pair + beside), samples * sparse * tokens * tokens * pair


def _within_flops(budget: Budget, method: SparseAttention, run: Run) -> float:
    everything = dense_flops(run)
    allowed = budget.amount * everything if budget.relative else budget.amount
    if allowed >= everything:
        return 1.0
    least = method.least_density(run.grid)
    fixed, per_density = _flops(method, run)
    needed = fixed + per_density * least
    if per_density <= 0 or allowed < needed:
        words = (
            f"{allowed / everything:.4g} of the run's self-attention" if budget.relative else in_words(allowed, "flops")
        )
        reason = _too_little(method, run, words)
        if needed >= everything:
            raise InfeasibleBudgetError(reason, [Budget(1.0, "flops")])
        raise InfeasibleBudgetError(reason, [_nearest(needed, everything, budget.relative, "flops")])
    return min((allowed - fixed) / per_density, ALMOST_ALL)


def _within_ms(budget: Budget, method: SparseAttention, run: Run, times: Callable[[], Times] | None) -> float:
    if times is None:
        raise LatencyError(f"budget '{budget}' needs timings of this machine, and none are taken here. Give a density.")
    measured = times()
    (low, fast), (high, slow) = measured.low, measured.high
    everything = run.layers * measured.dense
    allowed = budget.amount * everything if budget.relative else budget.amount
    if allowed >= everything:
        return 1.0
    slope = (slow - fast) / (high - low)
    if slope <= 0:
        raise LatencyError(
            f"a density of {high:g} took {slow:.4g} ms and {low:g} took {fast:.4g} ms: too close to tell what a "
            "density costs. Give a density instead."
        )
    least, sparse = method.least_density(run.grid), max(run.layers - run.dense_layers, 0)
    at_least = (run.layers - sparse) * measured.dense + sparse * (fast + slope * (least - low))
    if not sparse or allowed < at_least:
        reason = _too_little(method, run, f"{allowed:.4g} ms of self-attention in a forward")
        if at_least >= everything:
            raise InfeasibleBudgetError(reason, [Budget(1.0, "ms")])
        raise InfeasibleBudgetError(reason, [_nearest(at_least, everything, budget.relative, "ms")])
    call = (allowed - (run.layers - sparse) * measured.dense) / sparse
    return min(max(low + (call - fast) / slope, least), ALMOST_ALL)


def time_calls(
    call: Call, method: SparseAttention, dense: Callable[[], object], densities: tuple[float, float] | None = None
) -> Times:
    """Time one call, dense and sparse. The host waits for the device.

    Args:
        call: Tensors of the shapes to come; what they hold matters little, as a density is kept whatever they hold.
            Its state is left alone.
        method: Whose density is not decided yet.
        dense: Runs the transformer's own attention on the same tensors.
        densities: Two, the smaller first; None: the smallest that can be kept, and one half.
    """
    if densities is None:
        least = max(method.least_density(call.grid), 0.05)
        densities = least, max(0.5, (1 + least) / 2)
    dense()
    taken = min(milliseconds(call.query.device, dense) for _ in range(ROUNDS))
    found = [(density, sparse_milliseconds(call, replace(method, density=density), ROUNDS)) for density in densities]
    return Times(taken, found[0], found[1])


def _steps(run: Run) -> int:
    if run.steps is None:
        raise BudgetError(
            "a budget in FLOPs counts a run's dense and sparse steps, and nothing says how many there are. Set the "
            "scheduler's timesteps first, or give a density."
        )
    return run.steps


def _too_little(method: SparseAttention, run: Run, amount: str) -> str:
    least = rounded_up(method.least_density(run.grid))
    dense = [
        f"{count} of {total} {name}"
        for count, total, name in (
            (run.warmup_steps, run.steps, "steps"),
            (run.dense_layers, run.layers, "layers"),
        )
        if count
    ]
    beside = f", and {' and '.join(dense)} stay dense" if dense else ""
    return (
        f"{amount} is too little for {type(method).__name__} on a grid of {run.grid}: the smallest density it can "
        f"promise is {least:g}{beside}."
    )


def _share(share: float) -> Budget:
    return Budget(rounded_up(share))


def _nearest(needed: float, everything: float, relative: bool, unit: Unit) -> Budget:
    if relative:
        share = rounded_up(needed / everything)
        return Budget(share if share * everything >= needed else rounded_up(share * (1 + 1e-4)), unit)
    digits = 10.0 ** (math.floor(math.log10(needed)) - 3)
    return Budget(math.ceil(needed / digits - 1e-9) * digits, unit, relative=False)
