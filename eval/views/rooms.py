"""Rooms seen in twelve posed views, and questions that need all of them.

Four to six things of distinct kinds stand at three sites, one or two at each. Some sites are seen often and some
in a few views only, and some views show nothing but the room: pruning that spends its tokens on what is seen again
and again loses what is seen seldom.

* ``color``: "what is the color of the cone";
* ``kind``: "which thing in here is colored red" (a colour that one thing has);
* ``count``: "how many things in here are red", the count drawn first among those the room offers;
* ``nearest``: "which thing is nearest to the cone", asked of a thing that shares its site: every other thing is at
  least `CLEARLY` times as far away.
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

__all__ = ["PROMPT_WORDS", "TASKS", "VIEWS", "Question", "RoomSample", "RoomScene", "priors", "vocabulary"]

VIEWS = 12
TASKS = ("color", "kind", "count", "nearest")
QUESTIONS_PER_ROOM = 6
VALIDATION_SEED, TEST_SEED = 9_100_001, 9_100_002
CLEARLY = 2.0
SEEN_PIXELS, SEEN_VIEWS = 25, 2
"""Every thing covers at least so many pixels in at least so many views."""
_SITES = 3
_SHARES = {
    4: ((3, 1), (2, 1, 1), (2, 2)),
    5: ((3, 1, 1), (2, 2, 1), (3, 2)),
    6: ((3, 2, 1), (3, 1, 1, 1), (2, 2, 1, 1)),
}
"""How the things of a room share its colours, so that counts of 1, 2 and 3 are about as frequent."""
_NONE = 0.25  # share of the counts that are 0


@dataclass(frozen=True)
class RoomScene:
    """A room and its views; ``pictures[i]`` is what ``cameras[i]`` sees."""

    room: Room
    cameras: tuple[Camera, ...]
    pictures: tuple[Picture, ...]

    def seen(self) -> np.ndarray:
        """Pixels of every thing in every view: int64 ``[things, VIEWS]``."""
        count = len(self.room.things)
        return np.stack([np.bincount(p.owner.ravel() + 1, minlength=count + 1)[1:] for p in self.pictures], 1)


@dataclass(frozen=True)
class RoomSample:
    """One room with its questions."""

    scene: RoomScene
    questions: tuple[Question, ...]


def distances(things: tuple[Thing, ...]) -> np.ndarray:
    """Metres between the things' places, inf on the diagonal: float64 ``[things, things]``."""
    at = np.array([thing.place for thing in things])
    apart = np.linalg.norm(at[:, None] - at[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    return apart


def partner(things: tuple[Thing, ...], index: int) -> int | None:
    """The thing clearly nearest to another, None when the second nearest is less than `CLEARLY` times as far."""
    row = distances(things)[index]
    first, second = np.argsort(row)[:2]
    return int(first) if row[second] >= CLEARLY * row[first] else None


def _furnish(
    rng: np.random.Generator, shares: tuple[int, ...]
) -> tuple[tuple[Thing, ...], list[tuple[np.ndarray, float | None]]]:
    """Things, and the sites they stand at: each its middle and the angle of the pair's line, None for one thing.

    ``shares`` is how many things have the first colour, the second and so on.
    """
    count = sum(shares)
    kinds = rng.permutation(len(KINDS))[:count]
    palette = rng.permutation(len(COLOR_NAMES))[: len(shares)]
    colors = rng.permutation(np.repeat(palette, shares))
    paired = rng.permutation(_SITES) < count - _SITES
    turn, taken = rng.uniform(0, 2 * np.pi), 0
    things: list[Thing] = []
    sites: list[tuple[np.ndarray, float | None]] = []
    for site, pair in enumerate(paired):
        angle = turn + 2 * np.pi * site / _SITES + rng.uniform(-0.15, 0.15)
        middle = rng.uniform(1.1, 1.25) * np.array([np.cos(angle), np.sin(angle)])
        line = float(rng.uniform(0, np.pi)) if pair else None
        step = rng.uniform(0.31, 0.36) * np.array([np.cos(line), np.sin(line)]) if line is not None else np.zeros(2)
        for place in (middle - step, middle + step) if pair else (middle,):
            spot = (float(place[0]), float(place[1]))
            size, yaw = float(rng.uniform(0.9, 1.12)), float(rng.uniform(0, np.pi))
            things.append(Thing(int(kinds[taken]), int(colors[taken]), spot, size, yaw))
            taken += 1
        sites.append((middle, line))
    return tuple(things), sites


def _camera(rng: np.random.Generator, room: Room, middle: np.ndarray, line: float | None) -> Camera | None:
    """A camera that looks at a site, at a pair from its broad side; None when no free place was found."""
    for _ in range(30):
        side = (
            rng.uniform(0, 2 * np.pi) if line is None else line + rng.choice((-1, 1)) * (np.pi / 2 + rng.normal(0, 0.4))
        )
        eye = middle + rng.uniform(1.3, 1.8) * np.array([np.cos(side), np.sin(side)])
        free = min(np.linalg.norm(eye - thing.place) for thing in room.things) > 0.95
        if free and np.abs(eye).max() < room.half - 0.5:
            target = (*(middle + rng.normal(0, 0.1, 2)), rng.uniform(0.15, 0.35))
            return Camera(look_at((*eye, rng.uniform(0.7, 1.2)), target), intrinsics())
    return None


def _idle(rng: np.random.Generator, room: Room) -> Camera:
    """A camera near the middle that looks above the things, at walls and furniture."""
    eye, ahead = rng.uniform(-0.3, 0.3, 2), rng.uniform(0, 2 * np.pi)
    target = eye + 2 * np.array([np.cos(ahead), np.sin(ahead)])
    return Camera(look_at((*eye, rng.uniform(1.4, 1.7)), (*target, rng.uniform(1.4, 1.9))), intrinsics())


def _cameras(rng: np.random.Generator, room: Room, sites: list[tuple[np.ndarray, float | None]]) -> list[Camera] | None:
    """`VIEWS` cameras in random order: two at least for every site, one to three idle, the rest unevenly shared."""
    idle = int(rng.integers(1, 4))
    shares = rng.dirichlet([1.0] * len(sites))
    aims = [*range(len(sites))] * 2
    aims += [int(rng.choice(len(sites), p=shares)) for _ in range(VIEWS - idle - len(aims))]
    cameras = [_camera(rng, room, *sites[aim]) for aim in aims] + [_idle(rng, room) for _ in range(idle)]
    found = [camera for camera in cameras if camera is not None]
    return [found[i] for i in rng.permutation(VIEWS)] if len(found) == VIEWS else None


def random_rooms(rng: np.random.Generator) -> RoomScene:
    """Draw one room with its views; drawn again until every thing is well seen in `SEEN_VIEWS` views."""
    count = int(rng.choice(list(_SHARES)))
    shares = _SHARES[count][rng.integers(len(_SHARES[count]))]
    while True:
        things, sites = _furnish(rng, shares)
        apart = np.sort(distances(things), 1)
        if any(row[0] < 0.8 and row[1] < CLEARLY * row[0] for row in apart):
            continue
        room = replace(random_surroundings(rng), things=things)
        cameras = _cameras(rng, room, sites)
        if cameras is None:
            continue
        scene = RoomScene(room, tuple(cameras), tuple(render(room, camera, rng=rng) for camera in cameras))
        if ((scene.seen() >= SEEN_PIXELS).sum(1) >= SEEN_VIEWS).all():
            return scene


def ask(scene: RoomScene, rng: np.random.Generator, n: int) -> tuple[Question, ...]:
    """Draw ``n`` questions about a room, the forms in turn."""
    things = scene.room.things
    colors = [thing.color for thing in things]
    nearby = [(index, partner(things, index)) for index in range(len(things))]
    partners = {index: other for index, other in nearby if other is not None}

    def color() -> Question:
        index = int(rng.integers(len(things)))
        return color_question(index, things[index].kind, things[index].color)

    def kind() -> Question | None:
        unique = unique_colors(colors)
        if not unique:
            return None
        index = int(rng.choice(unique))
        return kind_question(index, things[index].kind, things[index].color)

    def count() -> Question:
        per_color = {tint: colors.count(tint) for tint in range(len(COLOR_NAMES))}
        wanted = 0 if rng.random() < _NONE else int(rng.choice(sorted({*per_color.values()} - {0})))
        tint = int(rng.choice([tint for tint, many in per_color.items() if many == wanted]))
        targets = tuple(index for index, other in enumerate(colors) if other == tint)
        return Question("count", f"how many things in here are {COLOR_NAMES[tint]}", str(wanted), targets)

    def nearest() -> Question | None:
        if not partners:
            return None
        index = int(rng.choice(sorted(partners)))
        other = partners[index]
        prompt = f"which thing is nearest to the {KINDS[things[index].kind]}"
        return Question("nearest", prompt, KINDS[things[other].kind], (index, other))

    return draw({"color": color, "kind": kind, "count": count, "nearest": nearest}, rng, n)


def test_set(
    n: int, seed: int = TEST_SEED, questions_per_room: int = QUESTIONS_PER_ROOM, first: int = 0
) -> list[RoomSample]:
    """Held-out rooms with their questions, a pure function of the arguments.

    Room ``i`` depends on ``seed`` and ``i`` alone, so a shorter set is the beginning of a longer one.

    Args:
        n: number of rooms.
        seed: `TEST_SEED` for published tables, `VALIDATION_SEED` for choosing anything.
        questions_per_room: questions asked about each room.
        first: index of the first room.
    """
    samples = []
    for index in range(first, first + n):
        rng = np.random.default_rng([seed, index])
        scene = random_rooms(rng)
        samples.append(RoomSample(scene, ask(scene, rng, questions_per_room)))
    return samples
