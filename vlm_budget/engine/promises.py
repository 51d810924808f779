"""Methods are held to their promises, on a device that computes behind the host's back too."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from ..errors import SelectionError


class Promises:
    """Counts that tokens were promised for, compared with the counts kept as soon as these are known.

    On the host that is at once. A CUDA device is not waited for: the counts are copied in its own time, and compared
    when they have arrived, at the latest when someone asks for a report. Copies start empty.
    """

    def __init__(self) -> None:
        self._open: deque[tuple[torch.Tensor, torch.cuda.Event, list[int], str]] = deque()

    def expect(self, kept: torch.Tensor, promised: list[int], claim: str) -> None:
        """Hold someone to a promise.

        Args:
            kept: [n] int64, the counts.
            promised: What they must be.
            claim: Who promised, for the message.

        Raises:
            SelectionError: They are not, and the host knows.
        """
        if kept.device.type != "cuda":
            _compare(kept, promised, claim)
            return
        copy = kept.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(kept.device))
        self._open.append((copy, arrived, promised, claim))

    def settle(self, wait: bool = False) -> None:
        """Compare what has arrived.

        Args:
            wait: Also wait for what has not.

        Raises:
            SelectionError: A promise was broken.
        """
        while self._open:
            copy, arrived, promised, claim = first = self._open.popleft()
            if wait:
                arrived.synchronize()
            elif not arrived.query():
                self._open.appendleft(first)
                return
            _compare(copy, promised, claim)

    def __deepcopy__(self, memo: dict[int, Any]) -> Promises:
        return type(self)()

    def __reduce__(self) -> tuple[type[Promises], tuple[()]]:
        return (type(self), ())


def _compare(kept: torch.Tensor, promised: list[int], claim: str) -> None:
    found = kept.tolist()
    if found != promised:
        raise SelectionError(f"{claim} {promised} tokens and kept {found}")
