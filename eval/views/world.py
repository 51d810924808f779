"""A furnished room of coloured things, rendered exactly: colour, depth and owner of every pixel by ray casting.

The world's axes are metres, z up, the floor at z = 0. Cameras follow OpenCV: x right, y down, z forward, pixel
centres at integer coordinates. Depth is z-depth (along the optical axis, not along the ray), exact to rounding
wherever the picture shows anything, which is everywhere: a room has walls and a ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm_budget.eval.views.shapes import MEASURES, SHAPES, Box, Solid

SIZE = 48
KINDS = tuple(SHAPES)
COLORS = {
    "red": (225, 30, 40),
    "orange": (250, 135, 20),
    "yellow": (240, 225, 45),
    "green": (35, 185, 60),
    "cyan": (50, 220, 230),
    "blue": (45, 75, 240),
    "pink": (235, 70, 215),
}
COLOR_NAMES = tuple(COLORS)
ROOM = -1
_RGB = np.array(list(COLORS.values()), np.float32)
_TEXELS = 64
_AMBIENT = 0.62


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: ``pose`` camera to world ``[4, 4]``, ``intrinsics`` ``[3, 3]`` in pixels, ``size`` a side."""

    pose: np.ndarray
    intrinsics: np.ndarray
    size: int = SIZE


@dataclass(frozen=True)
class Thing:
    """One coloured thing on the floor.

    ``kind`` and ``color`` are indices into `KINDS` and `COLOR_NAMES`, ``place`` is x, y in metres, ``size`` a factor
    on the kind's own measures, ``yaw`` a turn about the upright axis in radians.
    """

    kind: int
    color: int
    place: tuple[float, float]
    size: float = 1.0
    yaw: float = 0.0

    @property
    def height(self) -> float:
        """Metres."""
        return MEASURES[KINDS[self.kind]][0] * self.size

    @property
    def radius(self) -> float:
        """Metres about the upright axis."""
        return MEASURES[KINDS[self.kind]][1] * self.size

    @property
    def middle(self) -> np.ndarray:
        """Its middle in the world: ``[3]``."""
        return np.array([*self.place, self.height / 2])


@dataclass(frozen=True)
class Block:
    """Dull furniture, part of the room: a box and its grey ``tint``."""

    box: Box
    tint: tuple[float, float, float]


@dataclass(frozen=True)
class Room:
    """A room of ``2 half`` x ``2 half`` x ``height`` metres about the origin.

    Attributes:
        things: what questions are about.
        tints: float32 ``[6, 3]``, colour of the walls (-x, +x, -y, +y), the floor and the ceiling.
        texture: float32 ``[6, N, N]`` brightness added to them, fixed to the surface, so that views agree.
        light: unit vector towards the light.
        blocks: furniture.
    """

    things: tuple[Thing, ...]
    tints: np.ndarray
    texture: np.ndarray
    light: np.ndarray
    blocks: tuple[Block, ...] = ()
    half: float = 2.4
    height: float = 2.6


@dataclass(frozen=True)
class Picture:
    """One rendered view.

    Attributes:
        pixels: uint8 ``[S, S, 3]``.
        depth: z-depth in metres, float32 ``[S, S]``.
        owner: int16 ``[S, S]``: the thing's index in the room, `ROOM` for walls, floor and furniture.
    """

    pixels: np.ndarray
    depth: np.ndarray
    owner: np.ndarray = field(repr=False)


def intrinsics(size: int = SIZE, fov: float = 65.0) -> np.ndarray:
    """Square pinhole intrinsics for a field of view in degrees, edge to edge: float64 ``[3, 3]``."""
    focal, centre = size / 2 / np.tan(np.radians(fov) / 2), (size - 1) / 2
    return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]])


