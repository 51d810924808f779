"""Methods made for the tests that drop inside the language model, and what the reference expects of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch

import tiny_models
import vlm_budget
from tiny_models import Tiny
from vlm_budget.decoder import DecoderContext, DecoderPruner, Step
from vlm_budget.pruner import Selection

from .layered import Layered, Values, greedy, layered
from .patched import generate
from .reference import Row, rows

LAYERS = 6
TOKENS = 6
# Gemma 3 has sliding windows, and is refused.
SETUPS = [name for name in tiny_models.SETUPS if name != "gemma3"]
GENERATING = [name for name in SETUPS if not name.endswith("right_padded")]
# One of every kind: 1-D and M-RoPE, deepstack, a prefix mask, several images, images beside a video.
KINDS = ["llava", "qwen2_5_vl", "qwen3_vl", "paligemma", "llava_onevision_video"]
SEEN: list[DecoderContext] = []


@dataclass(frozen=True, kw_only=True)
class Scheduled(DecoderPruner):
    """Keeps half of the tokens at layer 2, an eighth from layer 4 on, picked as if at random."""

    shares: tuple[tuple[int, float], ...] = ((2, 0.5), (4, 0.125))
    scores: ClassVar[Any] = "none"

    @property
    def fixed(self) -> bool:
        return True

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        return tuple(Step(layer, int(share * tokens)) for layer, share in self.shares)

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor | Selection:
        draw = torch.Generator().manual_seed(1000 * ctx.layer + 10 * len(ctx.alive) + ctx.order)
        return torch.randperm(len(ctx.alive), generator=draw)[:k]


@dataclass(frozen=True, kw_only=True)
class Attended(Scheduled):
    """Keeps what the last token attends to most in the layer before."""

    scores: ClassVar[Any] = "previous"

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor | Selection:
        SEEN.append(ctx)
        return ctx.attention(ctx.last).mean((0, 1)).topk(k).indices


@dataclass(frozen=True, kw_only=True)
class OwnAttended(Attended):
    """The same, by the layer's own queries and keys."""

    scores: ClassVar[Any] = "own"


@dataclass(frozen=True, kw_only=True)
class Recycled(Scheduled):
    """Adds the mean of all candidates' hidden states to what it keeps."""

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor | Selection:
        SEEN.append(ctx)
        keep = super().pick(ctx, k)
        assert isinstance(keep, torch.Tensor)
        states = ctx.hidden[ctx.columns]
        return Selection(keep, states[keep] + states.mean(0))


@dataclass(frozen=True, kw_only=True)
class Recording(DecoderPruner):
    """Another method, with a record of the hidden states that it puts in; of one prompt at a time."""

    inner: DecoderPruner
    values: Values

    @property
    def scores(self) -> Any:  # type: ignore[override]
        return self.inner.scores

    @property
    def fixed(self) -> bool:
        return self.inner.fixed

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        return self.inner.schedule(tokens, spend, layers)

    def schedule_behind(self, first: int, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        return self.inner.schedule_behind(first, tokens, spend, layers)

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor | Selection:
        picked = self.inner.pick(ctx, k)
        if isinstance(picked, Selection) and picked.values is not None:
            self.values[ctx.layer, ctx.order] = (ctx.alive[picked.keep].tolist(), picked.values)
        return picked


@cache
def built(name: str) -> Tiny:
    """A set-up with more decoder layers, built once."""
    return tiny_models.build(name, LAYERS)


def fresh(name: str) -> Tiny:
    """A set-up with a model of its own."""
    made = built(name)
    return replace(made, model=copy.deepcopy(made.model))


def forward_inputs(tiny: Tiny) -> dict[str, Any]:
    """The inputs with the position ids that ``generate`` would make of them.

    A forward counts padding, too, which shifts all positions of a row: nothing to attention, but not to a method that
    looks at keys.
    """
    inputs = tiny.clone()
    if "qwen" not in tiny.family:
        first = int(tiny.family == "paligemma")
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0) + first
    return inputs


@cache
def full_rows(name: str) -> list[Row]:
    """The unpruned prompts of a set-up, on a model that no test sees."""
    tiny = fresh(name)
    return rows(tiny.model, tiny.clone())


@cache
def unpruned(name: str) -> list[list[int]]:
    """What the unpatched model generates."""
    return generate(fresh(name).model, built(name).clone())


@dataclass(frozen=True)
class Case:
    """A set-up with what the reference expects of it under :class:`Scheduled`.

    Attributes:
        name: Of the set-up.
        tiny: A fresh model of its own, not patched.
        full: The unpruned prompts.
        prompts: The prompts with what is dropped from them.
        pruned: Tokens per prompt.
    """

    name: str
    tiny: Tiny
    full: list[Row]
    prompts: list[Layered]
    pruned: list[list[int]]

    def patch(self, **options: Any) -> vlm_budget.PatchHandle:
        """Patch the model."""
        return vlm_budget.patch(self.tiny.model, Scheduled(), **options)

    def run(self, **options: Any) -> list[list[int]]:
        """Generate."""
        return generate(self.tiny.model, self.tiny.clone(), **options)


@cache
def expected(name: str) -> Case:
    """Computed once per set-up."""
    tiny, full = fresh(name), full_rows(name)
    with vlm_budget.patch(tiny.model, Scheduled()) as handle, torch.no_grad():
        tiny.model(**tiny.clone())
        prompts = layered(full, handle.kept(), vision_packed=False, packed=False)
    return Case(name, tiny, full, prompts, [greedy(prompt, TOKENS) for prompt in prompts])


def case(name: str) -> Case:
    """What is expected, with a fresh model."""
    known = expected(name)
    return replace(known, tiny=fresh(name))
