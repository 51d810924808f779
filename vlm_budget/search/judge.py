"""A model judged on calibration prompts, unpruned or under methods within a budget."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..budget import Budget, Unit
from ..cost import CostModel
from ..errors import CalibrationError, PatchError
from ..models import find_family, weights_fingerprint
from ..patching import patch
from ..plan import Plan
from ..planning import Facts, Methods, make_plan
from ..recipe import CalibrationFacts, ModelFacts
from .data import Calibration, Example
from .greedy import FIRST
from .metrics import Metric


@dataclass(frozen=True)
class Score:
    """A mean over prompts.

    Attributes:
        mean: The metric; higher is better.
        se: Its standard error over the prompts.
    """

    mean: float
    se: float


class Judge:
    """Judges one model on one calibration set by one metric. The model is left as it was.

    Args:
        model: What :func:`vlm_budget.patch` takes, not patched.
        calibration: The prompts.
        metric: How they are judged.
        batch: Prompts of equal shape that run at once.

    Raises:
        PatchError: The model is patched.
    """

    def __init__(self, model: Any, calibration: Calibration, metric: Metric, batch: int = 8) -> None:
        outer, self.base, self.family = find_family(model)
        self.model: Any = outer
        if "_vlm_budget_handle" in self.base.__dict__:
            raise PatchError("a search judges the unpatched model, and this one is patched. Call handle.undo() first.")
        self.calibration = calibration
        self.metric = metric
        self.batches = list(_batches(calibration.examples, 1 if metric.tokens > 1 else batch))
        self.cost = CostModel.of(self.base, self.family)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.cost.layers)

    @property
    def first(self) -> int:
        """First layer that may drop: 2 (assumption A2), later where visual features are still being added."""
        return min(max(FIRST, self.family.deepstack_levels(self.base)), self.layers)

    def facts(self, examples: Sequence[Example]) -> Facts:
        """What planning must know of prompts that run together."""
        first = max(1, self.family.deepstack_levels(self.base))
        return Facts(self.layers, [example.text for example in examples], self.cost, first)

    @cached_property
    def model_facts(self) -> ModelFacts:
        """The model, as a recipe names it."""
        return ModelFacts.of(self.base, self.calibration.tokens)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What judged points belong to, for a journal."""
        facts = self.model_facts
        return {
            "model": f"{facts.name} {facts.config[:16]} {weights_fingerprint(self.base)}",
            "calibration": self.calibration.hash,
            "metric": str(self.metric),
        }

    def require_some_right(self, full: float) -> None:
        """Refuse data that say nothing about pruning: whatever a method loses, it could not be seen.

        Args:
            full: Quality of the unpruned model.

        Raises:
            CalibrationError: The unpruned model gets every prompt wrong.
        """
        if self.metric.name != "kl" and not full > 0:
            size = len(self.calibration.examples)
            raise CalibrationError(
                f"the unpruned model gives the expected answer to none of the {size} calibration prompts, so no loss "
                f"could be seen: its {self.metric} is {full:g}. Check the answers (their spelling, their first token, "
                "the tokenizer), or use metric='agreement', which compares with the full model."
            )

    def calibration_facts(self, tolerance: float | None, quality: float, full: float) -> CalibrationFacts:
        """The calibration, as a recipe names it."""
        data = self.calibration
        return CalibrationFacts(data.hash, len(data.examples), str(self.metric), tolerance, quality, full)

    def plans(self, methods: Methods, budget: Budget | None) -> list[Plan]:
        """Exact counts for every prompt, without running the model.

        Raises:
            BudgetError: Some prompt cannot keep to the budget.
        """
        return [make_plan(methods, budget, one.layout, self.facts([one])) for one in self.calibration.examples]

    def prices(self, plans: Sequence[Plan]) -> dict[str, float]:
        """What plans cost, predicted, as means per prompt: ``share`` of the visual tokens per layer, FLOPs, cache."""
        shares = [plan.mean_tokens(self.layers) / plan.total for plan in plans]
        found = {"share": statistics.fmean(shares)}
        units: tuple[tuple[str, Unit], ...] = (("flops", "flops"), ("kv_bytes", "bytes"))
        for name, unit in units:
            pairs = list(zip(plans, self.calibration.examples, strict=True))
            pruned = [self.cost.amount(unit, one.text, plan.row_tokens(0, self.layers)) for plan, one in pairs]
            full = [self.cost.amount(unit, one.text, [one.visual] * self.layers) for _, one in pairs]
            found[name], found[f"{name}_full"] = statistics.fmean(pruned), statistics.fmean(full)
        return found

    def score(self, methods: Methods | None, budget: Budget | None) -> Score:
        """Judge methods; None judges the full model."""
        reference = self.reference
        with self.judging():
            if methods is None:
                return self._score([self._logits(*pair) for pair in zip(self.batches, reference, strict=True)])
            with patch(self.model, methods.named, budget):
                return self._score([self._logits(*pair) for pair in zip(self.batches, reference, strict=True)])

    def first_logits(self, batch: Sequence[Example]) -> torch.Tensor:
        """[B, 1, V] logits of the first answer token, under whatever patch is in force."""
        logits: torch.Tensor = self.model(**self.inputs_of(batch), use_cache=False, logits_to_keep=1).logits
        return logits[:, -1:]

    def score_logits(self, logits: Sequence[torch.Tensor]) -> Score:
        """Judge [B, 1, V] first-token logits of every batch, however they were computed."""
        return self._score(logits)

    @cached_property
    def reference(self) -> list[torch.Tensor]:
        """Per batch, what should come: [B, t] int64 tokens, or [B, 1, V] logits of the full model."""
        if self.metric.labelled:
            labels = [[one.answer[: self.metric.tokens] for one in batch] for batch in self.batches]
            return [torch.tensor(label, device=self.model.device) for label in labels]
        with self.judging():
            if self.metric.tokens > 1:
                return [self._greedy(batch) for batch in self.batches]
            logits = [self._logits(batch, None) for batch in self.batches]
        return logits if self.metric.name == "kl" else [found.argmax(-1) for found in logits]

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Evaluation mode without gradients, and every module's mode as it was afterwards."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module, training in modes.items():
                module.training = training

    def inputs_of(self, batch: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch of equally shaped prompts on the model's device, in its number format."""
        device, dtype = self.model.device, self.model.dtype
        joined = {name: torch.cat([one.inputs[name] for one in batch]) for name in batch[0].inputs}
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in joined.items()
        }

    def _score(self, logits: Sequence[torch.Tensor]) -> Score:
        # The most likely of NaNs is a token like any other, so every pruning would agree with the full model.
        if not all(bool(torch.isfinite(found).all()) for found in logits):
            raise CalibrationError(
                f"the metric {self.metric} cannot be judged: the model's logits are not finite numbers. Check weights "
                "and number format; float16 overflows in some models where bfloat16 does not."
            )
        values = [
            self.metric.value(row, expected)
            for rows, expecteds in zip(logits, self.reference, strict=True)
            for row, expected in zip(rows, expecteds, strict=True)
        ]
        mean = statistics.fmean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return Score(mean, spread / len(values) ** 0.5)

    def _logits(self, batch: Sequence[Example], reference: torch.Tensor | None) -> torch.Tensor:
        """[B, t, V] logits at the answer tokens, each with the true tokens before it."""
        if self.metric.tokens == 1:
            return self.first_logits(batch)
        assert reference is not None
        output = self._generate(self.inputs_of(batch), len(reference[0]), [_Forced(reference[0])])
        return torch.stack(output.logits, 1)

    def _greedy(self, batch: Sequence[Example]) -> torch.Tensor:
        inputs = self.inputs_of(batch)
        tokens: torch.Tensor = self._generate(inputs, self.metric.tokens, []).sequences[
            :, inputs["input_ids"].shape[1] :
        ]
        return tokens

    def _generate(self, inputs: dict[str, torch.Tensor], tokens: int, processors: list[Any]) -> Any:
        from transformers import LogitsProcessorList

        return self.model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
            logits_processor=LogitsProcessorList(processors),
        )


class _Forced:
    """A logits processor that makes ``generate`` say given tokens; its ``output_logits`` are the model's own."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[self.step]] = 0
        self.step += 1
        return forced


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Consecutive examples of equal shape, ``size`` at most."""

    def shape(example: Example) -> list[Any]:
        return sorted((name, value.shape[1:], len(value)) for name, value in example.inputs.items())

    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) == size or shape(batch[0]) != shape(example)):
            yield batch
            batch = []
        batch.append(example)
    yield batch