def look_at(eye: Sequence[float], target: Sequence[float]) -> np.ndarray:
    """Pose of a level camera at ``eye`` looking at ``target``: float64 ``[4, 4]``, camera to world."""
    forward = np.asarray(target, float) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0, 0, 1.0))
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(forward, right), forward, np.asarray(eye, float)], 1)
    return pose


def rays(camera: Camera) -> np.ndarray:
    """World directions of all pixels, one metre of z-depth long: float64 ``[S, S, 3]``."""
    v, u = np.mgrid[: camera.size, : camera.size].astype(float)
    k = camera.intrinsics
    y = (v - k[1, 2]) / k[1, 1]
    x = (u - k[0, 2] - k[0, 1] * y) / k[0, 0]
    return np.stack([x, y, np.ones_like(x)], -1) @ camera.pose[:3, :3].T


def points(picture: Picture, camera: Camera) -> np.ndarray:
    """World coordinates of what every pixel shows: float64 ``[S, S, 3]``."""
    return camera.pose[:3, 3] + picture.depth[..., None] * rays(camera)


def random_surroundings(rng: np.random.Generator, half: float = 2.4, blocks: tuple[int, int] = (3, 7)) -> Room:
    """An empty room: uneven walls of a dull tint, and grey furniture along them."""
    tints = rng.uniform(70, 150) + rng.normal(0, 7, 3) + rng.normal(0, 12, (6, 1))
    knots = rng.normal(0, 1, (6, 8, 8)).repeat(_TEXELS // 8, 1).repeat(_TEXELS // 8, 2)
    texture = knots * rng.uniform(2, 8) + rng.normal(0, 1, (6, _TEXELS, _TEXELS)) * rng.uniform(2, 5)
    azimuth, slant = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.7)
    light = np.array([slant * np.cos(azimuth), slant * np.sin(azimuth), np.sqrt(1 - slant**2)])
    furniture = []
    for _ in range(rng.integers(*blocks)):
        wide, deep, tall = rng.uniform(0.3, 0.9), rng.uniform(0.15, 0.4), rng.uniform(0.3, 1.8)
        side, along = rng.integers(4), rng.uniform(-half + wide, half - wide)
        low, high = np.array([along - wide / 2, half - deep]), np.array([along + wide / 2, half])
        if side % 2:
            low, high = -high, -low
        if side // 2:
            low, high = low[::-1], high[::-1]
        grey = rng.uniform(45, 165) + rng.normal(0, 5, 3)
        furniture.append(Block(Box((*low.tolist(), 0.0), (*high.tolist(), tall)), tuple(grey.tolist())))
    return Room((), tints.astype(np.float32), texture.astype(np.float32), light, tuple(furniture), half)


