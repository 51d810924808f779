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
