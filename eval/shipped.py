"""Models that are shipped in a package of their own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from vlm_budget.errors import UnknownNameError


def shipped_folder(weights: Path, name: str, names: Sequence[str], what: str = "model") -> Path:
    """The folder of a shipped model.

    Args:
        weights: The folder that holds those of a package.
        name: What is asked for.
        names: What there is.
        what: For the message.

    Raises:
        UnknownNameError: No such model; the message suggests.
    """
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(f"no embedded {what} is called {name!r}.{hint} There are: {', '.join(names)}.")
    return weights / name
