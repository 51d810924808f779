"""From a run's answers to figures: per task and cell, with errors, against the baselines, at equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from vlm_budget.errors import RunError
from vlm_budget.eval.cells import FIXED, UNPATCHED, Cell
from vlm_budget.eval.statistics import Comparison, Estimate, estimate, paired_bootstrap
from vlm_budget.eval.store import Answer, BatchTime, Run
from vlm_budget.eval.task import Task, find_tasks

COSTS = {
    "mean_kept": "visual tokens per layer",
    "flops": "FLOPs of the prompt pass",
    "kv_bytes": "KV cache of the prompt",
    "prefill_ms": "measured prefill, with choosing tokens",
}
_BEHIND_ENCODER = ("score", "select", "compact", "prefill")


@dataclass(frozen=True)
class Result:
    """One cell on one task.

    Attributes:
        task: Name of the task.
        cell: What answered.
        main: The task's metric over the samples answered.
        figures: All figures by name.
        cost: Means per prompt: the answers' costs, and ``<stage>_ms`` where times are known; ``prefill_ms`` is the
            language model over the prompt with choosing and moving tokens, the vision encoder apart.
        share: Of every cost, the share of the unpatched model's: on the same samples; of times, over all of each.
        errors: Samples without an answer, by reason.
        minus_unpatched: Paired difference to the unpatched model; None where one of the two has no answers.
        minus_random: Paired difference to random tokens at the same budget.
    """

    task: str
    cell: Cell
    main: Estimate
    figures: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    share: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    minus_unpatched: Comparison | None = None
    minus_random: Comparison | None = None


@dataclass(frozen=True)
class Summary:
    """Figures of a run.

    Attributes:
        run: The run.
        tasks: Its tasks, as they are defined now.
        cells: Its columns, the unpatched model first.
        results: Per task and cell, in this order; cells without any answer or error are left out.
    """

    run: Run
    tasks: tuple[Task, ...]
    cells: tuple[Cell, ...]
    results: tuple[Result, ...]

    @cached_property
    def by_place(self) -> Mapping[tuple[str, Cell], Result]:
        """Results by task and cell."""
        return {(one.task, one.cell): one for one in self.results}

    def at_equal_cost(
        self, task: str, cost: str = "prefill_ms", shares: Sequence[float] = (0.2, 0.4, 0.6)
    ) -> EqualCost:
        """Every method's metric where it costs the same, between its measured budgets on a straight line.

        Outside the measured budgets nothing is said (None): a curve is not prolonged.

        Args:
            task: Name of the task.
            cost: One of :data:`COSTS`.
            shares: Of the unpatched model's cost.
        """
        rows: dict[str, tuple[float | None, ...]] = {}
        for methods in dict.fromkeys(cell.methods for cell in self.cells if not cell.unpatched):
            mine = [
                one for one in self.results if one.task == task and one.cell.methods == methods and cost in one.share
            ]
            points = sorted((one.share[cost], one.main.mean) for one in mine if one.main.n)
            full = self.by_place.get((task, Cell()))
            if full is not None and full.main.n and points and points[-1][0] < 1:
                points.append((1.0, full.main.mean))
            rows[methods] = tuple(_between(points, share) for share in shares)
        return EqualCost(cost, tuple(shares), rows)


@dataclass(frozen=True)
class EqualCost:
    """Methods compared where they cost the same.

    Attributes:
        cost: Which cost.
        shares: Of the unpatched model's.
        rows: Per method, the metric at every share; None outside its measured budgets.
    """

    cost: str
    shares: tuple[float, ...]
    rows: Mapping[str, tuple[float | None, ...]]


def summarise(run: Run, tasks: Sequence[Task] | None = None, times: bool = True) -> Summary:
    """Figures of a run.

    Args:
        run: What :func:`vlm_budget.eval.store.read_run` gives.
        tasks: Its tasks' definitions; looked up by name by default.
        times: Use measured times; without them two equal runs give equal figures.

    Raises:
        UnknownNameError: A task is not known here.
        RunError: A task has another version here than in the run.
    """
    versions: Mapping[str, int] = run.manifest["tasks"]
    known = tuple(tasks if tasks is not None else find_tasks(list(versions)))
    for task in known:
        if versions.get(task.name) != task.version:
            raise RunError(
                f"the run has version {versions.get(task.name)} of task {task.name!r}, here it is {task.version}: "
                "figures of the two are not comparable. Run it again."
            )
    cells = tuple(Cell(**one) for one in run.manifest["cells"])
    answers: dict[tuple[str, Cell], list[Answer]] = {}
    for answer in run.answers:
        answers.setdefault((answer.task, answer.cell), []).append(answer)
    clocks: dict[tuple[str, Cell], list[BatchTime]] = {}
    for time in run.times if times else ():
        clocks.setdefault((time.task, time.cell), []).append(time)
    results = []
    for task in known:
        full, full_time = answers.get((task.name, Cell()), []), clocks.get((task.name, Cell()), [])
        for cell in cells:
            mine = answers.get((task.name, cell))
            if mine:
                random = answers.get((task.name, Cell("random", cell.budget)), [])
                clock = clocks.get((task.name, cell), [])
                results.append(_result(task, cell, mine, clock, full, full_time, random))
    return Summary(run, known, cells, tuple(results))


def compare(run: Run, task: str, metric: str, first: Cell, second: Cell) -> Comparison:
    """Two cells on the samples that both answered.

    Raises:
        RunError: There is no sample that both answered.
    """
    found = _paired(
        [one for one in run.answers if one.task == task and one.cell == first],
        [one for one in run.answers if one.task == task and one.cell == second],
        metric,
    )
    if found is None:
        raise RunError(f"{first} and {second} share no answered sample of {task!r}")
    return found


def _result(
    task: Task,
    cell: Cell,
    mine: Sequence[Answer],
    clock: Sequence[BatchTime],
    full: Sequence[Answer],
    full_clock: Sequence[BatchTime],
    random: Sequence[Answer],
) -> Result:
    done = [one for one in mine if one.error is None]
    errors: dict[str, int] = {}
    for one in mine:
        if one.error is not None:
            errors[one.error] = errors.get(one.error, 0) + 1
    if not done:
        return Result(task.name, cell, Estimate(float("nan"), float("nan"), 0), errors=errors)
    if lacking := next((one.sample for one in done if task.metric not in one.scores), None):
        raise RunError(f"the answer to {lacking!r} of {task.name!r} by {cell} has no score {task.metric!r}")
    main = estimate([one.scores[task.metric] for one in done], [one.cluster for one in done])
    cost = {**_mean_costs(done), **_times(clock)}
    base = {one.sample: one for one in full if one.error is None}
    both = [one for one in done if one.sample in base]
    base_cost = {**_mean_costs([base[one.sample] for one in both]), **_times(full_clock)} if both else {}
    paid = {**cost, **_mean_costs(both)}
    share = {name: paid[name] / base_cost[name] for name in COSTS if name in paid and base_cost.get(name)}
    return Result(
        task=task.name,
        cell=cell,
        main=main,
        figures=task.figures([(one.scores, one.facts) for one in done]),
        cost=cost,
        share=share,
        errors=errors,
        minus_unpatched=None if cell.unpatched else _paired(done, full, task.metric),
        minus_random=None
        if cell.methods in (UNPATCHED, "random") or cell.budget == FIXED
        else _paired(done, random, task.metric),
    )


def _paired(first: Sequence[Answer], second: Sequence[Answer], metric: str) -> Comparison | None:
    other = {one.sample: one for one in second if one.error is None}
    pairs = [(one, other[one.sample]) for one in first if one.error is None and one.sample in other]
    if not pairs:
        return None
    one, two = ([answer.scores[metric] for answer in side] for side in zip(*pairs, strict=True))
    return paired_bootstrap(one, two, [answer.cluster for answer, _ in pairs])


def _mean_costs(answers: Sequence[Answer]) -> dict[str, float]:
    names = dict.fromkeys(name for one in answers for name in one.cost)
    return {name: float(np.mean([one.cost[name] for one in answers if name in one.cost])) for name in names}


def _times(clock: Sequence[BatchTime]) -> dict[str, float]:
    """Milliseconds per prompt by stage."""
    count = sum(len(one.samples) for one in clock)
    if not count:
        return {}
    stages = dict.fromkeys(name for one in clock for name in one.ms)
    found = {f"{name}_ms": sum(one.ms.get(name, 0.0) for one in clock) / count for name in stages}
    found["prefill_ms"] = sum(one.ms.get(name, 0.0) for one in clock for name in _BEHIND_ENCODER) / count
    return found


def _between(points: Sequence[tuple[float, float]], share: float) -> float | None:
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left <= share <= right:
            return low if right == left else low + (high - low) * (share - left) / (right - left)
    return None
