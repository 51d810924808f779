"""Long clips with short events: a camera pans through a dull room, and now and then one coloured thing is there.

A clip has `FRAMES` frames, one a second. Four or five events, far apart enough never to overlap, each show one thing of
a kind of its own for four to six frames; so any 32 frames spread evenly show each of them. Grey furniture is always
there.

* ``color``: "what is the color of the cone";
* ``kind``: "which thing in here is colored red" (a colour that one event has);
* ``order``: "which thing comes first cone or ball".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vlm_budget.eval.views.questions import (
    PROMPT_WORDS,
    Question,
    color_question,
    draw,
    kind_question,
    priors,
    unique_colors,
    vocabulary,
)
from vlm_budget.eval.views.world import (
    COLOR_NAMES,
    KINDS,
    Camera,
    Picture,
    Room,
    Thing,
    intrinsics,
    look_at,
    random_surroundings,
    render,
)

__all__ = ["FRAMES", "PROMPT_WORDS", "TASKS", "ClipSample", "ClipScene", "Event", "Question", "priors", "vocabulary"]

FRAMES, FPS = 96, 1.0
TASKS = ("color", "kind", "order")
QUESTIONS_PER_CLIP = 6
VALIDATION_SEED, TEST_SEED = 9_200_001, 9_200_002
_SHORTEST, _LONGEST, _APART = 4, 6, 3


@dataclass(frozen=True)
class Event:
    """One thing's appearance: there in the frames ``start`` to ``stop`` (exclusive), ``color`` and ``kind`` indices."""

    kind: int
    color: int
    start: int
    stop: int

    @property
    def seconds(self) -> tuple[float, float]:
        """Times of its first and its last frame, in seconds."""
        return self.start / FPS, (self.stop - 1) / FPS


@dataclass(frozen=True)
class ClipScene:
    """A clip, rendered frame by frame as asked.

    Attributes:
        room: the room; ``room.things[i]`` is there during ``events[i]`` only.
        cameras: one a frame.
        events: in order of time.
        seed: of the sensor's noise.
    """

    room: Room
    cameras: tuple[Camera, ...]
    events: tuple[Event, ...]
    seed: int

    @property
    def times(self) -> np.ndarray:
        """Seconds of every frame: float64 ``[FRAMES]``."""
        return np.arange(len(self.cameras)) / FPS

    def active(self, index: int) -> list[int]:
        """Events during frame ``index``, one at most."""
        return [i for i, event in enumerate(self.events) if event.start <= index < event.stop]

    def frame(self, index: int) -> Picture:
        """Frame ``index``; the same at every call."""
        rng = np.random.default_rng([self.seed, index])
        return render(self.room, self.cameras[index], self.active(index), rng)

    @property
    def frames(self) -> np.ndarray:
        """All frames: uint8 ``[FRAMES, S, S, 3]``."""
        return np.stack([self.frame(i).pixels for i in range(len(self.cameras))])


@dataclass(frozen=True)
class ClipSample:
    """One clip with its questions."""

    scene: ClipScene
    questions: tuple[Question, ...]


def evenly(count: int, frames: int = FRAMES, offset: float = 0.5) -> list[int]:
    """Indices of ``count`` frames spread evenly, each at ``offset`` (in [0, 1)) of its share of the clip."""
    return [int((i + offset) * frames / count) for i in range(count)]


