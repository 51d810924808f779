"""Held-out pages encoded once, and the answers of a pruned model to all their questions.

Methods before the language model go the short way: they select through the library's own :func:`select` on what the
library's own observer saw, and all questions of a page are answered behind one pruned prefix (``packing``). A method
that reads the question selects anew for every question. Methods inside the language model run through ``patch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import vlm_budget
from vlm_budget.budget import Budget
from vlm_budget.engine.observe import Observer
from vlm_budget.engine.selection import Observation, PromptText, Seen, select
from vlm_budget.eval.nano.data import PROMPT_WORDS, Sample
from vlm_budget.eval.nano.modeling import BOS_ID, IMAGE_ID, VISUAL_TOKENS, build_processor
from vlm_budget.eval.nano.packing import answer_logits, encode
from vlm_budget.models import find_family
from vlm_budget.plan import ItemPlan, Plan
from vlm_budget.pruner import Pruner
from vlm_budget.registry import PRUNERS

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration


@dataclass(frozen=True, eq=False)
class Pages:
    """Held-out pages, encoded once.

    Attributes:
        samples: The pages.
        tokens: [N, Q, 6] prompts and answers.
        seen: Per page, what the vision tower showed.
    """

    samples: list[Sample]
    tokens: torch.Tensor
    seen: list[Seen]

    def first(self, count: int) -> Pages:
        """The first pages."""
        return Pages(self.samples[:count], self.tokens[:count], self.seen[:count])


@torch.no_grad()
def encode_pages(
    model: LlavaNextForConditionalGeneration, samples: Sequence[Sample], pruners: Sequence[Pruner], batch: int = 50
) -> Pages:
    """Run the vision tower under the library's probes, for the needs of these methods."""
    _, base, family = find_family(model)
    tower = family.tower(base)
    needs = tuple(dict.fromkeys(need for pruner in pruners for need in pruner.all_needs(tower)))
    observer = Observer(base, family, needs, hidden=True)
    process = build_processor().image_processor
    attached = observer.attach()
    seen: list[Seen] = []
    try:
        for start in range(0, len(samples), batch):
            inputs = process(images=[s.image for s in samples[start : start + batch]], return_tensors="pt")
            keywords = {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}
            encoder: Callable[..., Any] = getattr(base, family.encoders["image"])
            _, observation = observer.observe("image", encoder, (), keywords)
            project: Any = base.multi_modal_projector
            seen += list(_per_page(observation, project))
    finally:
        for probe in attached:
            probe.detach()
    return Pages(list(samples), encode([s.questions for s in samples]), seen)


def _per_page(observation: Observation, project: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Seen]:
    assert observation.hidden is not None
    for index, (item, features) in enumerate(zip(observation.items, observation.features, strict=True)):
        attention = {need: rows[index] for need, rows in observation.attention.items()}
        yield Seen(item, features, attention, observation.hidden[index], project)


def right(
    model: LlavaNextForConditionalGeneration, pages: Pages, method: Pruner | Sequence[Pruner], budget: Budget
) -> np.ndarray:
    """[N, Q] bool, which answers are right."""
    if not isinstance(method, Pruner) or method.stage == "decoder":
        logits = patched_answers(model, pages, method, budget)
    else:
        pruners = [method] * len(pages.seen)
        if isinstance(method, PRUNERS.get("random")):
            # The method draws the same places for every prompt; a fair baseline draws anew for every page.
            pruners = [replace(method, seed=method.seed * len(pages.seen) + page) for page in range(len(pages.seen))]
        logits = answers(model, pages, pruners, budget)
    found: np.ndarray = (logits.argmax(-1) == pages.tokens[:, :, -1]).numpy()
    return found


