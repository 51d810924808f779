"""The three stages of training, each a pure function of ``(seed, step)`` and the weights.

1. ``vision``: the CLIP tower alone learns what patches show (`hidden_states[-2]`, the layer LLaVA reads) and
   what a partition holds (the last layer's CLS), on dense labels: the stand-in for CLIP's pre-training on
   captions.
2. ``language``: tower frozen; projector, newline and Llama learn to answer, all tokens kept. Gives ``nano``.
3. ``robust``: the same, continued with `TiltedDropout`. Gives ``nano-robust``.

No state lives outside weights, optimizer and step number: pages, questions and dropout are drawn from
generators seeded by ``(seed, stage, step)``, so that a run resumed after a kill takes the very steps it would
have taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_budget.eval.nano.data import ask
from vlm_budget.eval.nano.dropout import TiltedDropout
from vlm_budget.eval.nano.labels import BACKGROUND, KINDS, NO_COLOR, SUMMARY, batch_labels
from vlm_budget.eval.nano.modeling import EOS_ID
from vlm_budget.eval.nano.packing import (
    ALL_SLOTS,
    answer_logits,
    encode,
    normalise,
    partitions,
    project,
    vision_features,
)
from vlm_budget.eval.nano.scene import COLORS, Scene, random_scene

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

_STAGE_NUMBER = {"vision": 1, "language": 2, "robust": 3}
_SHARD_STREAM, _STEP_STREAM, _ORDER_STREAM = range(3)
_BACKGROUND_WEIGHT = 0.3
_SUMMARY_WEIGHT = 3.0
_EOS_WEIGHT = 0.02


@dataclass(frozen=True)
class StageConfig:
    """Length and batch of one stage.

    Attributes:
        steps: optimizer steps.
        batch: pages per step.
        bf16: bfloat16 autocast of the language model (the vision stage, of many small matrices, gets slower
            by it).
        compiled: compile the language model; for a stage whose shapes never change.
        lr: peak learning rate; warm-up, then cosine to zero.
        epochs: times each page is seen.
        shard: pages drawn at a time; must be a multiple of ``batch``.
        questions: questions per page (language stages).
    """

    steps: int
    batch: int
    lr: float = 1.5e-3
    epochs: int = 2
    shard: int = 1536
    questions: int = 12
    bf16: bool = False
    compiled: bool = False

    @property
    def shard_steps(self) -> int:
        """Steps served by one shard."""
        return self.shard // self.batch * self.epochs


class Stage:
    """One stage: a module to train, and the loss of step ``t``.

    Subclasses set `module` (trained and checkpointed) and define `prepare` (tensors of a shard) and `loss`.
    """

    name: str
    module: nn.Module

    def __init__(
        self, model: LlavaNextForConditionalGeneration, config: StageConfig, seed: int, device: torch.device
    ) -> None:
        self.config, self.seed, self.device = config, seed, device
        self.model = model.to(device)
        self._shard_index = -1
        self.scenes: list[Scene] = []

    def rng(self, stream: int, index: int) -> np.random.Generator:
        """Generator of one shard or one step, the same after a restart."""
        return np.random.default_rng([self.seed, _STAGE_NUMBER[self.name], stream, index])

    def prepare(self) -> None:
        """Make the tensors of the current shard from ``self.scenes``."""
        raise NotImplementedError

    def loss(self, pages: Tensor, step: int) -> Tensor:
        """Loss of step ``step`` on the shard's pages of these indices, ``[B]``."""
        raise NotImplementedError

    def step_loss(self, step: int) -> Tensor:
        """Loss of step ``step``; draws a new shard when one is due."""
        index, offset = divmod(step, self.config.shard_steps)
        if index != self._shard_index:
            rng = self.rng(_SHARD_STREAM, index)
            self.scenes = [random_scene(rng) for _ in range(self.config.shard)]
            self._shard_index = index
            self.prepare()
        shuffle = self.rng(_ORDER_STREAM, index)
        order = np.concatenate([shuffle.permutation(self.config.shard) for _ in range(self.config.epochs)])
        pages = order[offset * self.config.batch : (offset + 1) * self.config.batch]
        return self.loss(torch.from_numpy(pages), step)


class VisionStage(Stage):
    """Teaches the vision tower with throw-away heads."""

    name = "vision"

    def __init__(
        self, model: LlavaNextForConditionalGeneration, config: StageConfig, seed: int, device: torch.device
    ) -> None:
        super().__init__(model, config, seed, device)
        self.tower = self.model.model.vision_tower
        width = self.tower.config.hidden_size
        self.patch, self.summary = nn.Linear(width, KINDS + len(COLORS) + 1), nn.Linear(width, SUMMARY)
        heads = {"patch": self.patch, "summary": self.summary}
        self.module = nn.ModuleDict({"tower": self.tower} | heads).to(device)
        self.kind_weight = torch.ones(KINDS, device=device)
        self.kind_weight[BACKGROUND] = _BACKGROUND_WEIGHT
        self.color_weight = torch.ones(len(COLORS) + 1, device=device)
        self.color_weight[NO_COLOR] = _BACKGROUND_WEIGHT
        pairs = slice(10 + len(COLORS), 10 + len(COLORS) * 11)
        self.positive_weight = torch.full((SUMMARY,), 3.0, device=device)
        self.positive_weight[pairs] = 10.0

    def prepare(self) -> None:
        """Pixels and labels of the shard."""
        self.pixels = partitions(self.scenes)
        self.kinds, self.colors, self.summaries = map(torch.from_numpy, batch_labels(self.scenes))

    def loss(self, pages: Tensor, step: int) -> Tensor:
        """Patch cross-entropies plus the CLS multi-label loss."""
        device = self.device
        pixels = normalise(self.pixels[pages].to(device)).flatten(0, 1)
        output = self.tower(pixels, output_hidden_states=True)
        logits = self.patch(output.hidden_states[-2][:, 1:]).flatten(0, 1)
        kinds, colors = self.kinds[pages].to(device).flatten(), self.colors[pages].to(device).flatten()
        patch = F.cross_entropy(logits[:, :KINDS], kinds, self.kind_weight)
        patch = patch + F.cross_entropy(logits[:, KINDS:], colors, self.color_weight)
        target = self.summaries[pages].to(device).flatten(0, 1)
        summary = self.summary(output.pooler_output)
        summary = F.binary_cross_entropy_with_logits(summary, target, pos_weight=self.positive_weight)
        return patch + _SUMMARY_WEIGHT * summary


class LanguageStage(Stage):
    """Teaches projector, newline and language model to answer; the vision tower is frozen."""

    name = "language"
    dropout: TiltedDropout | None = None

    def __init__(
        self, model: LlavaNextForConditionalGeneration, config: StageConfig, seed: int, device: torch.device
    ) -> None:
        super().__init__(model, config, seed, device)
        self.module = self.model
        self.answer_logits = torch.compile(answer_logits, dynamic=False) if config.compiled else answer_logits
        self.model.model.vision_tower.requires_grad_(False)

    @torch.no_grad()
    def prepare(self) -> None:
        """Vision features of the shard, bfloat16 ``[shard, 180, Dv]``."""
        parts = partitions(self.scenes).split(64)
        self.features = torch.cat([vision_features(self.model, p.to(self.device)).bfloat16() for p in parts])

    def loss(self, pages: Tensor, step: int) -> Tensor:
        """Cross-entropy of the answers, and a little of the end of sequence."""
        rng = self.rng(_STEP_STREAM, step)
        tokens = encode([ask(self.scenes[i], rng, self.config.questions) for i in pages.tolist()]).to(self.device)
        features = self.features[pages.to(self.features.device)].float()
        visual = project(self.model, features)
        slots, renumber = ALL_SLOTS.expand(len(pages), -1), False
        if self.dropout is not None:
            slots, renumber = self.dropout.draw(features, torch.Generator().manual_seed(int(rng.integers(2**62))))
        slots = slots.to(self.device)
        visual = torch.gather(visual, 1, slots[..., None].expand(-1, -1, visual.shape[-1]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            logits = self.answer_logits(self.model, visual, slots, tokens, renumber).float()
        answer = F.cross_entropy(logits[:, :, 0].flatten(0, 1), tokens[:, :, -1].flatten())
        end = F.cross_entropy(logits[:, :, 1].flatten(0, 1), torch.full_like(tokens[:, :, -1].flatten(), EOS_ID))
        return answer + _EOS_WEIGHT * end


class RobustStage(LanguageStage):
    """The language stage continued with random token dropout."""

    name = "robust"
    dropout = TiltedDropout()


STAGES: dict[str, type[Stage]] = {"vision": VisionStage, "language": LanguageStage, "robust": RobustStage}
