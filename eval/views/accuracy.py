"""What SeGPruner, QuoTA and T* do on nano-views' held-out rooms and clips, against their controls.

``python -m vlm_budget.eval.views.accuracy rooms|haystack|search`` writes ``benchmarks/results/views_PART.json``.

* rooms: SeGPruner by scene and by view, its single stages, VisPruner, DivPrune, random and uniform; and what keeping
  the patches of things would give, which takes labels to know.
* haystack: all tokens of evenly spread frames; QuoTA, by entities and by the raw question; the two controls of the
  same number of tokens (the same frames; more frames with fewer tokens each); fewer frames with all their tokens.
  The scorer's time stands beside the model's.
* search: T* against frames spread evenly, as many as it keeps; temporal precision, recall and F1 at 5 s.

Every question is asked through ``patch`` and a stock forward. Differences are paired by question, with standard errors
clustered by scene; random is the mean of its draws. Nothing here was chosen on the test seeds: defaults of methods come
from ``--validation``, which reads other scenes.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from vlm_budget.eval.record import environment, write_json
from vlm_budget.eval.statistics import clustered
from vlm_budget.eval.views import clips, folder, rooms, scorer
from vlm_budget.eval.views.asking import Clip, Model, Room, Things, ask_clips, ask_rooms
from vlm_budget.eval.views.modeling import FRAME_TOKENS
from vlm_budget.eval.views.scorer.captions import clues
from vlm_budget.pruner import Positions, Pruner
from vlm_budget.registry import PRUNERS
from vlm_budget.video.frames.clip import ClipScorer
from vlm_budget.video.frames.metrics import temporal
from vlm_budget.video.frames.queries import Query
from vlm_budget.video.frames.scorers import FrameScorer
from vlm_budget.video.frames.tstar import TStar, search

PARTS = ("rooms", "haystack", "search")
OURS = "segpruner, scene"
ROOM_SETTINGS: tuple[tuple[float, Positions], ...] = ((0.09, "packed"), (0.09, "original"), (0.23, "original"))
DRAWS = 3
FRAMES = 32
FULL = FRAMES * FRAME_TOKENS + 1
CLIP_SHARES = (0.5, 0.25, 0.1)
KEPT = 8


def room_methods(positions: Positions) -> dict[str, list[Pruner]]:
    """Rows of the rooms' table; several methods of a row are draws whose mean counts."""

    def made(name: str, **options: Any) -> Pruner:
        pruner: Pruner = PRUNERS.get(name)(positions=positions, **options)
        return pruner

    return {
        OURS: [made("segpruner")],
        "segpruner, repetitions kept": [made("segpruner", repeats=0.0)],
        "segpruner, view": [made("segpruner", scope="view")],
        "saliency only, scene": [made("segpruner", saliency_ratio=1.0)],
        "diversity only, scene": [made("segpruner", saliency_ratio=0.0)],
        "saliency only, view": [made("segpruner", scope="view", saliency_ratio=1.0)],
        "diversity only, view": [made("segpruner", scope="view", saliency_ratio=0.0)],
        "segpruner, no geometry": [made("segpruner", weight=0.0, repeats=0.0)],
        "vispruner": [made("vispruner")],
        "divprune": [made("divprune")],
        "uniform": [made("uniform")],
        "random": [made("random", seed=seed) for seed in range(DRAWS)],
        "labels: patches of things": [Things(positions=positions)],
    }


def rooms_table(model: Model, samples: Sequence[rooms.RoomSample]) -> dict[str, Any]:
    """Accuracy of every method at every budget."""
    ready = [Room.of(model, sample) for sample in track(samples, description="rooms")]
    masks = masks_of(samples, rooms.TASKS)
    full = ask_rooms(model, ready, None, 1.0).astype(float)
    rows = []
    for budget, positions in ROOM_SETTINGS:
        methods = room_methods(positions)
        values = {
            name: np.mean([ask_rooms(model, ready, one, budget) for one in draws], 0)
            for name, draws in track(methods.items(), description=f"rooms at {budget:.0%}, {positions}")
        }
        for name, draws in methods.items():
            rows.append(
                {
                    "method": name,
                    "configured": type(draws[0]).__name__ if isinstance(draws[0], Things) else str(draws[0]),
                    "budget": budget,
                    "positions": positions,
                    "accuracy": scores(values[name], masks),
                    "minus_full": scores(values[name] - full, masks),
                    "segpruner_minus": scores(values[OURS] - values[name], masks),
                }
            )
    shown = len(ready[0].inputs["input_ids"][0])
    return {
        "rooms": len(samples),
        "visual_tokens": shown - rooms.PROMPT_WORDS - 1,
        "prior": rooms.priors(question for sample in samples for question in sample.questions),
        "full": scores(full, masks),
        "rows": rows,
    }


def clips_table(model: Model, scorer_: FrameScorer, samples: Sequence[clips.ClipSample]) -> dict[str, Any]:
    """QuoTA and its controls at every budget."""
    shown = {count: [Clip(one, queries_of(one), count) for one in samples] for count in (16, FRAMES, 64, clips.FRAMES)}
    masks = masks_of(samples, clips.TASKS)
    full, spent = ask_clips(model, shown[FRAMES], None, None)
    full = full.astype(float)
    rows: list[dict[str, Any]] = []
    asked = len(samples) * clips.QUESTIONS_PER_CLIP

    def row(name: str, frames: int, tokens: int | None, scored: bool = False, raw: bool = False) -> None:
        method: Pruner | None = None if tokens is None else PRUNERS.get("quota")()
        values, seconds = ask_clips(model, shown[frames], method, tokens, scorer_ if scored else None, raw)
        rows.append(
            {
                "method": name,
                "frames": frames,
                "tokens": frames * FRAME_TOKENS + 1 if tokens is None else tokens,
                "accuracy": scores(values, masks),
                "minus_full": scores(values - full, masks),
                "model_ms": round(1000 * seconds.model / asked, 3),
                "scorer_ms": round(1000 * seconds.scorer / asked, 3),
            }
        )

    for share in track(CLIP_SHARES, description="haystack"):
        tokens = round(share * FULL)
        for frames in (FRAMES, 64, clips.FRAMES):
            row("quota, entities", frames, tokens, scored=True)
        row("quota, raw question", 64, tokens, scored=True, raw=True)
        row("same frames, fewer tokens each", FRAMES, tokens)
        for frames in (64, clips.FRAMES):
            row("more frames, fewer tokens each", frames, tokens)
        if share == CLIP_SHARES[0]:
            row("half of the frames", 16, None)
    row("quota, entities", 64, FULL, scored=True)
    row("more frames, fewer tokens each", 64, FULL)
    return {
        "clips": len(samples),
        "frames": FRAMES,
        "tokens": FULL,
        "prior": clips.priors(question for sample in samples for question in sample.questions),
        "full": scores(full, masks) | {"model_ms": round(1000 * spent.model / asked, 3)},
        "rows": rows,
    }


def search_table(scorer_: ClipScorer, samples: Sequence[clips.ClipSample]) -> dict[str, Any]:
    """T* against as many frames spread evenly; the truth are the seconds of the events a question is about."""
    found: dict[str, list[Any]] = {"tstar": [], "uniform": []}
    visited = []
    for sample in track(samples, description="search"):
        pictures = Clip(sample, (), clips.FRAMES).pictures
        for question in sample.questions:
            if not question.targets:
                continue
            targets = clues(question.prompt)
            table = scorer_.score(pictures, targets)
            result = search(
                partial(_rows, table),
                clips.FRAMES,
                targets=len(targets),
                keep=KEPT,
                settings=TStar(budget=0.5),
            )
            truth = [sum(sample.scene.events[target].seconds) / 2 for target in question.targets]
            found["tstar"].append(temporal(result.times, truth))
            found["uniform"].append(temporal([float(index) for index in clips.evenly(KEPT)], truth))
            visited.append(len(result.visited) / clips.FRAMES)
    return {
        "questions": len(visited),
        "kept": KEPT,
        "visited_share": round(float(np.mean(visited)), 4),
        **{
            name: {
                measure: round(float(np.mean([getattr(one, measure) for one in each])), 4)
                for measure in ("precision", "recall", "f1")
            }
            for name, each in found.items()
        },
    }


def _rows(table: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """A look at a clip whose frames are all scored."""
    return table[list(indices)]


def queries_of(sample: clips.ClipSample) -> list[Query]:
    """The questions with the entities they name."""
    return [Query(question.prompt, targets=clues(question.prompt)) for question in sample.questions]


def masks_of(samples: Sequence[Any], tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """Which questions count for which row: all, and every form."""
    forms = np.array([[question.task for question in sample.questions] for sample in samples])
    return {"all": np.ones(forms.shape, dtype=bool), **{task: forms == task for task in tasks}}


def scores(values: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean and standard error per group."""
    return {name: clustered(np.asarray(values, dtype=float), mask) for name, mask in masks.items()}


def main() -> None:
    """Command line."""
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/views_PART.json")
    parser.add_argument("--checkpoint", type=Path, default=None, help="another training")
    parser.add_argument("--scenes", type=int, default=200, help="rooms or clips of six questions each")
    parser.add_argument("--validation", action="store_true", help="other scenes, on which settings may be chosen")
    arguments = parser.parse_args()
    path, part = arguments.checkpoint or folder(), arguments.part
    seed = "VALIDATION_SEED" if arguments.validation else "TEST_SEED"
    result: dict[str, Any] = {
        "weights": hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest(),
        "seeds": seed,
        "environment": environment(),
    }
    model = Model(
        LlavaOnevisionForConditionalGeneration.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    )
    if part == "rooms":
        result |= rooms_table(model, rooms.test_set(arguments.scenes, getattr(rooms, seed)))
    else:
        samples = clips.test_set(arguments.scenes, getattr(clips, seed))
        frame_scorer = scorer.load()
        made = clips_table(model, frame_scorer, samples) if part == "haystack" else search_table(frame_scorer, samples)
        result |= made
    write_json(arguments.out or Path(f"benchmarks/results/views_{part}.json"), result)


if __name__ == "__main__":
    main()