def _path(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Eyes ``[FRAMES, 3]`` and directions (angles, ``[FRAMES]``) of a slow pan, never more than 4 degrees a frame."""
    at = np.linspace(0, 1, FRAMES)
    sweep = rng.choice((-1, 1)) * np.radians(rng.uniform(120, 300))
    ahead = rng.uniform(0, 2 * np.pi) + sweep * at + 0.08 * np.sin(2 * np.pi * (rng.uniform(1, 2) * at + rng.random()))
    circle = 2 * np.pi * (rng.uniform(-0.7, 0.7) * at + rng.random())
    eyes = np.stack([0.3 * np.cos(circle), 0.3 * np.sin(circle), 0.95 + 0.1 * np.sin(circle + 1)], 1)
    return eyes, ahead


def _events(rng: np.random.Generator) -> list[Event]:
    count = int(rng.integers(4, 6))
    kinds, colors = rng.permutation(len(KINDS))[:count], rng.permutation(len(COLOR_NAMES))[:count]
    if rng.random() < 0.3:
        colors[rng.integers(count)] = rng.choice(colors)
    lengths = rng.integers(_SHORTEST, _LONGEST + 1, count)
    spare = FRAMES - int(lengths.sum()) - _APART * (count - 1)
    starts = np.sort(rng.integers(0, spare + 1, count)) + np.concatenate([[0], np.cumsum(lengths + _APART)[:-1]])
    return [
        Event(int(k), int(c), int(start), int(start + length))
        for k, c, start, length in zip(kinds, colors, starts, lengths, strict=True)
    ]


def random_clip(rng: np.random.Generator) -> ClipScene:
    """Draw one clip; nothing is rendered yet."""
    eyes, ahead = _path(rng)
    down = rng.uniform(0.36, 0.46)
    facing = np.stack([np.cos(ahead), np.sin(ahead)], 1)
    targets = np.concatenate([eyes[:, :2] + facing, eyes[:, 2:] - np.tan(down)], 1)
    cameras = tuple(Camera(look_at(eye, target), intrinsics()) for eye, target in zip(eyes, targets, strict=True))
    events = _events(rng)
    things = []
    for event in events:
        middle = (event.start + event.stop - 1) // 2
        side = np.array([-facing[middle, 1], facing[middle, 0]])
        place = eyes[middle, :2] + rng.uniform(1.25, 1.5) * facing[middle] + rng.uniform(-0.12, 0.12) * side
        size, yaw = float(rng.uniform(1.0, 1.2)), float(rng.uniform(0, np.pi))
        things.append(Thing(event.kind, event.color, (float(place[0]), float(place[1])), size, yaw))
    room = replace(random_surroundings(rng, blocks=(5, 10)), things=tuple(things))
    return ClipScene(room, cameras, tuple(events), int(rng.integers(2**31)))


def ask(scene: ClipScene, rng: np.random.Generator, n: int) -> tuple[Question, ...]:
    """Draw ``n`` questions about a clip, the forms in turn."""
    events = scene.events

    def color() -> Question:
        index = int(rng.integers(len(events)))
        return color_question(index, events[index].kind, events[index].color)

    def kind() -> Question | None:
        unique = unique_colors([event.color for event in events])
        if not unique:
            return None
        index = int(rng.choice(unique))
        return kind_question(index, events[index].kind, events[index].color)

    def order() -> Question:
        one, two = (int(i) for i in rng.permutation(len(events))[:2])
        prompt = f"which thing comes first {KINDS[events[one].kind]} or {KINDS[events[two].kind]}"
        return Question("order", prompt, KINDS[events[min(one, two)].kind], (one, two))

    return draw({"color": color, "kind": kind, "order": order}, rng, n)


def test_set(
    n: int, seed: int = TEST_SEED, questions_per_clip: int = QUESTIONS_PER_CLIP, first: int = 0
) -> list[ClipSample]:
    """Held-out clips with their questions, a pure function of the arguments.

    Clip ``i`` depends on ``seed`` and ``i`` alone, so a shorter set is the beginning of a longer one.

    Args:
        n: number of clips.
        seed: `TEST_SEED` for published tables, `VALIDATION_SEED` for choosing anything.
        questions_per_clip: questions asked about each clip.
        first: index of the first clip.
    """
    samples = []
    for index in range(first, first + n):
        rng = np.random.default_rng([seed, index])
        scene = random_clip(rng)
        samples.append(ClipSample(scene, ask(scene, rng, questions_per_clip)))
    return samples