@torch.no_grad()
def answers(
    model: LlavaNextForConditionalGeneration, pages: Pages, pruners: Sequence[Pruner], budget: Budget, batch: int = 50
) -> torch.Tensor:
    """[N, Q, V] logits at the answer; page ``i`` is a prompt of its own, pruned by ``pruners[i]``."""
    if pruners[0].reads_text:
        asked = [
            answers_to(model, pages.seen, pages.tokens[:, question : question + 1], pruners, budget, batch)
            for question in range(pages.tokens.shape[1])
        ]
        return torch.cat(asked, 1)
    return answers_to(model, pages.seen, pages.tokens, pruners, budget, batch)


def answers_to(
    model: LlavaNextForConditionalGeneration,
    seen: Sequence[Seen],
    tokens: torch.Tensor,
    pruners: Sequence[Pruner],
    budget: Budget,
    batch: int,
) -> torch.Tensor:
    """[N, Q, V] logits at the answer to ``tokens`` [N, Q, 6], one selection per page."""
    visual, slots = [], []
    for page, pruner, questions in zip(seen, pruners, tokens, strict=True):
        values, index = _pruned(model, page, pruner, budget, questions[0, :PROMPT_WORDS])
        visual.append(values)
        slots.append(index)
    renumber = pruners[0].positions == "packed"
    parts = (torch.stack(visual).split(batch), torch.stack(slots).split(batch), tokens.split(batch))
    return torch.cat([answer_logits(model, *part, renumber=renumber)[:, :, 0] for part in zip(*parts, strict=True)])


def _pruned(
    model: LlavaNextForConditionalGeneration, page: Seen, pruner: Pruner, budget: Budget, words: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[k, D] embeddings and [k] places of the tokens that stay."""
    wanted = pruner.all_needs(find_family(model)[2].tower(model.model))
    mine = replace(page, attention={need: page.attention[need] for need in wanted})
    count = pruner.shares(budget, [page.item])[0]
    plan = Plan(str(pruner), str(budget), (ItemPlan(0, "image", page.item.size, count),), 1)
    text = PromptText(model.get_input_embeddings()(words), words)
    chosen = select(pruner, plan, [[mine]], page.features.device, [text])
    index = chosen.keep["image"][0].nonzero().flatten()
    values = page.features[index]
    if "image" in chosen.values:
        table, where = chosen.values["image"]
        values = torch.where(where[0, index, None], table[0, index].to(values), values)
    return values, index


@torch.no_grad()
def patched_answers(
    model: LlavaNextForConditionalGeneration,
    pages: Pages,
    method: Pruner | Sequence[Pruner],
    budget: Budget,
    batch: int = 20,
) -> torch.Tensor:
    """[N, Q, V] logits at the answer, through ``patch`` and the stock forward, every question a prompt of its own."""
    process = build_processor().image_processor
    found = []
    with vlm_budget.patch(model, method, budget):
        for start in range(0, len(pages.samples), batch):
            part, tokens = pages.samples[start : start + batch], pages.tokens[start : start + batch]
            images = [sample.image for sample in part for _ in range(tokens.shape[1])]
            words = tokens[..., :PROMPT_WORDS].flatten(0, 1)
            front = torch.tensor([BOS_ID, *[IMAGE_ID] * VISUAL_TOKENS]).expand(len(words), -1)
            inputs = {**process(images=images, return_tensors="pt"), "input_ids": torch.cat([front, words], 1)}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
            found.append(logits.unflatten(0, tokens.shape[:2]))
    return torch.cat(found)


@torch.no_grad()
def check_short_cut(model: LlavaNextForConditionalGeneration, pages: Pages, pruners: Sequence[Pruner]) -> float:
    """Largest logit difference between the packed answers and ``patch`` with the stock forward, on a few pages.

    Raises:
        RuntimeError: They differ by more than 1e-4: nothing may be measured.
    """
    few, budget, worst = pages.first(3), Budget(0.2), 0.0
    for pruner in pruners:
        expected = answers(model, few, [pruner] * len(few.samples), budget)
        worst = max(worst, float((patched_answers(model, few, pruner, budget) - expected).abs().max()))
    if worst > 1e-4:
        raise RuntimeError(f"the packed answers differ from the patched model's by {worst:.2e}: nothing was measured")
    return worst
