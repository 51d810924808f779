"""Saving a model folder that transformers 4.57 and 5 both load, to the same logits.

As for `nano`, what the two disagree on is settled in favour of names both understand: the SigLIP tower's weight
names (``vision_tower.vision_model.*``, as in released checkpoints), the tokenizer's class name, and the place of
the image and video processors' settings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from vlm_budget.eval.nano.export import WEIGHTS, released
from vlm_budget.eval.views.modeling import build_processor

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration


def _write(path: Path, settings: dict[str, object]) -> None:
    kept = {key: value for key, value in settings.items() if value is not None}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, default=dict) + "\n")


def save(model: LlavaOnevisionForConditionalGeneration, folder: Path) -> None:
    """Write weights (fp32), configuration, generation settings, processors and tokenizer to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {released(name): tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor = build_processor()
    processor.save_pretrained(folder)
    tokens = {"image_token": processor.image_token, "video_token": processor.video_token}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    changed = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": tokens, "backend": None}
    _write(folder / "tokenizer_config.json", settings | changed)
    images = processor.image_processor.to_dict() | {"image_processor_type": "LlavaOnevisionImageProcessor"}
    _write(folder / "preprocessor_config.json", images)
    videos = processor.video_processor.to_dict() | {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    _write(folder / "video_preprocessor_config.json", videos)