def _walls(room: Room, origin: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth and colour of the bare room along ``view`` ``[n, 3]``."""
    high = np.array([room.half, room.half, room.height])
    low = np.array([-room.half, -room.half, 0.0])
    ahead = view > 0
    t = (np.where(ahead, high, low) - origin) / np.where(view == 0, 1e-12, view)
    axis, t = t.argmin(1), t.min(1)
    rows = np.arange(len(view))
    face = 2 * axis + ahead[rows, axis]
    at = ((origin + t[:, None] * view - low) / (high - low) * _TEXELS).astype(np.int64).clip(0, _TEXELS - 1)
    first, second = np.where(axis == 0, at[:, 1], at[:, 0]), np.where(axis == 2, at[:, 1], at[:, 2])
    return t, room.tints[face] + room.texture[face, first, second][:, None]


def _window(camera: Camera, to_camera: np.ndarray, middle: np.ndarray, radius: float) -> tuple[slice, slice] | None:
    """Rows and columns that may show a ball about ``middle``; None when none can."""
    x, y, z = to_camera[:3, :3] @ middle + to_camera[:3, 3]
    if z + radius <= 0:
        return None
    near, far, size, k = z - radius, z + radius, camera.size, camera.intrinsics
    if near < 0.05:
        return slice(0, size), slice(0, size)
    spans = []
    for value, focal, centre in ((y, k[1, 1], k[1, 2]), (x, k[0, 0], k[0, 2])):
        low, high = value - radius, value + radius
        first = int(np.floor(centre + focal * min(low / near, low / far)))
        last = int(np.ceil(centre + focal * max(high / near, high / far)))
        if last < 0 or first >= size:
            return None
        spans.append(slice(max(first, 0), min(last + 1, size)))
    return spans[0], spans[1]


def _cast(solids: Sequence[Solid], origin: np.ndarray, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First hit among several solids: parameter ``[n]`` and normal ``[n, 3]``."""
    t, normal = solids[0].cast(origin, view)
    for solid in solids[1:]:
        again, other = solid.cast(origin, view)
        nearer = again < t
        t, normal = np.where(nearer, again, t), np.where(nearer[:, None], other, normal)
    return t, normal


class _Canvas:
    """Depth, colour and owner of one picture while solids are drawn into it."""

    def __init__(self, room: Room, camera: Camera) -> None:
        self.room, self.camera, self.size = room, camera, camera.size
        self.origin, self.view = camera.pose[:3, 3], rays(camera)
        self.to_camera = np.eye(4)
        self.to_camera[:3, :3] = camera.pose[:3, :3].T
        self.to_camera[:3, 3] = -camera.pose[:3, :3].T @ self.origin
        depth, color = _walls(room, self.origin, self.view.reshape(-1, 3))
        self.depth, self.color = depth.reshape(self.size, self.size), color.reshape(self.size, self.size, 3)
        self.owner = np.full((self.size, self.size), ROOM, np.int16)

    def draw(self, solids: Sequence[Solid], thing: Thing | Block, owner: int) -> None:
        if isinstance(thing, Thing):
            middle, radius = thing.middle, float(np.hypot(thing.height / 2, thing.radius))
            yaw, scale, base = thing.yaw, thing.size, np.array([*thing.place, 0.0])
            rgb = _RGB[thing.color]
        else:
            low, high = np.array(thing.box.low), np.array(thing.box.high)
            middle, radius = (low + high) / 2, float(np.linalg.norm(high - low)) / 2
            yaw, scale, base = 0.0, 1.0, np.zeros(3)
            rgb = np.array(thing.tint, np.float32)
        window = _window(self.camera, self.to_camera, middle, radius)
        if window is None:
            return
        view = self.view[window]
        turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        flat = view.reshape(-1, 3)
        t, normal = _cast(solids, (self.origin - base) @ turn / scale, flat @ turn / scale)
        shade = _AMBIENT + (1 - _AMBIENT) * np.maximum(normal @ (self.room.light @ turn), 0)
        t = t.reshape(view.shape[:2])
        nearer = t < self.depth[window]
        self.depth[window][nearer] = t[nearer]
        self.owner[window][nearer] = owner
        self.color[window][nearer] = (shade.reshape(t.shape)[nearer, None] * rgb).astype(np.float32)


def render(
    room: Room, camera: Camera, shown: Sequence[int] | None = None, rng: np.random.Generator | None = None
) -> Picture:
    """What a camera inside the room sees.

    Args:
        room: the room.
        camera: a camera inside it and outside every solid.
        shown: indices of the things that are there; all by default.
        rng: source of the sensor's noise (4 grey levels); none without.
    """
    canvas = _Canvas(room, camera)
    for block in room.blocks:
        canvas.draw((block.box,), block, ROOM)
    for index in range(len(room.things)) if shown is None else shown:
        thing = room.things[index]
        canvas.draw(SHAPES[KINDS[thing.kind]], thing, index)
    color = canvas.color
    if rng is not None:
        color = color + rng.normal(0, 4, (camera.size, camera.size, 1)).astype(np.float32)
    return Picture(np.clip(color, 0, 255).astype(np.uint8), canvas.depth.astype(np.float32), canvas.owner)
