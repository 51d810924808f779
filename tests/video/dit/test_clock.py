"""Which step a forward belongs to: by a scheduler, by a list of timesteps, by their number, by nothing."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_budget.errors import OptionError, PatchError
from vlm_budget.video.dit.clock import Clock, Tick


class Pipeline:
    """What a clock reads of one."""

    def __init__(self, values: list[float], **scheduler: Any) -> None:
        self.scheduler = SimpleNamespace(timesteps=torch.tensor(values), **scheduler)
        self._current_timestep: Any = None


def steps(clock: Clock, values: list[Any], name: str = "transformer") -> list[tuple[int, int, bool]]:
    found = [clock.tick(name, value) for value in values]
    return [(tick.step, tick.branch, tick.fresh) for tick in found]


def test_a_count_follows_falling_values() -> None:
    clock = Clock(timesteps=3)
    assert steps(clock, [900.0, 900.0, 500.0, 500.0, 100.0]) == [
        (0, 0, True),
        (0, 1, False),
        (1, 0, False),
        (1, 1, False),
        (2, 0, False),
    ]
    assert clock.tick("transformer", 900.0) == Tick(0, 3, 0, True)


def test_a_list_of_timesteps_finds_each_step_and_a_skipped_beginning() -> None:
    clock = Clock(timesteps=[900.0, 600.0, 300.0, 0.0])
    assert clock.tick("transformer", torch.tensor([600.0, 600.0])) == Tick(0, 3, 0, True)
    assert clock.tick("transformer", 0.0) == Tick(2, 3, 0, False)
    assert clock.tick("transformer", 900.0) == Tick(0, 4, 0, True)
    with pytest.raises(OptionError, match="not among timesteps"):
        clock.tick("transformer", 450.0)


def test_timesteps_of_tokens_count_by_their_largest() -> None:
    """Image to video: tokens of the given picture are at zero."""
    clock = Clock(timesteps=2)
    at = torch.tensor([[0.0, 900.0, 900.0]])
    assert [tick[:2] for tick in steps(clock, [at, at, at - 100])] == [(0, 0), (0, 1), (1, 0)]


def test_half_precision_timesteps_are_found_in_a_list() -> None:
    schedule = [float(value) for value in torch.linspace(1000, 20, 50)]
    clock = Clock(timesteps=schedule)
    seen = [clock.tick("transformer", torch.tensor([value]).to(torch.float16)).step for value in schedule]
    assert seen == list(range(50))


def test_nothing_told_counts_on_without_a_number_of_steps() -> None:
    clock = Clock()
    assert not clock.counts
    assert clock.tick("transformer", 900.0) == Tick(0, None, 0, True)
    assert clock.tick("transformer", torch.tensor(500)) == Tick(1, None, 0, False)


def test_a_run_of_one_step_ends_where_the_next_timestep_is_higher() -> None:
    clock = Clock(timesteps=4)
    for timestep in (10.0, 300.0, 600.0):
        assert clock.tick("transformer", timestep) == Tick(0, 4, 0, True)
        assert clock.tick("transformer", timestep) == Tick(0, 4, 1, False)
    assert clock.tick("transformer", 500.0) == Tick(1, 4, 0, False)


def test_timesteps_may_rise() -> None:
    clock = Clock(timesteps=3, rising=True)
    seen = [clock.tick("transformer", timestep) for timestep in (0.0, 300.0, 600.0, 0.0, 300.0)]
    assert [tick.step for tick in seen] == [0, 1, 2, 0, 1]
    assert [tick.fresh for tick in seen] == [True, False, False, True, False]
    clock = Clock(timesteps=[0.0, 300.0, 600.0])
    assert [clock.tick("transformer", timestep).step for timestep in (0.0, 300.0, 600.0)] == [0, 1, 2]


def test_reset_begins_a_run_at_the_same_timestep() -> None:
    clock = Clock(timesteps=1)
    assert clock.tick("transformer", 900.0).fresh
    assert not clock.tick("transformer", 900.0).fresh
    clock.reset()
    assert clock.tick("transformer", 900.0) == Tick(0, 1, 0, True)


def test_a_pipelines_timestep_is_found_by_its_place_in_memory_and_never_read() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    clock = Clock(pipeline)
    found = []
    for timestep in pipeline.scheduler.timesteps:
        pipeline._current_timestep = timestep
        # After the first, values that would raise if anything read them.
        given = timestep.expand(2) if not found else torch.empty(2, device="meta")
        found += [clock.tick("transformer", given), clock.tick("transformer", given)]
    assert [(tick.step, tick.steps, tick.branch, tick.fresh) for tick in found] == [
        (step, 3, branch, step == branch == 0) for step in range(3) for branch in range(2)
    ]


def test_the_transformers_own_timestep_tells_the_place_too() -> None:
    pipeline = Pipeline([900.0, 600.0])
    clock = Clock(pipeline)
    schedule = pipeline.scheduler.timesteps
    assert [tick[0] for tick in steps(clock, [schedule[0].expand(2), schedule[1].expand(2)])] == [0, 1]


def test_step_index_is_read_where_timesteps_lie_elsewhere() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0], step_index=None, begin_index=None)
    clock = Clock(pipeline)
    assert clock.tick("transformer", torch.tensor([900.0])) == Tick(0, 3, 0, True)
    pipeline.scheduler.step_index = 1
    assert clock.tick("transformer", torch.empty(2, device="meta")) == Tick(1, 3, 0, False)


def test_new_timesteps_are_a_new_run() -> None:
    pipeline = Pipeline([900.0, 600.0], step_index=0)
    clock = Clock(pipeline)
    assert clock.tick("transformer", 900.0).fresh
    assert clock.tick("transformer", 900.0).branch == 1
    pipeline.scheduler.timesteps = pipeline.scheduler.timesteps.clone()
    assert clock.tick("transformer", 900.0) == Tick(0, 2, 0, True)


def test_branches_are_counted_for_each_transformer() -> None:
    clock = Clock(timesteps=2)
    assert steps(clock, [900.0, 900.0], "transformer")[1] == (0, 1, False)
    assert steps(clock, [100.0, 100.0], "transformer_2") == [(1, 0, False), (1, 1, False)]
    assert clock.tick("transformer", 100.0).branch == 0


def test_runs_of_one_timestep_are_not_taken_for_branches_without_end() -> None:
    clock = Clock(timesteps=1)
    with pytest.raises(PatchError, match="reset"):
        steps(clock, [900.0] * 33)


@pytest.mark.parametrize("index", [0, 3])
def test_another_schedulers_timestep_is_refused(index: int) -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0], step_index=index)
    with pytest.raises(PatchError, match="Patch the pipeline that you run"):
        Clock(pipeline).tick("transformer", torch.tensor([750.0]))


def test_a_pipeline_that_is_gone_is_told() -> None:
    clock = Clock(Pipeline([900.0]))
    with pytest.raises(PatchError, match="is gone"):
        clock.tick("transformer", 900.0)


def test_copies_are_without_the_pipeline_unless_it_is_copied_along() -> None:
    pipeline = Pipeline([900.0, 600.0], step_index=1)
    clock = Clock(pipeline)
    clock.tick("transformer", 600.0)
    for twin in (copy.deepcopy(clock), pickle.loads(pickle.dumps(clock))):
        assert not twin.counts
        assert twin.tick("transformer", 5.0) == Tick(0, None, 0, True)
    pipeline.clock = clock  # type: ignore[attr-defined]
    other = copy.deepcopy(pipeline)
    other.scheduler.step_index = 0
    assert other.clock.tick("transformer", 900.0) == Tick(0, 2, 0, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("timesteps", [0, -1, True, [], [1.0, 2.0, 0.0], [5.0, 5.0], "many", [[1.0]], object()])
def test_timesteps_that_are_none_are_refused(timesteps: Any) -> None:
    with pytest.raises(OptionError, match="timesteps"):
        Clock(timesteps=timesteps)
