"""The pipeline of the small video model, in the manner of diffusers: a transformer and a scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from vlm_budget.errors import ModelLoadError, OptionError

from .clips import CELL, embed, read_prompt

SHIFT = 2.0
"""Of the noise levels: more steps at high noise, where the layout of a clip is decided."""
STEPS = 20


@dataclass
class NanoVideoOutput(BaseOutput):  # type: ignore[misc]  # diffusers is untyped
    """Clips.

    Attributes:
        frames: [B, F, H, W, 3] array in [0, 1], [B, F, 3, H, W] tensor in [0, 1], or latents [B, 3, F, H, W].
    """

    frames: Any


class NanoVideoPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Words to a clip of two moving shapes.

    Args:
        transformer: The trained model.
        scheduler: Flow matching, Euler steps.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: WanTransformer3DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_frames: int = 12,
        height: int = 40,
        width: int = 40,
        num_inference_steps: int = STEPS,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> NanoVideoOutput | tuple[Any]:
        """Make clips.

        Args:
            prompt: Such as ``a red disc moving up and a blue square moving left on grey``, or a list of prompts.
            num_frames: Frames; the model was trained on up to 12.
            height: Pixels, a multiple of 4; trained on up to 40.
            width: Pixels, a multiple of 4; trained on up to 40.
            num_inference_steps: Denoising steps.
            guidance_scale: Above 1, each step runs the transformer twice, with the words and without, and goes so
                many times the way from the second to the first.
            generator: Of the noise; one per prompt makes a clip the same in any batch.
            latents: Noise [B, 3, F, H, W] instead.
            output_type: ``"np"``, ``"pt"`` or ``"latent"``.
            return_dict: False returns a tuple.

        Raises:
            OptionError: A prompt that cannot be read, a size or an output type that cannot be made.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        _check(prompts, num_frames, height, width, num_inference_steps, output_type)
        device, dtype = self._execution_device, self.transformer.dtype
        text = embed(torch.stack([read_prompt(words) for words in prompts])).to(device, dtype)
        shape = (len(prompts), 3, num_frames, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise OptionError(f"latents must be {list(shape)} for this call, got {list(latents.shape)}")
        latents = latents.to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for timestep in self.scheduler.timesteps:
                velocity = self._velocity(latents, timestep, text, guidance_scale)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                bar.update()
        self.maybe_free_model_hooks()
        frames = _frames(latents, output_type)
        return NanoVideoOutput(frames) if return_dict else (frames,)

    def _velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        """What the transformer says [B, 3, F, H, W] at a noise level, guided where asked for."""
        times = timestep.expand(len(latents))

        def ask(words: torch.Tensor) -> torch.Tensor:
            return self.transformer(latents.to(words.dtype), times, words, return_dict=False)[0].float()

        told = ask(text)
        if guidance <= 1:
            return told
        untold = ask(torch.zeros_like(text))
        return untold + guidance * (told - untold)


def _check(prompts: list[str], frames: int, height: int, width: int, steps: int, output_type: str) -> None:
    """Refuse what cannot be made."""
    if not prompts:
        raise OptionError("at least one prompt is needed, got an empty list")
    if min(frames, height, width, steps) < 1 or height % CELL or width % CELL:
        raise OptionError(
            f"frames and steps must be at least 1, height and width multiples of {CELL}, got {frames} frames of "
            f"{height} x {width} in {steps} steps"
        )
    if output_type not in ("np", "pt", "latent"):
        raise OptionError(f"output_type must be 'np', 'pt' or 'latent', got {output_type!r}")


def _frames(latents: torch.Tensor, output_type: str) -> Any:
    """Latents [B, 3, F, H, W] in [-1, 1] in the form that was asked for."""
    if output_type == "latent":
        return latents
    frames = (latents / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    return frames if output_type == "pt" else frames.permute(0, 1, 3, 4, 2).cpu().numpy()


def make_pipeline(transformer: WanTransformer3DModel) -> NanoVideoPipeline:
    """The pipeline around a transformer."""
    pipe = NanoVideoPipeline(transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=SHIFT))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_from(folder: Path) -> NanoVideoPipeline:
    """The pipeline of a folder with ``transformer/``, in float32 on the CPU.

    Raises:
        ModelLoadError: The folder has none.
    """
    if not (folder / "transformer" / "config.json").is_file():
        raise ModelLoadError(f"there is no video model in {str(folder)!r}: it needs a folder 'transformer'")
    model = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    return make_pipeline(model)
