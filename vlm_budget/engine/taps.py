"""Taps on two methods of one model instance: they watch a call pass by, and change nothing.

Since transformers 5.19 ``generate`` encodes images *before* the model's forward and drops the processor's inputs
(``image_sizes``, grids), so no module hook ever sees them. A tap is a small callable kept in the instance's own
``__dict__`` in front of the class's method. It is an object, not a closure: it finds its model through an attribute, so
``deepcopy`` and pickle carry it over to the copied model, and taking it away leaves the instance as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Watcher = Callable[..., Any]


class Tap:
    """Stands before ``owner.<name>`` and hands every call to ``watch(call, args, kwargs)``.

    Args:
        owner: The module whose method is watched.
        name: The method's name, as defined on the module's class.
        watch: Called with the bound original and its arguments; must return what the original returns. A bound method
            of a module-level class, so that it copies and pickles.
    """

    def __init__(self, owner: torch.nn.Module, name: str, watch: Watcher) -> None:
        self.owner = owner
        self.name = name
        self.watch = watch
        self.replaced: Callable[..., Any] | None = None  # what the user had put on the instance

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The original, so that ``inspect.signature`` (which transformers calls) sees its parameters."""
        return self.replaced or getattr(type(self.owner), self.name).__get__(self.owner)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original under the watcher's eyes."""
        return self.watch(self.__wrapped__, args, kwargs)

    def attach(self) -> None:
        """Put the tap in place."""
        self.replaced = self.owner.__dict__.get(self.name)
        self.owner.__dict__[self.name] = self

    def detach(self) -> None:
        """Take the tap away."""
        if self.replaced is None:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self.replaced
