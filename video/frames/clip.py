"""Frame scores of CLIP-like models, through open_clip.

A model trained with a sigmoid loss (SigLIP) has a bias and says itself how likely a picture and a text belong together:
``sigmoid(scale * cos + bias)``. One trained with a softmax only compares texts. Its score is the share that the clue
gets of a softmax over the clue and a neutral text, ``sigmoid(scale * (cos(frame, clue) - cos(frame, neutral)))``; that
reading is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_budget.errors import MissingExtraError, ModelLoadError, OptionError

if TYPE_CHECKING:
    from PIL import Image

    from .scorers import Progress

_CONFIG = "open_clip_config.json"


class ClipScorer:
    """How near frames and texts are to a CLIP-like model.

    A text longer than the model reads (77 tokens for most) is cut off by its tokenizer.

    Args:
        model: An open_clip model, in evaluation mode on its device.
        preprocess: Picture to tensor, as open_clip gives it.
        tokenizer: Texts to token ids, as open_clip gives it.
        batch: Frames per forward.
        template: How a clue becomes a caption.
        neutral: What a clue is weighed against, for models without a bias.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Any,
        tokenizer: Any,
        *,
        batch: int = 32,
        template: str = "{}",
        neutral: str = "a photo",
    ) -> None:
        if batch < 1:
            raise OptionError(f"frames per forward must be at least 1, got {batch}")
        self.model = model
        self.batch = batch
        self._preprocess, self._tokenizer = preprocess, tokenizer
        self._template, self._neutral = template, neutral

    @classmethod
    def load(cls, name: str, device: str = "cpu", **options: Any) -> ClipScorer:
        """Load a model.

        Args:
            name: A folder in open_clip's format, ``"ARCHITECTURE/PRETRAINED"`` such as ``"ViT-B-16-SigLIP/webli"``, or
                ``"hf-hub:ORGANISATION/MODEL"``.
            device: Where to run it.
            options: Of the scorer.

        Raises:
            MissingExtraError: open_clip is not installed.
            ModelLoadError: The model is not there or cannot be loaded.
        """
        try:
            import open_clip
        except ImportError as error:
            raise MissingExtraError(
                "scoring frames with CLIP needs open_clip: pip install 'vlm-budget[vision]'"
            ) from error
        source, tag = _source(name)
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(source, pretrained=tag, device=device)
            tokenizer = open_clip.get_tokenizer(source)
        except Exception as error:  # foreign files and hubs raise anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelLoadError(f"cannot load the scorer {name!r}: {reason}") from error
        return cls(model.eval(), preprocess, tokenizer, **options)

    @torch.no_grad()
    def score(
        self, frames: Sequence[Image.Image], clues: Sequence[str], progress: Progress | None = None
    ) -> torch.Tensor:
        """[T, C] float32 in [0, 1] on the CPU."""
        if not clues:  # tokenizers refuse an empty list
            return torch.zeros(len(frames), 0)
        biased = getattr(self.model, "logit_bias", None) is not None
        captions = [self._template.format(clue) for clue in clues]
        texts = self._texts(captions if biased else [*captions, self._neutral])
        scale = self.model.logit_scale.float().exp()
        rows = []
        for start in range(0, len(frames), self.batch):
            part = frames[start : start + self.batch]
            cosine = self.features(part) @ texts.T
            logits = scale * cosine + self.model.logit_bias if biased else scale * (cosine[:, :-1] - cosine[:, -1:])
            rows.append(logits.sigmoid().cpu())
            if progress is not None:
                progress(start + len(part), len(frames))
        return torch.cat(rows) if rows else torch.zeros(0, len(clues))

    @torch.no_grad()
    def features(self, frames: Sequence[Image.Image]) -> torch.Tensor:
        """[T, D] float32 of length 1, what the model sees in each frame."""
        weight = next(self.model.parameters())
        pixels = torch.stack([self._preprocess(frame.convert("RGB")) for frame in frames])
        return _unit(self.model.encode_image(pixels.to(weight.device, weight.dtype)))

    def _texts(self, captions: Sequence[str]) -> torch.Tensor:
        weight = next(self.model.parameters())
        return _unit(self.model.encode_text(self._tokenizer(list(captions)).to(weight.device)))


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _source(name: str) -> tuple[str, str | None]:
    """The name and the pretrained tag that open_clip takes.

    Raises:
        ModelLoadError: A folder that is missing or holds no open_clip model, or an architecture without a tag.
    """
    if name.startswith("hf-hub:"):
        return name, None
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if name.startswith("local-dir:") or path.is_dir() or name.startswith((".", "~", "/")):
        if not (path / _CONFIG).is_file():
            raise ModelLoadError(f"{str(path)!r} is no folder of an open_clip model: there is no {_CONFIG} in it")
        return f"local-dir:{path}", None
    architecture, slash, tag = name.partition("/")
    if not slash or not tag:
        raise ModelLoadError(
            f"{name!r} names no weights: write ARCHITECTURE/PRETRAINED, such as 'ViT-B-32/openai', or a folder"
        )
    return architecture, tag
