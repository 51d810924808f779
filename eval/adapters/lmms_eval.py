"""lmms-eval with a budget: ``lmms-eval --model vlm_budget --model_args pretrained=...,method=hired,budget=0.2``.

lmms-eval finds this class through the entry point of its group ``lmms_eval.models``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from PIL import Image
from tqdm import tqdm

from vlm_budget.errors import OptionError, TaskError
from vlm_budget.eval.adapters.answerer import Answerer, Setting
from vlm_budget.eval.adapters.decoding import Decoding, sampling
from vlm_budget.eval.adapters.meter import Meter, check_report, write_report
from vlm_budget.eval.adapters.turn import Turn
from vlm_budget.eval.sample import Clip, Picture

_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
_LENGTH = ("max_new_tokens", "max_gen_toks")
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_SOUNDS = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus")
_ARGUMENTS = 6  # of a request with a question: context, target, visuals, id, task, split
_AUTO = 16
_BATCHES = 16


class VLMBudget(lmms):  # type: ignore[misc]
    """Any model that this library supports, under any of its methods.

    Args:
        pretrained: ``nano``, a local folder or a hub id.
        method: ``hired``, ``hired+fastv``, ``hired(alpha=0.3)``, or ``unpatched`` for the model as it is. None takes
            the default for the model.
        budget: What each prompt may spend: ``0.2``, ``128``, ``40% flops``, …
        plan: A recipe's file, instead of method and budget.
        positions: ``packed`` or ``original``, to override the method's.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        batch_size: Most prompts at a time, halved where memory runs out; ``auto`` starts at ``max_batch_size``.
        max_batch_size: For ``auto``; 16 by default.
        max_new_tokens: Longest answer of tasks that name no length.
        max_frames_num: Frames that are taken of a video.
        report: A file for tokens and times, as JSON.
        options: Fields of the method.

    Raises:
        VLMBudgetError: The model, or one of the others, cannot be used; the message says which.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "nano",
        method: str | None = None,
        budget: str | float | None = None,
        plan: str | None = None,
        positions: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = 1024,
        max_frames_num: int = 32,
        report: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_report(report)
        self.batch_size_per_gpu = _batch_size(batch_size, max_batch_size)
        self.max_new_tokens, self._report_file = max_new_tokens, report
        where = "auto" if device is None else str(device)
        self._answerer: Answerer | None = Answerer(
            Setting(pretrained, method, budget, plan, positions, options, where, dtype, max_frames_num)
        )
        self._ignored: set[str] = set()

    @property
    def batch_size(self) -> int:
        """Most prompts at a time."""
        return self.batch_size_per_gpu

    @property
    def answerer(self) -> Answerer:
        """The patched model.

        Raises:
            TaskError: The run is over, and the model is gone.
        """
        if self._answerer is None:
            raise TaskError("this run is over and its model is unloaded; make a new VLMBudget for another one")
        return self._answerer

    @property
    def model(self) -> Any:
        """The model."""
        return self.answerer.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.answerer.processor.tokenizer

    @property
    def config(self) -> Any:
        """Its configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where it runs; the CPU after the run."""
        return torch.device("cpu") if self._answerer is None else torch.device(self._answerer.model.device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests.

        Raises:
            ImageError, TaskError: What a request shows cannot be read, or is neither picture nor video.
        """
        groups: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._decoding(request.args[1]), []).append(number)
        found: dict[int, str] = {}
        with self._counting(len(requests)) as count:
            for decoding, numbers in groups.items():
                for window in self._windows(numbers):
                    turns = [self._turn(requests[number].args) for number in window]
                    answers = self.answerer.answer(turns, decoding, self.batch_size, count)
                    found |= dict(zip(window, answers, strict=True))
        return [found[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Per request the mean negative log-likelihood per token, and whether greedy decoding would write it.

        lmms-eval takes the choice with the least value, as its own models return losses here. The pairs are wrapped:
        lmms-eval 0.7.3 turns bare ones into text, on which its multiple-choice tasks then fail.

        Raises:
            TaskError: A request has no question (mutual information), or an answer without tokens.
        """
        if any(len(request.args) != _ARGUMENTS for request in requests):
            raise TaskError("acc_mutual_info asks for answers without a question and pictures; use acc instead")
        found: list[tuple[float, bool]] = []
        with self._counting(len(requests)) as count:
            for window in self._windows(range(len(requests))):
                arguments = [requests[number].args for number in window]
                turns = [self._turn(one) for one in arguments]
                answers = [self._target(one) for one in arguments]
                found += self.answerer.losses(turns, answers, self.batch_size, count)
        return [GenerationResult(_Pair(pair)) for pair in found]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Not supported.

        Raises:
            TaskError: Always.
        """
        _refuse("asks in several rounds", requests)

    def generate_visual_cot(self, requests: Sequence[Any]) -> NoReturn:
        """Not supported.

        Raises:
            TaskError: Always.
        """
        _refuse("wants pictures drawn", requests)

    def clean(self) -> None:
        """Report, and unload the model; lmms-eval calls this when every request is answered."""
        if self._answerer is not None:
            facts = self._answerer.facts(self._all_sums(self._answerer.meter))
            facts["batch_size"], facts["processes"] = self.batch_size, self.world_size
            if self.rank == 0 and self._report_file is not None:
                write_report(self._report_file, facts)
            self._answerer.close()
            self._answerer = None
        super().clean()

    def _decoding(self, arguments: Any) -> Decoding:
        """How a task wants answers written; every process warns once of what it does not know."""
        until = arguments.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(map(str, until))
        longest = next((arguments[name] for name in _LENGTH if arguments.get(name) is not None), self.max_new_tokens)
        unknown = set(arguments) - {"until", *_LENGTH, *_SAMPLING} - self._ignored
        if unknown:
            self._ignored |= unknown
            logger.warning(f"vlm_budget does not know the generation argument(s) {', '.join(sorted(unknown))}")
        named = {name: arguments[name] for name in _SAMPLING if name in arguments}
        return Decoding(int(longest), tuple(stop for stop in stops if stop), sampling(named))

    def _windows(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """A few batches at a time: their pictures are in memory together."""
        size = _BATCHES * self.batch_size
        for first in range(0, len(numbers), size):
            yield numbers[first : first + size]

    def _turn(self, arguments: Sequence[Any]) -> Turn:
        context, _, doc_to_visual, doc_id, task, split = arguments
        shown = None if doc_to_visual is None else doc_to_visual(self.task_dict[task][split][doc_id])
        return Turn.marked(context, [_visual(one, f"{task} {doc_id}") for one in shown or []])

    def _target(self, arguments: Sequence[Any]) -> str:
        _, target, _, doc_id, task, split = arguments
        return str(target(self.task_dict[task][split][doc_id]) if callable(target) else target)

    @contextmanager
    def _counting(self, total: int) -> Iterator[Callable[[int], object]]:
        """A progress bar; at its end, say what this part of the run took, and put it among the run's results."""
        meter = self.answerer.meter
        before = Counter(meter.sums)
        with tqdm(total=total, disable=self.rank != 0, desc="Model Responding") as bar:
            yield bar.update
        own = Meter(Counter(meter.sums))
        own.sums.subtract(before)
        logger.info(f"vlm_budget: {own.line()}")
        found = own.summary()
        if found["prompts"]:
            seconds, new = own.sums["total_ms"] / 1000, int(own.sums["new"])
            extra = {name: found[name] for name in ("visual_tokens", "kept_tokens", "kept_tokens_over_layers")}
            log_metrics(seconds, new, new / seconds, {**extra, "ms_per_prompt": found["ms"]["total"]})

    def _all_sums(self, meter: Meter) -> Meter:
        if self.world_size == 1 or not torch.distributed.is_initialized():
            return meter
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, dict(meter.sums))
        return meter.merge(gathered)


