"""Which step of a run a forward of the transformer belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm_budget.errors import OptionError, PatchError

_ADVICE = (
    "Patch the pipeline that you run: one made of another's components shares its transformer, not its scheduler. A "
    "loop of your own needs patch(transformer, ..., timesteps=)."
)
_MOST_BRANCHES = 32  # each keeps a state of its own for every layer


@dataclass(frozen=True)
class Tick:
    """One forward in a run.

    Attributes:
        step: From 0.
        steps: Of the run; None where nothing says.
        branch: Which forward of the transformer in this step, from 0.
        fresh: The first forward of a run.
    """

    step: int
    steps: int | None
    branch: int
    fresh: bool


class Clock:
    """Tells steps apart, without waiting for the device where a pipeline drives the transformer.

    A pipeline's steps are read off its scheduler: ``step_index``, or where in ``scheduler.timesteps`` the timestep at
    hand lies in memory, which is known without reading it. A run begins where the scheduler has got new timesteps, or
    steps go back. Only a run's first timestep is read, to be sure that the scheduler is the one that drives this run.

    A transformer without pipeline reads the timestep of every forward: a lower one is the next step, the same one
    another branch of the same step, a higher one a new run; the other way round where timesteps rise.

    Args:
        pipeline: What drives the transformer; None for a loop of the user's own.
        timesteps: For such a loop, the number of steps or their timesteps, in the order of the steps.
        rising: The transformer's timesteps rise during a run.
    """

    def __init__(
        self,
        pipeline: Any = None,
        timesteps: int | Sequence[float] | torch.Tensor | None = None,
        rising: bool = False,
    ) -> None:
        self._rising = rising
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._given = _schedule(timesteps)
        self._count = timesteps if isinstance(timesteps, int) else None
        self.reset()

    @property
    def counts(self) -> bool:
        """The number of a run's steps is known before it begins."""
        return self._pipeline is not None or self._given is not None or self._count is not None

    def reset(self) -> None:
        """Begin a new run with the next forward."""
        self._schedule: torch.Tensor | None = None
        self._value: float | None = None
        self._index = self._first = -1
        self._branches: dict[str, int] = {}

    def tick(self, name: str, timestep: Any) -> Tick:
        """Take note of a forward.

        Args:
            name: Of the transformer; branches are counted for each.
            timestep: What the transformer was given: a number or a tensor of any shape, whose largest entry counts.

        Raises:
            PatchError: The pipeline's scheduler does not drive this forward, the pipeline is gone, or there are more
                forwards in one step than guidance makes.
            OptionError: A timestep is not among those that were given.
        """
        if self._pipeline is not None:
            fresh = self._tick_of_pipeline(self._pipeline(), timestep)
        elif self._given is not None:
            value = _value(timestep)
            near = (self._given - value).abs()
            index = int(near.argmin())
            if float(near[index]) > _tolerance(timestep, value):
                raise OptionError(
                    f"the transformer got the timestep {value:g}, which is not among timesteps="
                    f"[{float(self._given[0]):g} … {float(self._given[-1]):g}]"
                )
            fresh = self._moved_to(index)
        else:
            fresh = self._tick_of_value(_value(timestep))
        return self._told(name, fresh)

    def _tick_of_pipeline(self, pipeline: Any, timestep: Any) -> bool:
        if pipeline is None:
            raise PatchError(f"the pipeline that this transformer was patched in is gone. {_ADVICE}")
        scheduler = pipeline.scheduler
        schedule = scheduler.timesteps
        if schedule is not self._schedule:
            self.reset()
            self._schedule = schedule
        index = _index_of(schedule, getattr(pipeline, "_current_timestep", None))
        if index is None:
            index = _index_of(schedule, timestep)
        if index is None and hasattr(scheduler, "step_index"):
            index = scheduler.step_index
            index = (getattr(scheduler, "begin_index", None) or 0) if index is None else index
        if index is None:
            index = int((schedule.to("cpu", torch.float64) - _value(timestep)).abs().argmin())
        fresh = index < len(schedule) and self._moved_to(index)
        if index >= len(schedule) or (fresh and not _agree(schedule[index], timestep)):
            raise PatchError(
                f"the transformer was called with the timestep {_value(timestep):g}, while the scheduler of the "
                f"patched pipeline stands at step {index} of {len(schedule)}. {_ADVICE}"
            )
        return fresh

    def _moved_to(self, index: int) -> bool:
        """Take note of the place in the schedule; True where a run begins."""
        fresh = self._first < 0 or index < self._index
        if fresh:
            self._first = index
        if fresh or index != self._index:
            self._branches = {}
        self._index = index
        return fresh

    def _tick_of_value(self, value: float) -> bool:
        last, self._value = self._value, value
        if last is not None and value == last:
            return False
        if last is None or (value > last) != self._rising:
            self._first = -1  # a run begins, also behind one of a single step
            return self._moved_to(0)
        return self._moved_to(self._index + 1)

    def _told(self, name: str, fresh: bool) -> Tick:
        schedule = self._schedule if self._schedule is not None else self._given
        steps = self._count if schedule is None else len(schedule) - self._first
        branch = self._branches.get(name, 0)
        if branch >= _MOST_BRANCHES:
            raise PatchError(
                f"the transformer was called {branch + 1} times at one timestep, each time as another branch of the "
                "same step. Where every call is a run of its own, call handle.reset() between them."
            )
        self._branches[name] = branch + 1
        return Tick(self._index - self._first, steps, branch, fresh)

    def __getstate__(self) -> dict[str, Any]:
        """Without the pipeline, which a copy of its transformer does not belong to."""
        return {"_pipeline": None, "_given": self._given, "_count": self._count, "_rising": self._rising}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Clock:
        """With the pipeline's copy, where that is being copied."""
        twin = Clock.__new__(Clock)
        memo[id(self)] = twin
        twin.__setstate__(self.__getstate__())
        pipeline = None if self._pipeline is None else memo.get(id(self._pipeline()))
        twin._pipeline = None if pipeline is None else weakref.ref(pipeline)
        return twin


def _schedule(timesteps: Any) -> torch.Tensor | None:
    if timesteps is None:
        return None
    if isinstance(timesteps, int) and not isinstance(timesteps, bool):
        if timesteps < 1:
            raise OptionError(f"timesteps is the number of steps, at least 1, or a list of timesteps; got {timesteps}")
        return None
    try:
        found = torch.as_tensor(timesteps).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"timesteps is a number of steps or a list of timesteps, got {timesteps!r}") from error
    steps = found.flatten().diff()
    if found.ndim != 1 or not len(found) or not (bool((steps < 0).all()) or bool((steps > 0).all())):
        raise OptionError(f"timesteps must be one list of falling or of rising numbers, got {timesteps!r}")
    return found


def _value(timestep: Any) -> float:
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)


def _tolerance(timestep: Any, value: float) -> float:
    """How far a timestep may be off, for what it lost to its type."""
    exact = not (isinstance(timestep, torch.Tensor) and timestep.is_floating_point())
    return max(abs(value), 1.0) * (1e-5 if exact else max(torch.finfo(timestep.dtype).eps, 1e-5))


def _index_of(schedule: torch.Tensor, timestep: Any) -> int | None:
    """Where in the schedule a timestep lies that is a part of it, by its address; None where it is no part."""
    if not isinstance(timestep, torch.Tensor) or timestep.dtype != schedule.dtype or timestep.device != schedule.device:
        return None
    if any(stride and size > 1 for stride, size in zip(timestep.stride(), timestep.shape, strict=True)):
        return None  # more than one entry of it
    try:
        ours, theirs = (part.untyped_storage().data_ptr() for part in (schedule, timestep))
    except RuntimeError:  # a tensor without storage
        return None
    if not ours or ours != theirs:
        return None
    place, rest = divmod(int(timestep.storage_offset()) - int(schedule.storage_offset()), schedule.stride(0) or 1)
    return place if not rest and 0 <= place < len(schedule) else None


def _agree(scheduled: torch.Tensor, timestep: Any) -> bool:
    """The timestep is the scheduled one, as far as its type can tell. Waits for the device once."""
    if not isinstance(timestep, torch.Tensor):
        return abs(float(scheduled) - timestep) <= _tolerance(timestep, timestep)
    expected, given = scheduled.to(timestep.dtype).to(torch.float32), timestep.max().to(torch.float32)
    return bool((expected - given).abs() <= given.abs().clamp_min(1.0) * _tolerance(timestep, 1.0))
