"""The two stages of training, each a pure function of ``(seed, step)`` and the weights.

1. ``vision``: the SigLIP tower alone learns what patches show (the layer LLaVA reads) and what a picture holds
   (the mean of the last layer), on dense labels: the stand-in for SigLIP's pre-training on captions. No
   attention map is ever supervised.
2. ``language``: tower frozen; projector, newline and Qwen2 learn to answer, rooms and clips in turn, half of
   the batches with `RandomBudget`.

No state lives outside weights, optimizer and step number: scenes, order, questions and dropout are drawn from
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

from vlm_budget.eval.views.dropout import RandomBudget
from vlm_budget.eval.views.labels import NO_COLOR, NO_KIND, SUMMARY
from vlm_budget.eval.views.modeling import EOS_ID, LAYER, VOCAB
from vlm_budget.eval.views.packing import answer_logits, normalise, tower_features
from vlm_budget.eval.views.shards import TASKS, Shelf
from vlm_budget.eval.views.world import COLORS, KINDS

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration

_STAGE_NUMBER = {"vision": 1, "language": 2}
_STEP_STREAM, _ORDER_STREAM, _SHARD_STREAM = range(3)
_GROWTH = 6
_EMPTY_WEIGHT = 0.3
_EMPTY_SHARE = 0.15
_PATCH_HEADS = [NO_KIND + 1, NO_COLOR + 1]
_PAIRS = slice(len(KINDS) + len(COLORS), SUMMARY)
_EOS_WEIGHT = 0.02
_NEAREST_WEIGHT = 3.0  # the slowest form: it stays at chance long after the others are learned
_TOWER_BATCH = 192
_TELLING = 3
_FORMS = {"color": "color", "here": "kind", "in": "count", "nearest": "nearest", "first": "order"}
"""The fourth word of a prompt tells its form."""


@dataclass(frozen=True)
class StageConfig:
    """Length and batch of one stage.

    Attributes:
        steps: optimizer steps.
        batch: pictures per step (vision, half of rooms and half of clips), scenes per step (language).
        lr: peak learning rate; warm-up, then cosine to zero.
        shards: different shards of each task.
        ready: shards that are drawn from at the beginning; every sixth time a shard is due, one more is added, up to
            all, so that a renderer beside the training keeps up with it.
        questions: questions per scene (language).
        bf16: bfloat16 autocast (the tower, of many small matrices, gets slower by it).
    """

    steps: int
    batch: int
    lr: float = 1.5e-3
    shards: int = 40
    ready: int = 12
    questions: int = 12
    bf16: bool = False

    def pool(self, visit: int) -> int:
        """Shards to draw from at visit ``visit``."""
        return min(self.shards, self.ready + visit // _GROWTH)


class Stage:
    """One stage: a module to train, and the loss of step ``t``."""

    name: str
    module: nn.Module

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        config: StageConfig,
        shelf: Shelf,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config, self.shelf, self.seed, self.device = config, shelf, seed, device
        self.model = model.to(device)
        self.told: dict[str, float] = {}
        """Figures of the last step, for the log."""

    def rng(self, stream: int, *index: int) -> np.random.Generator:
        """Generator of one step or one order, the same after a restart."""
        return np.random.default_rng([self.seed, _STAGE_NUMBER[self.name], stream, *index])

    def shard_of(self, task: str, visit: int) -> int:
        """Which shard is used at visit ``visit``."""
        return int(self.rng(_SHARD_STREAM, TASKS.index(task), visit).integers(self.config.pool(visit)))

    def step_loss(self, step: int) -> Tensor:
        """Loss of step ``step``."""
        raise NotImplementedError


class VisionStage(Stage):
    """Teaches the vision tower with throw-away heads."""

    name = "vision"

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        config: StageConfig,
        shelf: Shelf,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(model, config, shelf, seed, device)
        self.tower = self.model.model.vision_tower
        width = self.tower.config.hidden_size
        self.patch, self.summary = nn.Linear(width, sum(_PATCH_HEADS)), nn.Linear(width, SUMMARY)
        heads = {"patch": self.patch, "summary": self.summary}
        self.module = nn.ModuleDict({"tower": self.tower} | heads).to(device)
        self.kind_weight = torch.ones(NO_KIND + 1, device=device)
        self.kind_weight[NO_KIND] = _EMPTY_WEIGHT
        self.color_weight = torch.ones(NO_COLOR + 1, device=device)
        self.color_weight[NO_COLOR] = _EMPTY_WEIGHT
        self.positive_weight = torch.full((SUMMARY,), 3.0, device=device)
        self.positive_weight[_PAIRS] = 10.0
        self._visit = -1
        self._pictures: list[list[Tensor]] = []

    def _load(self, visit: int) -> None:
        """Pictures and labels of one shard of each task in random order, most pictures of nothing left out."""
        self._pictures = []
        for number, task in enumerate(TASKS):
            shard = self.shelf.get(task, self.shard_of(task, visit))
            pixels, kinds, colors = (x.reshape(-1, *x.shape[2:]) for x in (shard.pixels, shard.kinds, shard.colors))
            rng = self.rng(_ORDER_STREAM, visit, number)
            shown = (kinds != NO_KIND).any(1) | (rng.random(len(kinds)) < _EMPTY_SHARE)
            order = rng.permutation(np.flatnonzero(shown))
            arrays = (pixels, kinds.astype(np.int64), colors.astype(np.int64), shard.summaries.reshape(-1, SUMMARY))
            self._pictures.append([torch.from_numpy(array[order]) for array in arrays])
        self._visit = visit

    def step_loss(self, step: int) -> Tensor:
        """Patch cross-entropies plus the multi-label loss of whole pictures."""
        half, scenes = self.config.batch // 2, self.shelf.scenes
        per_visit = max(1, scenes * 8 // half)
        if self._visit != step // per_visit:
            self._load(step // per_visit)
        parts = []
        for columns in self._pictures:
            index = (step % per_visit * half + torch.arange(half)) % len(columns[0])
            parts.append([column[index].to(self.device) for column in columns])
        pixels, kinds, colors, summaries = (torch.cat(column) for column in zip(*parts, strict=True))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            output = self.tower(normalise(pixels), output_hidden_states=True)
            logits = self.patch(output.hidden_states[LAYER]).flatten(0, 1).float()
            held = self.summary(output.last_hidden_state.mean(1)).float()
        kind, color = logits.split(_PATCH_HEADS, 1)
        loss = F.cross_entropy(kind, kinds.flatten(), self.kind_weight)
        loss = loss + F.cross_entropy(color, colors.flatten(), self.color_weight)
        self._tell(kind, kinds.flatten(), color, colors.flatten())
        summary = F.binary_cross_entropy_with_logits(held, summaries.float(), pos_weight=self.positive_weight)
        return loss + summary

    @torch.no_grad()
    def _tell(self, kind: Tensor, kinds: Tensor, color: Tensor, colors: Tensor) -> None:
        shown = kinds != NO_KIND
        self.told = {
            "kind": float((kind.argmax(1) == kinds)[shown].float().mean()),
            "color": float((color.argmax(1) == colors)[shown].float().mean()),
            "empty": float((kind.argmax(1) == kinds)[~shown].float().mean()),
        }


class LanguageStage(Stage):
    """Teaches projector, newline and language model to answer; the vision tower is frozen."""

    name = "language"
    budget: RandomBudget = RandomBudget()

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        config: StageConfig,
        shelf: Shelf,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(model, config, shelf, seed, device)
        self.module = self.model
        self.model.model.vision_tower.requires_grad_(False)
        self._kept: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def _shard(self, task: str, index: int) -> tuple[Tensor, Tensor]:
        """Features bfloat16 ``[N, P, 36, Dv]`` and questions ``[N, Q, 8]`` of one shard, worked out once."""
        if (task, index) not in self._kept:
            shard = self.shelf.get(task, index)
            pixels = torch.from_numpy(shard.pixels)
            parts = pixels.flatten(0, 1).split(_TOWER_BATCH)
            features = torch.cat([tower_features(self.model, part.to(self.device)).bfloat16() for part in parts])
            tokens = torch.from_numpy(shard.tokens.astype(np.int64))
            self._kept[task, index] = features.unflatten(0, pixels.shape[:2]), tokens
        return self._kept[task, index]

    def step_loss(self, step: int) -> Tensor:
        """Cross-entropy of the answers, and a little of the end of sequence."""
        task, turn, batch = TASKS[step % len(TASKS)], step // len(TASKS), self.config.batch
        per_visit = self.shelf.scenes // batch
        visit, place = divmod(turn, per_visit)
        features, tokens = self._shard(task, self.shard_of(task, visit))
        order = self.rng(_ORDER_STREAM, TASKS.index(task), visit).permutation(len(features))
        scenes = torch.from_numpy(order[place * batch : (place + 1) * batch])
        rng = self.rng(_STEP_STREAM, step)
        asked = torch.from_numpy(np.argsort(rng.random(tokens[scenes].shape[:2]), 1)[:, : self.config.questions])
        tokens = tokens[scenes].gather(1, asked[..., None].expand(-1, -1, tokens.shape[-1])).to(self.device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            drawn = self.budget.draw(self.model, task, features[scenes.to(features.device)].float(), generator)
            logits = answer_logits(self.model, drawn.prefix, tokens).float()
        answers = tokens[:, :, -1]
        weight = torch.where(tokens[:, :, _TELLING] == VOCAB.index("nearest"), _NEAREST_WEIGHT, 1.0).flatten()
        answer = F.cross_entropy(logits[:, :, 0].flatten(0, 1), answers.flatten(), reduction="none") * weight
        end = F.cross_entropy(logits[:, :, 1].flatten(0, 1), torch.full_like(answers.flatten(), EOS_ID))
        self._tell(task, drawn.kind, logits[:, :, 0].detach(), tokens)
        return answer.sum() / weight.sum() + _EOS_WEIGHT * end

    def _tell(self, task: str, kind: str, logits: Tensor, tokens: Tensor) -> None:
        """Accuracy by task, budget and form of question."""
        right = (logits.argmax(-1) == tokens[:, :, -1]).float()
        self.told = {}
        for word, form in _FORMS.items():
            chosen = tokens[:, :, _TELLING] == VOCAB.index(word)
            if chosen.any():
                self.told[f"{task}/{kind}/{form}"] = float(right[chosen].mean())


STAGES: dict[str, type[Stage]] = {"vision": VisionStage, "language": LanguageStage}
