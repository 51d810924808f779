"""Training scenes rendered in advance: ``python -m vlm_budget.eval.views.shards --seed 0 --out DIR``.

A shard holds the pictures of `SCENES` rooms or clips with the labels of their patches and questions about
them. It is a pure function of ``(task, seed, index)``: whoever needs one that is not there yet renders it
itself, so that a renderer running beside the training changes its pace and nothing else. All stages draw on
the same shards.

All clips of a shard are read at the same number of frames, 32 in half of the shards. No question is asked
about an event that none of these frames shows.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vlm_budget.eval.views import clips, rooms
from vlm_budget.eval.views.labels import batch_labels
from vlm_budget.eval.views.modeling import VOCAB
from vlm_budget.eval.views.questions import Question
from vlm_budget.eval.views.world import Picture, Thing

TASKS = ("rooms", "haystack")
SCENES = 256
QUESTIONS = 16
FULL_FRAMES = 32
FRAME_COUNTS = (32, 16, 32, 64, 32, 24, 32, 48)
"""Frames of the clips of shard ``index``: entry ``index % 8``."""
_TRIES = 48
_ID = {word: i for i, word in enumerate(VOCAB)}


@dataclass(frozen=True)
class Shard:
    """``N`` scenes of ``P`` pictures each.

    Attributes:
        pixels: uint8 ``[N, P, S, S, 3]``.
        kinds: uint8 ``[N, P, 36]``, see `labels.picture_labels`.
        colors: uint8 ``[N, P, 36]``.
        summaries: bool ``[N, P, SUMMARY]``.
        tokens: uint8 ``[N, Q, 8]``, token ids of prompts and answers; some questions may be there twice.
    """

    pixels: np.ndarray
    kinds: np.ndarray
    colors: np.ndarray
    summaries: np.ndarray
    tokens: np.ndarray


def encode(question: Question) -> list[int]:
    """Token ids of the prompt and of the answer."""
    return [*(_ID[word] for word in question.prompt.split()), _ID[question.answer]]


def _fill(questions: Iterable[Question], count: int) -> list[list[int]]:
    """Encoded questions, each once as long as there are enough, else from the first again."""
    rows = list({question.prompt: encode(question) for question in questions}.values())
    return [rows[i % len(rows)] for i in range(count)]


def _room(rng: np.random.Generator, questions: int) -> tuple[list[Picture], tuple[Thing, ...], list[list[int]]]:
    scene = rooms.random_rooms(rng)
    asked = _fill(rooms.ask(scene, rng, questions + questions // 2), questions)
    return list(scene.pictures), scene.room.things, asked


def _clip(
    rng: np.random.Generator, questions: int, frames: int
) -> tuple[list[Picture], tuple[Thing, ...], list[list[int]]]:
    while True:
        scene = clips.random_clip(rng)
        offset = 0.5 if rng.random() < 0.5 else rng.random()
        indices = clips.evenly(frames, offset=offset)
        seen = {i for index in indices for i in scene.active(index)}
        asked = [q for q in clips.ask(scene, rng, _TRIES) if seen.issuperset(q.targets)]
        if asked:
            return [scene.frame(index) for index in indices], scene.room.things, _fill(asked, questions)


def make(task: str, seed: int, index: int, scenes: int = SCENES, questions: int = QUESTIONS) -> Shard:
    """Render shard ``index`` of a task."""
    number, columns = TASKS.index(task), []
    frames = FRAME_COUNTS[index % len(FRAME_COUNTS)]
    for scene in range(scenes):
        rng = np.random.default_rng([seed, 100 + number, index, scene])
        pictures, things, tokens = _room(rng, questions) if task == "rooms" else _clip(rng, questions, frames)
        kinds, colors, summaries = batch_labels(pictures, [things] * len(pictures))
        pixels = np.stack([picture.pixels for picture in pictures])
        columns.append(
            (pixels, kinds.astype(np.uint8), colors.astype(np.uint8), summaries > 0, np.array(tokens, np.uint8))
        )
    return Shard(*map(np.stack, zip(*columns, strict=True)))


class Shelf:
    """The shards of one seed, kept in a folder.

    Args:
        folder: where they lie.
        seed: of the scenes.
        scenes: scenes a shard.
        questions: questions a scene.
    """

    def __init__(self, folder: Path, seed: int, scenes: int = SCENES, questions: int = QUESTIONS) -> None:
        self.folder, self.seed, self.scenes, self.questions = folder, seed, scenes, questions

    def path(self, task: str, index: int) -> Path:
        """File of one shard."""
        return self.folder / f"{task}-{self.seed}-{self.scenes}x{self.questions}-{index:04d}.npz"

    def put(self, task: str, index: int) -> Shard:
        """Render one shard and keep it."""
        shard, path = make(task, self.seed, index, self.scenes, self.questions), self.path(task, index)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        with partial.open("wb") as file:
            np.savez(file, **{field.name: getattr(shard, field.name) for field in fields(Shard)})
        os.replace(partial, path)
        return shard

    def get(self, task: str, index: int) -> Shard:
        """One shard, rendered now if it is not there."""
        path = self.path(task, index)
        if not path.exists():
            return self.put(task, index)
        with np.load(path) as arrays:
            return Shard(**{field.name: arrays[field.name] for field in fields(Shard)})


def render_ahead(shelf: Shelf, count: int, told: Callable[[str], None] = print) -> None:
    """Render the first ``count`` shards of both tasks in the order in which the stages ask for them."""
    for index in range(count):
        for task in TASKS:
            if not shelf.path(task, index).exists():
                shelf.put(task, index)
        told(f"shard {index + 1} of {count}")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Render training scenes ahead of the training.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the OUT of the training")
    parser.add_argument("--count", type=int, default=40, help="shards of each task")
    args = parser.parse_args(argv)
    render_ahead(Shelf(args.out / "shards", args.seed), args.count, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
