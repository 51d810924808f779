"""nano: a small LLaVA-NeXT trained on procedural posters and shipped with the library.

`load` gives a stock HuggingFace model and processor with no download:

* ``nano``: trained like a released VLM, every token always present. Judge a method that keeps newline tokens
  on it.
* ``nano-robust``: the same, continued with random token dropout that uses no method's signal.

It is synthetic and small. A ranking of pruning methods on it shows that the plumbing is right and the ranking
sensible on sparse posters; it predicts no ranking on released VLMs. The model card in each folder has data,
recipe and accuracy.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_budget.errors import UnknownNameError

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

__all__ = ["folder", "load", "names"]

_NAMES = ("nano", "nano-robust")
_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The published checkpoints."""
    return _NAMES


def folder(name: str = "nano") -> Path:
    """The folder of a published checkpoint, for ``from_pretrained``.

    Raises:
        UnknownNameError: no such checkpoint.
    """
    if name not in _NAMES:
        near = difflib.get_close_matches(str(name), _NAMES, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(f"no embedded model is called {name!r}.{hint} There are: {', '.join(_NAMES)}.")
    return _WEIGHTS / name


def load(name: str = "nano") -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """Load a published checkpoint in evaluation mode, fp32, on the CPU.

    Raises:
        UnknownNameError: no such checkpoint.
    """
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    path = folder(name)
    model = LlavaNextForConditionalGeneration.from_pretrained(path)
    return model.eval(), AutoProcessor.from_pretrained(path)
