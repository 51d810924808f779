"""A model answering batches of samples, unpatched or under a method, with an account of tokens and times.

Pictures are encoded once per batch and serve all cells, where the model takes encoded features: the vision encoder runs
with the probes of every method, and each method finds its scores on the features. Its time is then the same for all.
Frames are scored once per batch, too, and that time is told of the methods that read the scores.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vlm_budget.cost import CostModel
from vlm_budget.engine.clock import Interval, total_ms
from vlm_budget.errors import DataError
from vlm_budget.eval.beside import lay_beside, score_frames
from vlm_budget.eval.cells import Cell
from vlm_budget.eval.sample import Sample
from vlm_budget.eval.task import Task
from vlm_budget.models import encoder_inputs, find_family, layout_of, text_tokens
from vlm_budget.patching import patch
from vlm_budget.prompts import build_inputs
from vlm_budget.pruner import Attention, Pruner, Tower

if TYPE_CHECKING:
    from PIL import Image

    from vlm_budget.cli.loading import Loaded
    from vlm_budget.report import KeptItem
    from vlm_budget.video.frames.scorers import FrameScorer

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass(frozen=True, kw_only=True)
class Watch(Pruner):
    """Asks the vision side for what several methods need, and drops nothing."""

    wanted: tuple[Attention, ...] = ()
    hidden: bool = False
    unpooled: bool = False

    paper: ClassVar[str] = ""

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """All of it."""
        return self.wanted

    @property
    def wants_hidden(self) -> bool:
        """The projector's inputs, too."""
        return self.hidden

    @property
    def reads_unpooled(self) -> bool:
        """Frames before they are pooled, too."""
        return self.unpooled

    @classmethod
    def over(cls, pruners: Sequence[Pruner], tower: Tower) -> Watch:
        """What some methods need."""
        needs = tuple(dict.fromkeys(need for pruner in pruners for need in pruner.all_needs(tower)))
        return cls(
            wanted=needs,
            hidden=any(pruner.wants_hidden for pruner in pruners),
            unpooled=any(pruner.reads_unpooled for pruner in pruners),
        )


