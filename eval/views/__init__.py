"""Two synthetic tasks with exact ground truth, and a small model that answers both.

*rooms*: twelve posed RGB-D views of a room; *haystack*: a long clip with short events. `load` gives
``nano-views``, a LLaVA-OneVision trained on them, as a stock HuggingFace model and processor with no download.

It is synthetic and small: a ranking of pruning methods on it predicts no ranking on released VLMs. The model
card in its folder has data, recipe and accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm_budget.eval.shipped import shipped_folder

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

__all__ = ["folder", "load", "names"]

_NAMES = ("nano-views",)
_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The published checkpoints."""
    return _NAMES


def folder(name: str = "nano-views") -> Path:
    """The folder of a published checkpoint, for ``from_pretrained``.

    Raises:
        UnknownNameError: no such checkpoint.
    """
    return shipped_folder(_WEIGHTS, name, _NAMES)


def load(
    name: str = "nano-views",
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """Load a published checkpoint in evaluation mode, fp32, on the CPU.

    Raises:
        UnknownNameError: no such checkpoint.
    """
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    path = folder(name)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(path)
    return model.eval(), AutoProcessor.from_pretrained(path)
