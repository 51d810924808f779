"""The command line, ``vlm-budget VERB``: a file per verb.

Only typer and rich load here; torch and transformers load inside the verbs that need them.
"""

from __future__ import annotations

from typing import Any


def main() -> None:
    """Entry point of the ``vlm-budget`` command."""
    from .verbs import app

    app()


def __getattr__(name: str) -> Any:
    # Late, so that a verb of a higher floor can import what all verbs share before this app asks for the verb.
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .verbs import app

    return app