@dataclass(eq=False)
class Batch:
    """Samples as a model's inputs.

    Attributes:
        task: Their task.
        samples: The samples.
        pictures: Per sample, what its model inputs were made of: pictures, or the frames of its video.
        inputs: The processor's tensors.
        sizes: Per sample, the visual tokens of each of its items.
        text: Per sample, its text tokens.
        ms: Milliseconds by stage, of making the batch.
        shared: The features in ``inputs`` were encoded for all cells.
        videos: The pictures went in as videos.
        scores: Per sample, the relevance of its frames; None where no method reads it or nothing scores it.
        score_ms: Milliseconds that took.
    """

    task: Task
    samples: Sequence[Sample]
    pictures: list[list[Image.Image]]
    inputs: dict[str, Any]
    sizes: list[tuple[int, ...]]
    text: list[int]
    ms: dict[str, float] = field(default_factory=dict)
    shared: bool = False
    videos: bool = False
    scores: list[torch.Tensor] | None = None
    score_ms: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a model said to a batch.

    Attributes:
        texts: Per sample.
        costs: Per sample; see :class:`vlm_budget.eval.store.Answer`.
        ms: Milliseconds of the whole batch by stage.
        peak_bytes: Peak memory of the accelerator; 0 on a CPU.
        kept: Which visual tokens stayed, item by item; None for the unpatched model, and where nobody asked.
    """

    texts: list[str]
    costs: list[dict[str, float]]
    ms: dict[str, float]
    peak_bytes: int
    kept: tuple[KeptItem, ...] | None


class Driver:
    """Runs one model.

    Args:
        loaded: The model with its processor, not patched.
        cells: All that will answer.
        share: Encode pictures once per batch for all cells, where the model can.
        scorer: What scores frames for methods that read scores; None leaves these without.
    """

    def __init__(
        self, loaded: Loaded, cells: Sequence[Cell], share: bool = True, scorer: FrameScorer | None = None
    ) -> None:
        self.model, self.processor = loaded.model, loaded.processor
        _, self.base, self.family = find_family(self.model)
        self.cost = CostModel.of(self.base, self.family)
        self.methods = {cell: cell.acting for cell in cells if not cell.unpatched}
        pruners = [methods.vision for methods in self.methods.values() if methods.vision is not None]
        self.watch = Watch.over(pruners, self.family.tower(self.base))
        self.share = share and len(cells) > 1 and _takes_features(self.model)
        self.scorer, self._scored = scorer, False

    def prepare(self, task: Task, samples: Sequence[Sample]) -> Batch:
        """Read pictures, make inputs, and encode them if all cells share that.

        Raises:
            ImageError, DataError: A picture or video cannot be read.
            Exception: Whatever the processor or the encoder makes of odd input.
        """
        began = time.perf_counter()
        pictures = [self._pictures(task, sample) for sample in samples]
        loaded = time.perf_counter()
        videos = samples[0].clip is not None and self._takes_videos
        questions = [sample.prompt for sample in samples]
        inputs = dict(build_inputs(self.processor, questions, pictures, self.model, videos=videos))
        rows = layout_of(self.base, self.family, inputs).rows
        sizes = [tuple(item.size for item in row) for row in rows]
        batch = Batch(task, samples, pictures, inputs, sizes, text_tokens(self.base, self.family, inputs))
        batch.ms = {"load": (loaded - began) * 1000, "process": (time.perf_counter() - loaded) * 1000}
        batch.videos = videos
        if self.share and any(pixels in batch.inputs for pixels in _PIXELS.values()):
            self._encode(batch)
        return batch

    @torch.inference_mode()
    def answer(self, batch: Batch, cell: Cell, draw: bool = False) -> Outcome:
        """What a cell says; greedy decoding.

        Args:
            batch: What :meth:`prepare` made.
            cell: One of the cells.
            draw: Tell which tokens were kept, which makes the device wait.

        Raises:
            Exception: Whatever the model or the method raises; a budget that a prompt cannot meet, for one.
        """
        device = self.model.device
        method = None if cell.unpatched else self.methods[cell].vision
        reads_frames = method is not None and method.reads_frames
        if reads_frames and batch.scores is None:
            self._score(batch)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        whole = Interval(device)
        if cell.unpatched:
            with self._timed() as clock:
                sequences = self._generate(batch)
            ms, kept = clock.ms(), None
            costs = self._unpatched_costs(batch)
        else:
            methods = self.methods[cell]
            with patch(self.model, methods.named, cell.spend) as handle:
                lay_beside(handle, method, batch.samples, batch.scores, batch.videos)
                sequences = self._generate(batch)
                report, kept = handle.report(), handle.kept() if draw else None
            costs = self._costs(batch, report.plan)
            names = ("encode", "select", "compact", "prefill", "drop")
            ms = {name: getattr(report, f"{name}_ms") for name in names}
            ms["decode"] = (report.decode_ms_per_token or 0.0) * report.decode_steps
            if reads_frames:
                ms["score"] = batch.score_ms
        ms["total"] = whole.stop().ms
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        new = sequences[:, batch.inputs["input_ids"].shape[1] :].cpu()  # one wait for the device, not one per row
        texts = [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
        for row, cost in zip(new, costs, strict=True):
            cost["new"] = self._length(row)
        return Outcome(texts, costs, {**ms, **batch.ms}, peak, kept)

    def _pictures(self, task: Task, sample: Sample) -> list[Image.Image]:
        if sample.clip is not None:
            from vlm_budget.eval.frames import read_frames

            return read_frames(sample.clip, task.frames)
        return [picture.load() for picture in sample.images]

    @property
    def _takes_videos(self) -> bool:
        """The processor knows videos; else frames go in as pictures."""
        return "video" in self.family.encoders and getattr(self.processor, "video_processor", None) is not None

    @torch.inference_mode()
    def _encode(self, batch: Batch) -> None:
        clock = Interval(self.model.device)
        features = {}
        with patch(self.model, self.watch, 0.5):  # nothing is dropped by the encoder; at 1.0 nothing would be watched
            for modality in self.family.given_modalities(batch.inputs):
                encoder: Any = getattr(self.base, self.family.encoders[modality])
                features[modality] = encoder(
                    **encoder_inputs(self.base, self.family, modality, batch.inputs), return_dict=True
                )
        batch.ms["encode"] = clock.stop().ms
        batch.inputs["mm_encoder_outputs"] = features
        batch.shared = True

    def _score(self, batch: Batch) -> None:
        """Score a batch's frames for all methods that read scores."""
        if self.scorer is None or not all(batch.pictures):
            return
        for _ in range(1 if self._scored else 2):  # the first call pays for what later ones have
            began = time.perf_counter()
            batch.scores = score_frames(self.scorer, batch.samples, batch.pictures)
            batch.score_ms = (time.perf_counter() - began) * 1000
        self._scored = True

    def _generate(self, batch: Batch) -> torch.Tensor:
        inputs = batch.inputs
        if batch.shared:
            inputs = {name: value for name, value in inputs.items() if name not in _PIXELS.values()}
        sequences: torch.Tensor = self.model.generate(
            **inputs, max_new_tokens=batch.task.max_new_tokens, do_sample=False, num_beams=1
        )
        return sequences

    @contextmanager
    def _timed(self) -> Iterator[_Clock]:
        """Clock the unpatched model's encoder and language model."""
        clock = _Clock()
        decoder = self.family.language_model(self.base)
        hooks = [
            decoder.register_forward_pre_hook(clock.enter, with_kwargs=True),
            decoder.register_forward_hook(clock.leave, with_kwargs=True),
        ]
        try:
            yield clock
        finally:
            for hook in hooks:
                hook.remove()

    def _unpatched_costs(self, batch: Batch) -> list[dict[str, float]]:
        layers = len(self.cost.layers)
        counts = [sum(sizes) for sizes in batch.sizes]
        return [self._cost(t, v, v, [v] * layers) for t, v in zip(batch.text, counts, strict=True)]

    def _costs(self, batch: Batch, plan: Any) -> list[dict[str, float]]:
        found = []
        for row, count in enumerate(batch.text):
            items = [item for item in plan.items if item.row == row]
            visual, kept = sum(item.total for item in items), sum(item.keep for item in items)
            at_layers = plan.row_tokens(row, len(self.cost.layers)) if items else [0] * len(self.cost.layers)
            found.append(self._cost(count, visual, kept, at_layers))
        return found

    def _cost(self, text: int, visual: int, kept: int, at_layers: Sequence[int]) -> dict[str, float]:
        return {
            "text": text,
            "visual": visual,
            "kept": kept,
            "mean_kept": sum(at_layers) / len(at_layers),
            "flops": self.cost.prefill_flops(text, at_layers),
            "kv_bytes": self.cost.kv_bytes(text, at_layers),
        }

    def _length(self, row: torch.Tensor) -> int:
        """New tokens of a row, its end token counted and padding not."""
        end = self.model.generation_config.eos_token_id
        ends = torch.as_tensor([end] if isinstance(end, int) else list(end or []), device=row.device)
        stops = torch.isin(row, ends).nonzero().flatten()
        return int(stops[0]) + 1 if len(stops) else len(row)


class _Clock:
    """Times the calls of a language model: the first is the prompt pass."""

    def __init__(self) -> None:
        self.calls: list[Interval] = []

    def enter(self, module: Any, args: Any, kwargs: Any) -> None:
        device = next((one.device for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), None)
        if device is None:
            raise DataError("the language model was called without tensors")
        self.calls.append(Interval(device))

    def leave(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.calls[-1].stop()

    def ms(self) -> dict[str, float]:
        """Milliseconds by stage."""
        return {"prefill": total_ms(self.calls[:1]), "decode": total_ms(self.calls[1:])}


def _takes_features(model: Any) -> bool:
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters
