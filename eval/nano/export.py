"""Saving a model folder that transformers 4.57 and 5 both load, to the same logits.

The two disagree on three things, all settled here in favour of names both understand: the CLIP tower's weight
names (``vision_tower.vision_model.*``, as in released LLaVA checkpoints), the tokenizer's class name, and the
place of the image processor's settings (``preprocessor_config.json``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from vlm_budget.eval.nano.modeling import build_processor

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

WEIGHTS = "model.safetensors"
_TOWER, _RELEASED_TOWER = "model.vision_tower.", "model.vision_tower.vision_model."


def released(name: str) -> str:
    """A weight's name as in released LLaVA checkpoints."""
    return name if name.startswith(_RELEASED_TOWER) else name.replace(_TOWER, _RELEASED_TOWER, 1)


def _rewrite(path: Path, **changes: object) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}, indent=2, sort_keys=True) + "\n")


def save(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Write weights (fp32), configuration, generation settings, processor and tokenizer to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {released(name): tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor = build_processor()
    processor.save_pretrained(folder)
    _rewrite(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        extra_special_tokens={"image_token": processor.image_token},
        backend=None,
    )
    images = processor.image_processor.to_dict() | {"image_processor_type": "LlavaNextImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2, sort_keys=True, default=dict) + "\n")
