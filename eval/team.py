"""The processes of one run: a single one, or those that ``accelerate launch`` (or ``torchrun``) started."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from vlm_budget.errors import VLMBudgetError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Who shares the work.

    Attributes:
        rank: Which process this is.
        size: How many there are, over all machines.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str = "auto") -> Team:
        """Meet the others, if there are any, and take this process's accelerator.

        Args:
            device: ``"cpu"`` where accelerators are to be left alone.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        return cls(state.process_index, state.num_processes)

    @property
    def leads(self) -> bool:
        """This process does what only one may do."""
        return self.rank == 0

    def once(self, call: Callable[[], T]) -> T:
        """What the leading process's call gives, in every process; nobody goes on before it is done.

        Raises:
            VLMBudgetError: What it raised there, in every process.
        """
        if self.size == 1:
            return call()
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None, None]
        if self.leads:
            try:
                box[0] = call()
            except VLMBudgetError as error:
                box[1] = error
        broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
