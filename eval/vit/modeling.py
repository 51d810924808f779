"""The classifier: a stock timm vision transformer, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from vlm_budget.eval.nano.scene import CANVAS
from vlm_budget.eval.vit.pages import CLASSES, PATCH

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class VitConfig:
    """Arguments of ``timm.models.vision_transformer.VisionTransformer``; images and patches are those of the pages."""

    embed_dim: int = 128
    depth: int = 8
    num_heads: int = 4
    mlp_ratio: float = 3.0


def build_model(config: VitConfig) -> VisionTransformer:
    """The model with random weights, 144 patch tokens and a class token that is pooled."""
    from timm.models.vision_transformer import VisionTransformer

    # timm's default start, a standard deviation of 0.02 whatever the width, leaves so narrow a model slow to learn.
    return VisionTransformer(
        img_size=CANVAS, patch_size=PATCH, num_classes=CLASSES, weight_init="jax", **asdict(config)
    )


def save(model: VisionTransformer, config: VitConfig, folder: Path) -> None:
    """Write weights (float16, to halve the file) and configuration to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=1) + "\n")


def load_from(folder: Path) -> VisionTransformer:
    """Read a saved model: evaluation mode, float32, on the CPU."""
    model = build_model(VitConfig(**json.loads((folder / CONFIG).read_text())))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()})
    return model.eval()


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Predicted classes, int64 [n]."""
    return torch.cat([model(part).argmax(-1) for part in images.split(batch)])
