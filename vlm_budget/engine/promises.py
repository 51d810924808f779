"""Methods are held to their promises, on a device that computes behind the host's back too."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import SelectionError

LATE = " (told late, for a CUDA device is not waited for: this is about an earlier prompt, one that has run already)"


@dataclass(frozen=True, eq=False)
class _Promise:
    """Counts on their way to the host.

    Attributes:
        copy: [n] int64, garbage until ``arrived``.
        arrived: In the device's work.
        promised: What they must be.
        claim: Who promised.
        thread: Whose call it was.
    """

    copy: torch.Tensor
    arrived: torch.cuda.Event
    promised: list[int]
    claim: str
    thread: int = field(default_factory=threading.get_ident)


class Promises:
    """Counts that tokens were promised for, compared with the counts kept as soon as these are known.

    On the host that is at once. A CUDA device is not waited for: the counts are copied in its own time, and compared
    when they have arrived, at the latest when someone asks for a report. Any thread may ask; a broken promise is told
    once. Copies start empty.
    """

    def __init__(self) -> None:
        self._open: list[_Promise] = []
        self._lock = threading.Lock()

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
            if fault := _fault(kept, promised, claim):
                raise SelectionError(fault)
            return
        copy = kept.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(kept.device))
        with self._lock:
            self._open.append(_Promise(copy, arrived, promised, claim))

    def settle(self, wait: bool = False) -> None:
        """Compare what has arrived.

        Args:
            wait: Also wait for what has not, and tell of broken promises of other threads' calls, too.

        Raises:
            SelectionError: Promises were broken.
        """
        if not self._open:
            return
        with self._lock:
            waiting = list(self._open)
        me, faults = threading.get_ident(), []
        for promise in waiting:  # not under the lock: others may go on while this thread waits
            if wait:
                promise.arrived.synchronize()
            elif not promise.arrived.query():
                continue
            fault = _fault(promise.copy, promise.promised, promise.claim)
            if fault and not wait and promise.thread != me:
                continue  # a call that did nothing wrong does not fail of another's
            if self._take(promise) and fault:
                faults.append(fault + LATE)
        if faults:
            raise SelectionError("\n".join(faults))

    def _take(self, promise: _Promise) -> bool:
        """Take a promise off the list; False where another thread was faster."""
        with self._lock:
            if promise not in self._open:
                return False
            self._open.remove(promise)
            return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Promises:
        return type(self)()

    def __reduce__(self) -> tuple[type[Promises], tuple[()]]:
        return (type(self), ())


def _fault(kept: torch.Tensor, promised: list[int], claim: str) -> str | None:
    found = kept.tolist()
    return None if found == promised else f"{claim} {promised} tokens and kept {found}"
