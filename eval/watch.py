"""Live progress of a run on stderr: rate, time left, running accuracy."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from vlm_budget.eval.runner import Worker

_REDRAW_S = 0.5
_LINE_S = 30.0


class Progress(Protocol):
    """Told of every batch."""

    def begin(self, owed: int) -> None:
        """The run begins.

        Args:
            owed: Answers that this process owes.
        """
        ...

    def update(self, worker: Worker) -> None:
        """A batch is done."""
        ...


class Live:
    """A bar on a terminal, a line every half minute elsewhere. No thread redraws it: it would cost the model its core.

    Args:
        bar: What draws.
    """

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        self.task = bar.add_task("", total=None, told="")
        self.begin(0)

    def begin(self, owed: int) -> None:
        """The run begins; the first batch starts the clock."""
        self.owed = owed
        self._started = self._drawn = time.monotonic()
        self.bar.update(self.task, total=owed or None)

    def update(self, worker: Worker) -> None:
        """Draw, unless that was done just now."""
        now = time.monotonic()
        if now - self._drawn < (_LINE_S if self.bar.disable else _REDRAW_S):
            return
        self._drawn = now
        rate = worker.asked / (now - self._started)
        told = f"{rate:.1f}/s{_accuracy(worker)}" + (f", {worker.failed} errors" if worker.failed else "")
        if self.bar.disable:
            left = timedelta(seconds=round(max(0, self.owed - worker.asked) / rate)) if rate else "?"
            done = f"{worker.asked} of {self.owed} answers"
            print(f"{worker.task}: {done}, {told}, {left} left", file=sys.stderr, flush=True)
        self.bar.update(self.task, completed=worker.asked, description=worker.task, told=told, refresh=True)


@contextmanager
def live(shown: bool = True) -> Iterator[Live | None]:
    """Progress on stderr.

    Args:
        shown: Show it at all.
    """
    if not shown:
        yield None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as bar:
        yield Live(bar)


def _accuracy(worker: Worker) -> str:
    parts = []
    for unpatched, name in ((True, "unpatched"), (False, "pruned")):
        total, count = worker.right[unpatched]
        if count:
            parts.append(f"{name} {total / count:.3f}")
    return ", " + ", ".join(parts) if parts else ""
