"""Forwards inside ``generate`` that are not its own: of a logits processor, a stopping criterion, a verifier.

They are about other prompts, so what ``generate`` was given must not be taken for theirs. While one runs, the state of
the ``generate`` lies aside, and the call is like any forward outside.
"""

from __future__ import annotations

from typing import Any

from .account import Account, Accounts
from .local import CallLocal

Aside = tuple[dict[str, Any], Account]
"""State of the calls in progress, and their account."""

_OWN: dict[str, Any] = {"generating": None, "own": None, "latest": {}, "selection": None, "known": ()}


def is_own(local: CallLocal, cache: Any, cached: int, length: int, brings: bool) -> bool:
    """Whether a forward inside ``generate`` is one of its steps; the first one is.

    Args:
        local: State of the thread's calls.
        cache: What the forward was given.
        cached: Columns in it.
        length: Columns behind the call, cached ones included.
        brings: The call brings pixels or features.
    """
    first = getattr(local, "own", None)
    if first is not None and (cached and not brings):
        return True  # a step of decoding: nothing is chosen anew, whoever asks
    if first is not None and (cache is not first[0] or (cache is None and length != first[1] + 1)):
        return False  # ``generate`` holds on to its cache; without one, it brings its prompts again, a token longer
    local.own = (cache, length)
    return True


def set_aside(local: CallLocal, accounts: Accounts) -> Aside:
    """Forget the ``generate`` in progress, for a call that has nothing to do with it.

    Returns:
        What :func:`put_back` needs.
    """
    kept = {name: getattr(local, name, empty) for name, empty in _OWN.items()}
    clear(local)
    return kept, accounts.current()


def put_back(local: CallLocal, accounts: Accounts, aside: Aside) -> None:
    """Go on with what was set aside."""
    kept, account = aside
    vars(local).update(kept)
    if account.stages["prefill"]:  # else the call inside was all there was, as with a `custom_generate`
        accounts.reopen(account)


def clear(local: CallLocal) -> None:
    """Forget the last call: what it was given, its features, and what was read of it."""
    vars(local).update(_OWN)