class _Pair(tuple[float, bool]):
    """A loss that lmms-eval's response cache leaves alone: it would give text back instead."""

    def strip(self) -> str:
        """Nothing to keep."""
        return ""


def _batch_size(wanted: int | str, most: int | None) -> int:
    if isinstance(wanted, str) and wanted.startswith("auto"):
        return most or _AUTO
    try:
        size = int(wanted)
    except (TypeError, ValueError):
        size = 0
    if size < 1:
        raise OptionError(f"batch_size must be a number from 1 on, or auto, got {wanted!r}")
    return size


def _visual(shown: Any, name: str) -> Picture | Clip:
    """A picture or a video as tasks hand it over: itself, its file, or a mapping with its file."""
    if isinstance(shown, Image.Image):
        return Picture(name, shown)
    start, end = 0.0, None
    if isinstance(shown, dict):
        start, end = float(shown.get("video_start") or 0.0), shown.get("video_end")
        shown = next((shown[key] for key in ("url", "path", "video", "image") if shown.get(key)), shown)
        if isinstance(shown, Image.Image):
            return Picture(name, shown)
    if isinstance(shown, str | Path):
        path = Path(shown)
        if path.suffix.lower() in _SOUNDS:
            raise TaskError(f"{name} plays a sound ({path.name}); only pictures and videos are supported")
        if path.suffix.lower() in _PICTURES:
            return Picture(path.name, path)
        return Clip(path.name, path, start, None if end is None else float(end))
    raise TaskError(f"{name} shows a {type(shown).__name__}; a picture, its file, or a video's file is expected")


def _refuse(what: str, requests: Sequence[Any]) -> NoReturn:
    task = requests[0].task_name if requests else "the task"
    raise TaskError(
        f"{task} {what}, which vlm_budget does not do; choose tasks of the types generate_until, "
        "loglikelihood and multiple_choice"
    )
