"""A small video diffusion model of our own, and what sparse attention does to its clips.

`load` gives ``nano-video``, a ``WanTransformer3DModel`` of a few million parameters in a small pipeline, with no
download. It makes clips of 12 x 40 x 40 pixels of two shapes that move over a mosaic. It is synthetic and small: that
sparse attention keeps its clips says that the machinery is right; it predicts no figure of released models. The model
card in its folder has data, recipe and limits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlm_budget.errors import MissingExtraError
from vlm_budget.eval.shipped import shipped_folder

if TYPE_CHECKING:
    from .pipeline import NanoVideoPipeline

__all__ = ["folder", "load", "names"]

_NAMES = ("nano-video",)
_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """The published models."""
    return _NAMES


def folder(name: str = "nano-video") -> Path:
    """The folder of a published model.

    Raises:
        UnknownNameError: No such model.
    """
    return shipped_folder(_WEIGHTS, name, _NAMES, "video model")


def load(name: str = "nano-video") -> NanoVideoPipeline:
    """The pipeline of a published model, or of a folder that training wrote, in float32 on the CPU.

    Args:
        name: ``nano-video``, or the path of a folder with ``transformer/``.

    Raises:
        UnknownNameError: No such model, and no such folder.
        MissingExtraError: diffusers is not installed.
        ModelLoadError: The folder holds no model.
    """
    path = Path(name) if name not in _NAMES and Path(name).is_dir() else folder(name)
    try:
        from .pipeline import load_from
    except ImportError as error:
        raise MissingExtraError(
            f"video models need diffusers: pip install 'vlm-budget[diffusers]' ({error})"
        ) from error
    return load_from(path)
