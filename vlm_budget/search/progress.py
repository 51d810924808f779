"""A bar on stderr for work that takes minutes to hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tick = Callable[[int, str], None]


@contextmanager
def bar(total: int, shown: bool) -> Iterator[Tick]:
    """A bar, drawn only on a terminal.

    Args:
        total: Steps in all.
        shown: Draw it at all.

    Yields:
        Call it with the steps that are done and what comes next.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn())
    # No thread redraws it: it would take time from a model that is being measured.
    disabled = not (shown and console.is_terminal)
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=disabled) as progress:
        task = progress.add_task("", total=total)

        def tick(done: int, name: str) -> None:
            progress.update(task, completed=done, description=name, refresh=True)

        yield tick
