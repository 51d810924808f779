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

from pathlib import Path
from typing import TYPE_CHECKING

from vlm_budget.eval.shipped import shipped_folder

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
    return shipped_folder(_WEIGHTS, name, _NAMES)


def load(name: str = "nano") -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """Load a published checkpoint in evaluation mode, fp32, on the CPU.

    Raises:
        UnknownNameError: no such checkpoint.
    """
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    path = folder(name)
    model = LlavaNextForConditionalGeneration.from_pretrained(path)
    return model.eval(), AutoProcessor.from_pretrained(path)
