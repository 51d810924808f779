"""Two 7B models in their released shapes with random weights, made on the device, and prompts of so many tiles.

Nothing is downloaded, and no weight exists on the host. Twins of a few thousand weights run the same code elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

PROMPT = 32
FAMILIES = ("llava_next", "qwen2_5_vl")
GRIDS = {2: (1, 1), 3: (1, 2), 4: (1, 3), 5: (2, 2)}
"""Rows and columns of crops that make so many tiles of LLaVA-NeXT, the thumbnail included."""

CLIP = {
    # Released: CLIP-L/14 at 336 pixels.
    "real": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    | {"image_size": 336, "patch_size": 14},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    | {"image_size": 56, "patch_size": 14},
}
VICUNA = {
    "real": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    | {"intermediate_size": 11008, "vocab_size": 32064, "max_position_embeddings": 8192},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 28, "num_attention_heads": 4, "num_key_value_heads": 4}
    | {"intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 8192},
}
QWEN_VISION = {
    "real": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584}
    | {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
    "tiny": {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    | {"window_size": 112, "fullatt_block_indexes": [1, 2]},
}
QWEN_TEXT = {
    "real": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 28, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 8192},
}
MROPE = {"real": [16, 24, 24], "tiny": [2, 3, 3]}
SIDE = {"real": 24, "tiny": 4}
"""Tokens along one side of a tile, in both models."""


@dataclass(frozen=True, eq=False)
class Large:
    """A model and what is needed to prompt it.

    Attributes:
        family: One of ``FAMILIES``.
        size: ``"real"`` or ``"tiny"``.
        model: The ``...ForConditionalGeneration`` model, in eval mode; generation never ends by itself.
    """

    family: str
    size: str
    model: Any

    @property
    def tower(self) -> Any:
        """The vision tower, with the merger where that is a part of it."""
        inner = self.model.model
        return inner.visual if self.family == "qwen2_5_vl" else inner.vision_tower

    @property
    def decoder(self) -> Any:
        """The language model."""
        return self.model.model.language_model

    @property
    def tiles(self) -> tuple[int, ...]:
        """How many tiles a prompt can have. LLaVA-NeXT never has one alone: a thumbnail goes with every crop."""
        return tuple(GRIDS) if self.family == "llava_next" else (1, 2, 3, 4, 5)

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the model."""
        text = self.model.config.text_config
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        return {
            "family": self.family,
            "size": self.size,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "attention": text._attn_implementation,
            "vision_attention": self.model.config.vision_config._attn_implementation,
            **{name: getattr(text, name) for name in (*names, "vocab_size")},
        }

    def inputs(self, tiles: int, batch: int) -> dict[str, torch.Tensor]:
        """Per row one image of so many tiles and a short question; all rows are of one length.

        Args:
            tiles: For LLaVA-NeXT the thumbnail counts; for Qwen2.5-VL an image with as many tokens as so many tiles.
            batch: Rows.
        """
        weight = next(self.model.parameters())
        make = self._qwen if self.family == "qwen2_5_vl" else self._llava
        given = make(tiles, batch)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        if "mm_token_type_ids" not in signature(self.model.model.forward).parameters:  # transformers 4
            given.pop("mm_token_type_ids", None)
        return {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in given.items()
        }

    def _llava(self, tiles: int, batch: int) -> dict[str, torch.Tensor]:
        config, (rows, cols), side = self.model.config, GRIDS[tiles], SIDE[self.size]
        pixels = config.vision_config.image_size
        visual = side * side + rows * side * (cols * side + 1)
        ids = [1, *[config.image_token_index] * visual, *range(10, 10 + PROMPT)]
        return {
            "input_ids": torch.tensor([ids] * batch),
            "pixel_values": torch.randn(batch, tiles, 3, pixels, pixels),
            "image_sizes": torch.tensor([[rows * pixels, cols * pixels]] * batch),
        }

    def _qwen(self, tiles: int, batch: int) -> dict[str, torch.Tensor]:
        config, vision, side = self.model.config, self.model.config.vision_config, SIDE[self.size]
        merge = vision.spatial_merge_size
        grid = (1, side * merge, side * merge * tiles)
        begin, image, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
        row = [begin, *[image] * (side * side * tiles), end, *range(10, 10 + PROMPT)]
        ids = torch.tensor([row] * batch)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == image).int(),
            "pixel_values": torch.randn(batch * grid[1] * grid[2], width),
            "image_grid_thw": torch.tensor([grid] * batch),
        }


def build(family: str, size: str, device: torch.device, dtype: torch.dtype, attention: str | None = None) -> Large:
    """The model, its weights drawn on the device in their final number format.

    Args:
        family: One of ``FAMILIES``.
        size: ``"real"`` or ``"tiny"``.
        device: Where to.
        dtype: Of the weights.
        attention: ``attn_implementation``; :func:`best_attention` if not given.
    """
    torch.manual_seed(0)
    config, make = _qwen_config(size) if family == "qwen2_5_vl" else _llava_config(size)
    with torch.device(device), default_dtype(dtype):
        model = make(config).eval()
    model.set_attn_implementation(attention or best_attention(device, dtype))
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return Large(family, size, model)


def best_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Flash attention where it is installed and can run, else torch's fused attention."""
    from transformers.utils import is_flash_attn_2_available

    half = dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if device.type == "cuda" and half and is_flash_attn_2_available() else "sdpa"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors are of this type meanwhile, unless they say otherwise (rotary tables do)."""
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(earlier)


def _llava_config(size: str) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    pixels: int = CLIP[size]["image_size"]
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP[size]),
        text_config=LlamaConfig(**VICUNA[size], bos_token_id=1, eos_token_id=2, pad_token_id=0),
        image_token_index=7,
        image_grid_pinpoints=[[rows * pixels, cols * pixels] for rows, cols in GRIDS.values()],
        vision_feature_layer=-2,
    ), LlavaNextForConditionalGeneration


def _qwen_config(size: str) -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "type": "default", "mrope_section": MROPE[size]}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Qwen2_5_VLConfig(
        # transformers 4 and 5 both read these two names of the rotary settings.
        text_config={**QWEN_TEXT[size], **ids, "rope_scaling": rope, "rope_theta": 1_000_000.0},
        vision_config={**QWEN_VISION[size], "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=7,
        video_token_id=8,
        vision_start_token_id=5,
        vision_end_token_id=6,
    ), Qwen2_5_VLForConditionalGeneration
