"""One prompt, made dense and sparse from the same noise."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import load

if TYPE_CHECKING:
    import numpy as np

    from vlm_budget.video.dit.quality import Quality
    from vlm_budget.video.dit.report import VideoReport

    from .pipeline import NanoVideoPipeline


@dataclass
class Trial:
    """A clip, dense and sparse.

    Attributes:
        pipe: The pipeline.
        arguments: Of its call.
        seed: Of the noise.
        dense: [1, F, H, W, 3] in [0, 1], once it was made.
        sparse: The same, of the sparse run.
        report: Of the sparse run.
        quality: Of the sparse clip beside the dense one.
        seconds: Of the dense and of the sparse run.
    """

    pipe: NanoVideoPipeline
    arguments: dict[str, Any]
    seed: int
    dense: np.ndarray[Any, Any] = field(init=False)
    sparse: np.ndarray[Any, Any] = field(init=False)
    report: VideoReport = field(init=False)
    quality: Quality = field(init=False)
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: str, prompt: str, steps: int, guidance: float, seed: int) -> Trial:
        """Load the model, and read the prompt before anything is computed.

        Raises:
            VLMBudgetError: No such model, or a prompt that it does not know.
        """
        from .clips import read_prompt

        read_prompt(prompt)
        arguments = {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
        return cls(load(model), arguments, seed)

    @property
    def relative_seconds(self) -> float:
        """Time of the sparse run over that of the dense one."""
        return self.seconds[1] / self.seconds[0]

    def facts(self) -> dict[str, Any]:
        """What was asked for and what came out, as plain data."""
        asked = {name: value for name, value in self.arguments.items() if name != "output_type"}
        return {
            **asked,
            "report": self.report.to_dict(),
            "quality": self.quality.to_dict(),
            "relative_seconds": self.relative_seconds,
        }

    def run_dense(self) -> None:
        """Make the clip as the model does."""
        self.dense = self._run()

    def run_sparse(self, method: str, fields: dict[str, Any]) -> None:
        """Make the clip with a method, and compare.

        Raises:
            VLMBudgetError: The method cannot be used so.
        """
        from vlm_budget.video.dit.handle import patch_video
        from vlm_budget.video.dit.quality import quality_of

        with patch_video(self.pipe, method, force=True, **fields) as handle:
            self.sparse = self._run()
            self.report = handle.report()
        self.quality = quality_of(self.sparse, self.dense)

    def _run(self) -> np.ndarray[Any, Any]:
        began = time.perf_counter()
        made: Any = self.pipe(**self.arguments, generator=torch.Generator().manual_seed(self.seed))
        self.seconds.append(time.perf_counter() - began)
        frames: np.ndarray[Any, Any] = made.frames
        return frames
