"""A model under a budget that answers what a harness asks: text to a stop, or how likely given answers are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from vlm_budget import __version__
from vlm_budget.cli.loading import load
from vlm_budget.engine.clock import Interval
from vlm_budget.errors import OptionError, TaskError
from vlm_budget.eval.adapters.decoding import Decoding, Force, Until, criteria, cut, filler, processors, written
from vlm_budget.eval.adapters.meter import Meter
from vlm_budget.eval.adapters.turn import Prompts, Turn
from vlm_budget.eval.cells import UNPATCHED, parse_methods
from vlm_budget.eval.frames import read_frames
from vlm_budget.methods import resolve_methods
from vlm_budget.models import find_family, layout_of
from vlm_budget.patching import patch
from vlm_budget.pruner import Pruner

DTYPES = ("auto", "float32", "bfloat16", "float16")
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Setting:
    """Which model answers, and under what budget.

    Attributes:
        model: A shipped model, a local folder or a hub id.
        method: ``hired``, ``hired+fastv``, ``hired(alpha=0.3)``; ``unpatched`` for the model as it is; None for the
            model's default, or where a plan names it.
        budget: What each prompt may spend, such as 0.2, 128 or ``"40% flops"``.
        plan: Path of a recipe, instead.
        positions: ``"packed"`` or ``"original"``, to override the method's.
        options: Fields of the methods.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        dtype: One of :data:`DTYPES`.
        frames: Frames that are taken of a video.
    """

    model: str = "nano"
    method: str | None = None
    budget: str | float | None = None
    plan: str | Path | None = None
    positions: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    frames: int = 32

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        if self.dtype not in DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1:
            raise OptionError(f"frames must be a number from 1 on, got {self.frames!r}")
        beside = {"budget": self.budget, "plan": self.plan, "positions": self.positions, **self.options}
        given = [name for name, value in beside.items() if value is not None]
        if self.method == UNPATCHED and given:
            raise OptionError(f"method={UNPATCHED} is the model as it is; leave out {', '.join(given)}")

    def acting(self) -> list[Pruner] | None:
        """The configured methods; None where none is named.

        Raises:
            UnknownNameError: There is no such method or option; the message suggests.
            OptionError: The text cannot be read, or an option's value is not usable.
        """
        if self.method is None:
            return None
        if "(" in self.method:
            if self.options:
                raise OptionError(f"{self.method!r} says its options; leave out {', '.join(self.options)}")
            found = parse_methods(self.method)
        else:
            found = resolve_methods([name.strip() for name in self.method.split("+")], self.options)
        return found.named


class Answerer:
    """A loaded, patched model.

    Args:
        setting: Which, and how.

    Raises:
        ModelLoadError, UnsupportedModelError: There is no such model, or no family knows it.
        VLMBudgetError: Method, budget, plan, device or an option cannot be used.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.meter = setting, Meter()
        methods = None if setting.method == UNPATCHED else setting.acting()
        loaded = load(setting.model, _device(setting.device), setting.dtype, lambda step: None)
        self.model, self.processor = loaded.model, loaded.processor
        self._base: Any
        _, self._base, self._family = find_family(self.model)
        self._layers = int(self.model.config.get_text_config().num_hidden_layers)
        self.videos = "video" in self._family.encoders and getattr(self.processor, "video_processor", None) is not None
        self._facts = loaded.facts()
        # Options named without a method are handed on, so that patch says what is wrong with them.
        options = {} if methods is not None else dict(setting.options)
        self._handle = None
        if setting.method != UNPATCHED:
            self._handle = patch(
                self.model, methods, setting.budget, plan=setting.plan, positions=setting.positions, **options
            )

    def close(self) -> None:
        """Undo the patch."""
        if self._handle is not None:
            self._handle.undo()

    def facts(self, sums: Meter | None = None) -> dict[str, Any]:
        """Plain data for a report: the model, the methods in force, and means per prompt.

        Args:
            sums: What to report; None for the own sums.
        """
        handle = self._handle
        return {
            "library": __version__,
            "model": self._facts,
            "method": UNPATCHED if handle is None else str(handle.methods),
            "budget": None if handle is None or handle.budget is None else str(handle.budget),
            **(sums or self.meter).summary(),
        }

    def answer(
        self,
        turns: Sequence[Turn],
        decoding: Decoding,
        batch_size: int = 1,
        done: Callable[[int], object] | None = None,
        frames: int | None = None,
    ) -> list[str]:
        """Answers in the order of the questions, which are asked longest first.

        Args:
            turns: The questions.
            decoding: How to write.
            batch_size: Most questions at a time; halved where memory runs out.
            done: Told how many more were answered.
            frames: Frames of a video; None for the setting's.

        Raises:
            ImageError, DataError: A picture or video cannot be read.
            BudgetError: A prompt cannot meet the budget.
        """
        found: dict[int, str] = {}
        for kind, numbers in self._batches(turns, batch_size):
            own = [turns[number] for number in numbers]
            found |= dict(zip(numbers, _halving(own, partial(self._write, kind, decoding, frames)), strict=True))
            if done is not None:
                done(len(numbers))
        return [found[number] for number in range(len(turns))]

    def losses(
        self,
        turns: Sequence[Turn],
        answers: Sequence[str],
        batch_size: int = 1,
        done: Callable[[int], object] | None = None,
    ) -> list[tuple[float, bool]]:
        """How unlikely given answers are.

        The model is made to write them, so that a prompt is pruned exactly as when it answers freely.

        Args:
            turns: The questions.
            answers: One per question, with the space before it.
            batch_size: Most questions at a time; halved where memory runs out.
            done: Told how many more were judged.

        Returns:
            Per question the mean negative log-likelihood per token, in nats, and whether greedy decoding would write
            exactly this.

        Raises:
            ImageError, DataError: A picture or video cannot be read.
            TaskError: An answer has no tokens.
        """
        found: dict[int, tuple[float, bool]] = {}
        for kind, numbers in self._batches(turns, batch_size):
            pairs = [(turns[number], answers[number]) for number in numbers]
            found |= dict(zip(numbers, _halving(pairs, partial(self._judge, kind)), strict=True))
            if done is not None:
                done(len(numbers))
        return [found[number] for number in range(len(turns))]

    def _batches(self, turns: Sequence[Turn], size: int) -> Iterator[tuple[str, list[int]]]:
        """Questions of one kind and about one length, the longest first: memory runs out early or never."""
        kinds = [turn.kind(self.videos) for turn in turns]
        for kind in sorted(set(kinds)):
            mine = sorted((n for n, one in enumerate(kinds) if one == kind), key=lambda n: (-turns[n].length, n))
            for first in range(0, len(mine), size):
                yield kind, mine[first : first + size]

    def _prompts(self, turns: Sequence[Turn], kind: str, frames: int | None = None) -> Prompts:
        count = self.setting.frames if frames is None else frames
        return Prompts.of(self.processor, turns, kind, lambda clip: read_frames(clip, count))

    @torch.inference_mode()
    def _write(self, kind: str, decoding: Decoding, frames: int | None, turns: Sequence[Turn]) -> list[str]:
        tokenizer = self.processor.tokenizer
        inputs = self._prompts(turns, kind, frames).inputs(self.processor, self.model)
        start = inputs["input_ids"].shape[1]
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, **dict(decoding.sampling)}
        if decoding.until:
            options["stopping_criteria"] = criteria(Until(tokenizer, decoding.until, start))
        sequences = self._generate(inputs, {**options, "max_new_tokens": decoding.max_new_tokens})
        texts = tokenizer.batch_decode(sequences[:, start:], skip_special_tokens=True)
        return [cut(text, decoding.until).strip() for text in texts]

    @torch.inference_mode()
    def _judge(self, kind: str, pairs: Sequence[tuple[Turn, str]]) -> list[tuple[float, bool]]:
        prompts = self._prompts([turn for turn, _ in pairs], kind)
        forced = [self._tokens(text, answer) for text, (_, answer) in zip(prompts.texts, pairs, strict=True)]
        inputs = prompts.inputs(self.processor, self.model)
        force = Force(forced, inputs["input_ids"].shape[1], filler(self.processor.tokenizer))
        found = self._generate(
            inputs,
            {
                "do_sample": False,
                "num_beams": 1,
                "max_new_tokens": max(map(len, forced)),
                "logits_processor": processors(force),
                "output_logits": True,
                "return_dict_in_generate": True,
            },
        )
        logits = torch.stack(found.logits, dim=1).float().log_softmax(-1)  # [B, T, V]
        judged = []
        for row, tokens in zip(logits, forced, strict=True):
            wanted = torch.tensor(tokens, device=row.device)
            likely = row[: len(tokens)]
            loss = -likely.gather(-1, wanted[:, None]).mean()
            judged.append((float(loss), bool((likely.argmax(-1) == wanted).all())))
        return judged

    def _tokens(self, prompt: str, answer: str) -> list[int]:
        """An answer's tokens as they follow a prompt."""
        tokenizer = self.processor.tokenizer

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        before, whole = encode(prompt), encode(prompt + answer)
        # Where the two grow together at the seam, the prompt keeps the tokens that it is given with.
        tokens = whole[len(before) :] if whole[: len(before)] == before else encode(answer)
        if not tokens:
            raise TaskError(f"answer {answer!r} has no tokens, so it has no likelihood")
        return tokens

    def _generate(self, inputs: Any, options: Mapping[str, Any]) -> Any:
        device = self.model.device
        clock = Interval(device)
        found = self.model.generate(**inputs, **options)
        ms = clock.stop().ms
        sequences = found if isinstance(found, torch.Tensor) else found.sequences
        report = None if self._handle is None else self._handle.report()
        new = written(
            sequences[:, inputs["input_ids"].shape[1] :], self.model.generation_config, self.processor.tokenizer
        )
        visual = report.visual_tokens if report is not None else self._visual(inputs)
        self.meter.add(len(inputs["input_ids"]), visual, new, ms, self._layers, report)
        return found

    def _visual(self, inputs: Any) -> int:
        given = dict(inputs)
        if not self._family.given_modalities(given):
            return 0
        return sum(map(sum, layout_of(self._base, self._family, given).row_sizes()))


def _halving(items: Sequence[_Item], ask: Callable[[Sequence[_Item]], list[_Found]]) -> list[_Found]:
    """Ask about all at once, or about one half after the other where memory runs out."""
    try:
        return ask(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    torch.cuda.empty_cache()  # outside the except block, which holds the failed call's tensors
    half = len(items) // 2
    return _halving(items[:half], ask) + _halving(items[half:], ask)


def _device(wanted: str) -> str:
    """A device of this process, as ``load`` takes it.

    Under a launcher every process takes the accelerator of its local rank.

    Raises:
        OptionError: There is no such device.
    """
    name, _, number = str(wanted).partition(":")
    if name not in ("auto", "cpu", "cuda", "mps") or (number and (name != "cuda" or not number.isdecimal())):
        raise OptionError(f"device must be auto, cpu, cuda, cuda:NUMBER or mps, got {wanted!r}")
    count = torch.cuda.device_count() if name in ("auto", "cuda") else 0
    if number and int(number) >= count:
        raise OptionError(f"device {wanted}: there are {count} CUDA devices here")
    if count:
        local = int(number) if number else int(os.environ.get("LOCAL_RANK", "0")) % count
        torch.cuda.set_device(local)
    return name
