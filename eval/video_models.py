"""Transformers of released video models with random weights, made on the device, and inputs of one step.

Nothing is downloaded, and no weight exists on the host. Twins of a few thousand weights run the same code elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from vlm_budget.errors import MissingExtraError

from .device import Stopwatch, spread
from .large import default_dtype
from .passes import WrongOutputError

# Released: HunyuanVideo (13 B weights) and Wan2.1 T2V 1.3B; what is not said is the class's default.
HUNYUAN = {
    "real": {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40}
    | {"num_refiner_layers": 2, "mlp_ratio": 4.0, "text_embed_dim": 4096, "pooled_projection_dim": 768}
    | {"guidance_embeds": True, "rope_axes_dim": (16, 56, 56)},
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 2}
    | {"num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 24, "pooled_projection_dim": 12}
    | {"guidance_embeds": True, "rope_axes_dim": (4, 6, 6)},
}
WAN = {
    "real": {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
    | {"text_dim": 4096, "freq_dim": 256},
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 48}
    | {"text_dim": 24, "freq_dim": 32},
}
TEXT = {"HunyuanVideo-13B": {"real": 256, "tiny": 7}, "Wan-1.3B": {"real": 512, "tiny": 7}}
FAMILIES = tuple(TEXT)
LATENTS: dict[str, dict[str, tuple[int, int, int]]] = {
    # Frames, rows and columns of the latents: four frames and eight pixels to one, and the first frame alone.
    "HunyuanVideo-13B": {"720p, 129 frames": (33, 90, 160)},
    "Wan-1.3B": {"480p, 81 frames": (21, 60, 104), "720p, 81 frames": (21, 90, 160)},
}
TOY = (4, 24, 20)
"""Latents of toys, whatever they are called."""
MOST = 8
"""Timed forwards after the first."""


@dataclass(frozen=True, eq=False)
class Transformer:
    """A model and what is needed to call it.

    Attributes:
        family: One of ``FAMILIES``.
        size: ``"real"`` or ``"tiny"``.
        model: The transformer, in eval mode.
    """

    family: str
    size: str
    model: Any

    @property
    def facts(self) -> dict[str, Any]:
        """What a record says of the model."""
        config = self.model.config
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": config.num_layers + config.get("num_single_layers", 0),
            "heads": config.num_attention_heads,
            "head_dim": config.attention_head_dim,
            "text": TEXT[self.family][self.size],
        }

    def latents(self, video: str) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return LATENTS[self.family][video] if self.size == "real" else TOY

    def tokens(self, video: str) -> int:
        """Of the video."""
        frames, rows, cols = self.latents(video)
        return frames * (rows // 2) * (cols // 2)

    def inputs(self, video: str, timestep: float) -> dict[str, Any]:
        """Arguments of a forward of one sample, all of its text valid.

        Args:
            video: One of ``LATENTS``.
            timestep: Of the step.
        """
        weight = next(self.model.parameters())
        draw = torch.Generator(weight.device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=draw, device=weight.device).to(weight.dtype)

        config, text = self.model.config, TEXT[self.family][self.size]
        given = {
            "hidden_states": normal(1, config.in_channels, *self.latents(video)),
            "timestep": torch.tensor([timestep], device=weight.device),
            "return_dict": False,
        }
        if self.family == "Wan-1.3B":
            return {**given, "encoder_hidden_states": normal(1, text, config.text_dim)}
        return {
            **given,
            "encoder_hidden_states": normal(1, text, config.text_embed_dim),
            "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool, device=weight.device),
            "pooled_projections": normal(1, config.pooled_projection_dim),
            "guidance": torch.tensor([6000.0], dtype=weight.dtype, device=weight.device),
        }

    def forward(self, video: str, timestep: float) -> torch.Tensor:
        """One step."""
        out: torch.Tensor = self.model(**self.inputs(video, timestep))[0]
        return out


def build(family: str, size: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The transformer, its weights drawn on the device in their final number format.

    Args:
        family: One of ``FAMILIES``.
        size: ``"real"`` or ``"tiny"``.
        device: Where to.
        dtype: Of the weights.

    Raises:
        MissingExtraError: diffusers is not installed.
    """
    try:
        from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
    except ImportError as error:
        raise MissingExtraError("diffusers is not installed: pip install 'vlm-budget[diffusers]'") from error
    torch.manual_seed(0)
    with torch.device(device), default_dtype(dtype):
        make = WanTransformer3DModel if family == "Wan-1.3B" else HunyuanVideoTransformer3DModel
        model = make(**(WAN if family == "Wan-1.3B" else HUNYUAN)[size]).eval()
    model.requires_grad_(False)
    return Transformer(family, size, model)


def timed_forwards(model: Transformer, video: str, watch: Stopwatch, seconds: float, reuse: int = 1) -> dict[str, Any]:
    """The first forward of a run, which clusters from nothing and warms up, and the following ones.

    Args:
        model: Patched or not.
        video: One of ``LATENTS``.
        watch: The device.
        seconds: What the following ones may take, but for one round.
        reuse: Steps that share a clustering: whole rounds are timed, so that their mean is that of a run.

    Raises:
        WrongOutputError: Numbers that are not finite.
    """
    first, out = watch.wall(partial(model.forward, video, 999.0))
    if not bool(out.isfinite().all()):
        raise WrongOutputError(f"{model.family}, {video}: the output is not finite")
    rounds = max(1, min(MOST, int(1000 * seconds / max(first, 1e-3))) // reuse)
    later = [watch.wall(partial(model.forward, video, 999.0 - step))[0] for step in range(1, rounds * reuse + 1)]
    return {"first_ms": first, "ms": spread(later), "mean_ms": statistics.mean(later)}


class _Unmasked(TorchFunctionMode):
    """Attention without its mask."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            kwargs.pop("attn_mask", None)
            args = args[:3]  # a mask is the fourth; what may follow it is not given by place
        return func(*args, **kwargs)


@contextmanager
def unmasked() -> Iterator[None]:
    """Calls of torch's attention lose their masks meanwhile, which all true ones do not need.

    A mask of padding keeps torch from its fastest back ends. Where no text is padding, a dense run without it is the
    one to be compared with.
    """
    with _Unmasked():
        yield
