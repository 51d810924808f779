"""A LLaVA-NeXT of real proportions with random weights, and clocks: what speed is measured with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

SIZES = {
    # vision: hidden, layers, heads, mlp, image, patch; text: hidden, layers, heads, kv heads, mlp, vocabulary
    "real": ((1024, 24, 16, 4096, 336, 14), (896, 24, 14, 2, 4864, 32064)),
    "small": ((128, 4, 4, 256, 112, 14), (128, 12, 4, 2, 256, 1024)),
}
IMAGE_TOKEN = 7
PROMPT = 32


def build(size: str, device: str, dtype: torch.dtype, grid: tuple[int, int] = (2, 2)) -> Any:
    """The model.

    Args:
        size: ``"real"`` (CLIP-L/14 at 336 pixels, a 0.5B-class language model) or ``"small"``.
        device: Where to.
        dtype: Number format of the weights.
        grid: Rows and columns of crops that every image is cut into.
    """
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, Qwen2Config

    (width, layers, heads, mlp, image, patch), (hidden, depth, queries, keys, inner, words) = SIZES[size]
    vision = CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=image,
        patch_size=patch,
    )
    text = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        intermediate_size=inner,
        vocab_size=words,
        tie_word_embeddings=True,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[grid[0] * image, grid[1] * image]],
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(config).to(device, dtype).eval()


def build_inputs(model: Any, device: str, dtype: torch.dtype, batch: int) -> dict[str, torch.Tensor]:
    """One image that fills the model's grid of crops and a short prompt per row."""
    pixels = model.config.vision_config.image_size
    height, width = model.config.image_grid_pinpoints[0]
    rows, cols = height // pixels, width // pixels
    side = pixels // model.config.vision_config.patch_size
    visual = side * side + rows * side * (cols * side + 1)
    row = [1, *[IMAGE_TOKEN] * visual, *range(10, 10 + PROMPT)]
    return {
        "input_ids": torch.tensor([row] * batch, device=device),
        "attention_mask": torch.ones(batch, len(row), dtype=torch.long, device=device),
        "pixel_values": torch.randn(batch, 1 + rows * cols, 3, pixels, pixels, device=device, dtype=dtype),
        "image_sizes": torch.tensor([[height, width]] * batch).to(device),
    }


class Timer:
    """Wall time of a call, with the device drained before and after."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds and the call's result."""
        self.drain()
        start = time.perf_counter()
        result = call()
        self.drain()
        return (time.perf_counter() - start) * 1000, result

    def drain(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize()


class PrefillClock:
    """Times the language model inside a whole forward of the unpatched model."""

    def __init__(self, model: Any, timer: Timer) -> None:
        self.timer = timer
        self.ms = 0.0
        decoder = model.model.language_model
        self.hooks = [decoder.register_forward_pre_hook(self._begin), decoder.register_forward_hook(self._end)]

    def _begin(self, *_: Any) -> None:
        self.timer.drain()
        self.start = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.timer.drain()
        self.ms = (time.perf_counter() - self.start) * 1000

    def remove(self) -> None:
        """Stop timing."""
        for hook in self.hooks:
            hook.remove()
