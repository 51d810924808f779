"""Progress on stderr that stays out of the measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_REDRAW_S = 0.2


def _bar(console: Console, by_itself: bool) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        auto_refresh=by_itself,
        disable=not console.is_terminal,
    )


@contextmanager
def steps(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar over named steps, redrawn by a thread of its own.

    Yields:
        Call it with a step's name when the step begins.
    """
    with _bar(console, by_itself=True) as progress:
        task = progress.add_task("", total=total)
        begun = 0

        def step(name: str) -> None:
            nonlocal begun
            progress.update(task, description=name, completed=begun, refresh=True)
            begun += 1

        yield step


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over frames, again and again.

    Yields:
        Call it with what is done to them, how many are done, and of how many (0: not known).
    """
    with _bar(console, by_itself=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda name, done, total: progress.update(task, description=name, completed=done, total=total or None)


class Runs:
    """A bar over runs of a model. No thread redraws it, since one would cost the measured run its core."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)
        self._drawn = 0.0
        self._name = ""

    def begin(self, name: str) -> None:
        """A run begins."""
        self._name = name
        self._progress.update(self._task, description=name, refresh=True)

    def token(self, count: int) -> None:
        """The run has made ``count`` tokens."""
        now = time.monotonic()
        if now - self._drawn > _REDRAW_S:
            self._drawn = now
            self._progress.update(self._task, description=f"{self._name}, {count} tokens", refresh=True)

    def end(self) -> None:
        """The run is over."""
        self._progress.advance(self._task)

    def count(self, done: int, total: int) -> None:
        """So many of so many runs are over."""
        self._progress.update(self._task, description="measuring", completed=done, total=total, refresh=True)


@contextmanager
def runs(console: Console, total: int) -> Iterator[Runs]:
    """A bar over ``total`` runs."""
    with _bar(console, by_itself=False) as progress:
        yield Runs(progress, total)


class TokenClock:
    """A ``generate`` streamer that notes when the first token came, and counts."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._start = time.perf_counter()
        self.first_token_ms = 0.0
        self.tokens = -1  # the first call brings the prompt

    def put(self, value: Any) -> None:
        """New ids; waits for nothing, since ``generate`` hands over ids that are on the host."""
        self.tokens += 1
        if self.tokens == 1:
            self.first_token_ms = (time.perf_counter() - self._start) * 1000
        if self.tokens > 0:
            self._on_token(self.tokens)

    def end(self) -> None:
        """Nothing to flush."""
