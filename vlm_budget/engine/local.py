"""State of one call, kept apart per thread.

A patched model may serve several ``generate`` calls at once, each on its own thread. Whatever a hook has to remember
between two points of one call lives here, so calls cannot see each other. Copies start empty: the state of a running
call is not part of a model.
"""

from __future__ import annotations

import threading
from typing import Any


class CallLocal(threading.local):
    """A bag of attributes per thread that deep-copies and pickles as an empty one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CallLocal:
        return type(self)()

    def __reduce__(self) -> tuple[type[CallLocal], tuple[()]]:
        return (type(self), ())


class RunningThreads:
    """Which threads are inside the language model. Copies start empty."""

    def __init__(self) -> None:
        self._idents: set[int] = set()

    def enter(self) -> None:
        """This thread has begun a call."""
        self._idents.add(threading.get_ident())

    def leave(self) -> None:
        """This thread has ended its call."""
        self._idents.discard(threading.get_ident())

    def others(self) -> int:
        """How many other live threads are in a call; the mark of an interrupted one fades with its thread."""
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        return len(self._idents & alive)

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningThreads:
        return type(self)()

    def __reduce__(self) -> tuple[type[RunningThreads], tuple[()]]:
        return (type(self), ())
