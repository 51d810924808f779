"""What the caster draws, against distances to the solids written down anew, and against other views."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlm_budget.eval.views import world
from vlm_budget.eval.views.rooms import RoomScene, random_rooms
from vlm_budget.eval.views.shapes import MEASURES, SHAPES, Ball, Box, Cone, Drum, Solid
from vlm_budget.eval.views.world import KINDS, ROOM, Camera, Room, Thing, intrinsics, look_at, points, render

EXACT = 2e-5  # metres: depth is float32, rooms are 5 m wide


@pytest.fixture(scope="module")
def scenes() -> list[RoomScene]:
    return [random_rooms(np.random.default_rng([31, index])) for index in range(4)]


def outside(solid: Solid, at: np.ndarray) -> np.ndarray:
    """Below 0 inside a solid, 0 on its surface, above 0 outside; metres nearby: ``[..., 3]`` to ``[...]``."""
    if isinstance(solid, Ball):
        return np.linalg.norm(at - (0, 0, solid.height), axis=-1) - solid.radius
    if isinstance(solid, Box):
        middle, half = np.add(solid.low, solid.high) / 2, np.subtract(solid.high, solid.low) / 2
        return (np.abs(at - middle) - half).max(-1)
    around, z = np.linalg.norm(at[..., :2], axis=-1), at[..., 2]
    if isinstance(solid, Drum):
        return np.maximum(around - solid.radius, np.maximum(solid.low - z, z - solid.high))
    assert isinstance(solid, Cone)
    slant = np.hypot(solid.height, solid.radius)
    return np.maximum((around * solid.height - (solid.height - z) * solid.radius) / slant, -z)


def outside_thing(thing: Thing, at: np.ndarray) -> np.ndarray:
    """`outside` of the nearest of a thing's solids, at points of the world."""
    cos, sin = np.cos(thing.yaw), np.sin(thing.yaw)
    x, y = at[..., 0] - thing.place[0], at[..., 1] - thing.place[1]
    own = np.stack([cos * x + sin * y, cos * y - sin * x, at[..., 2]], -1) / thing.size
    return thing.size * np.min([outside(solid, own) for solid in SHAPES[KINDS[thing.kind]]], axis=0)


def outside_room(room: Room, at: np.ndarray) -> np.ndarray:
    """`outside` of what is not free space: walls, floor, ceiling and furniture."""
    x, y, z = np.moveaxis(at, -1, 0)
    walls = np.min([room.half - np.abs(x), room.half - np.abs(y), z, room.height - z], axis=0)
    return np.min([walls, *(outside(block.box, at) for block in room.blocks)], axis=0)


def test_every_pixel_shows_a_point_on_the_surface_of_its_owner(scenes: list[RoomScene]) -> None:
    for scene in scenes:
        for camera, picture in zip(scene.cameras, scene.pictures, strict=True):
            at = points(picture, camera)
            for index, thing in enumerate(scene.room.things):
                mine = picture.owner == index
                assert np.abs(outside_thing(thing, at[mine])).max(initial=0) < EXACT
            bare = picture.owner == ROOM
            assert np.abs(outside_room(scene.room, at[bare])).max() < EXACT


def test_nothing_stands_before_what_a_pixel_shows(scenes: list[RoomScene]) -> None:
    scene = scenes[0]
    for camera, picture in zip(scene.cameras[:3], scene.pictures[:3], strict=True):
        along = np.linspace(0, 1, 300, endpoint=False)[:, None, None, None]
        at = camera.pose[:3, 3] + along * picture.depth[..., None] * world.rays(camera)
        for thing in scene.room.things:
            assert outside_thing(thing, at).min() > -EXACT
        assert outside_room(scene.room, at).min() > -EXACT


def test_another_view_sees_the_same_point_or_something_before_it(scenes: list[RoomScene]) -> None:
    rng, agreed, hidden = np.random.default_rng(5), 0, 0
    for scene in scenes:
        for one, other in rng.permutation(len(scene.cameras))[:6].reshape(3, 2):
            at = points(scene.pictures[one], scene.cameras[one]).reshape(-1, 3)
            owner, pose = scene.pictures[one].owner.ravel(), scene.cameras[other].pose
            chosen = np.concatenate([rng.choice(np.flatnonzero(owner == i), 8) for i in np.unique(owner)])
            for index in chosen:
                x, y, z = pose[:3, :3].T @ (at[index] - pose[:3, 3])
                if z < 0.1:
                    continue
                through = np.array([[1, 0, -x / z], [0, 1, -y / z], [0, 0, 1]])  # its one pixel looks at the point
                seen = render(scene.room, Camera(pose, through, size=1))
                assert seen.depth[0, 0] < z + 1e-4
                if seen.depth[0, 0] > z - 1e-4:
                    agreed += 1
                    assert seen.owner[0, 0] == owner[index]
                else:
                    hidden += 1
    assert agreed > 50
    assert hidden > 5


def test_solids_are_cast_within_their_windows_only_without_loss(
    scenes: list[RoomScene], monkeypatch: pytest.MonkeyPatch
) -> None:
    cameras = [(scene.room, camera) for scene in scenes for camera in scene.cameras]
    windowed = [render(room, camera) for room, camera in cameras]
    monkeypatch.setattr(world, "_window", lambda camera, *_: (slice(0, camera.size), slice(0, camera.size)))
    for (room, camera), want in zip(cameras, windowed, strict=True):
        whole = render(room, camera)
        assert np.array_equal(whole.owner, want.owner)
        assert np.array_equal(whole.depth, want.depth)
        assert np.array_equal(whole.pixels, want.pixels)


def test_the_same_scene_renders_the_same_and_noise_touches_colour_only(scenes: list[RoomScene]) -> None:
    room, camera = scenes[0].room, scenes[0].cameras[0]
    clean, again = render(room, camera), render(room, camera)
    assert np.array_equal(clean.pixels, again.pixels)
    noisy = render(room, camera, rng=np.random.default_rng(0))
    assert np.array_equal(noisy.depth, clean.depth)
    assert np.array_equal(noisy.owner, clean.owner)
    off = noisy.pixels.astype(float) - clean.pixels
    assert 2 < off.std() < 6
    assert clean.pixels.dtype == np.uint8
    assert clean.depth.dtype == np.float32
    assert clean.owner.dtype == np.int16


def test_things_that_are_not_shown_are_not_there(scenes: list[RoomScene]) -> None:
    scene = scenes[0]
    for camera in scene.cameras:
        one = render(scene.room, camera, shown=[2])
        assert set(np.unique(one.owner)) <= {ROOM, 2}
        alone = render(replace(scene.room, things=(scene.room.things[2],)), camera)
        assert np.array_equal(one.pixels, alone.pixels)


def test_the_field_of_view_reaches_from_edge_to_edge_and_pixel_centres_are_integers() -> None:
    k, size = intrinsics(48, 65.0), 48
    for edge, angle in ((-0.5, -32.5), (size - 0.5, 32.5)):
        assert np.degrees(np.arctan((edge - k[0, 2]) / k[0, 0])) == pytest.approx(angle)
    camera = Camera(np.eye(4), k)
    assert world.rays(camera)[7, 40] == pytest.approx([(40 - k[0, 2]) / k[0, 0], (7 - k[1, 2]) / k[1, 1], 1])


def test_a_camera_looks_at_its_target_upright() -> None:
    pose = look_at((1.0, -0.5, 1.2), (-0.3, 0.4, 0.2))
    assert pose[:3, :3] @ pose[:3, :3].T == pytest.approx(np.eye(3))
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)
    x, y, z = pose[:3, :3].T @ (np.array([-0.3, 0.4, 0.2]) - pose[:3, 3])
    assert (x, y) == pytest.approx((0, 0))
    assert z > 0
    assert pose[2, 0] == pytest.approx(0)  # right is level
    assert pose[2, 1] < 0  # y of the picture points down


def extent(solid: Solid) -> tuple[float, float]:
    """Height and radius about the upright axis."""
    if isinstance(solid, Ball):
        return solid.height + solid.radius, solid.radius
    if isinstance(solid, Box):
        corner = np.maximum(np.abs(solid.low), np.abs(solid.high))
        return solid.high[2], float(np.hypot(*corner[:2]))
    return (solid.height if isinstance(solid, Cone) else solid.high), solid.radius


@pytest.mark.parametrize("kind", KINDS)
def test_measures_bound_the_solids_closely(kind: str) -> None:
    height, radius = np.max([extent(solid) for solid in SHAPES[kind]], axis=0)
    assert MEASURES[kind] == (pytest.approx(height), pytest.approx(radius, abs=1e-3))
    assert MEASURES[kind][1] >= radius


def test_outlines_tell_the_kinds_apart_from_every_side() -> None:
    empty = replace(random_rooms(np.random.default_rng(0)).room, things=(), blocks=())
    outlines: dict[int, list[np.ndarray]] = {}
    for kind in range(len(KINDS)):
        for yaw in np.linspace(0, np.pi / 2, 5):
            thing = Thing(kind, 0, (0.0, 0.0), yaw=float(yaw))
            camera = Camera(look_at((1.5, 0.0, 1.0), (0.0, 0.0, 0.25)), intrinsics())
            outlines.setdefault(kind, []).append(render(replace(empty, things=(thing,)), camera).owner == 0)

    def likeness(one: np.ndarray, other: np.ndarray) -> float:
        return float((one & other).sum() / (one | other).sum())

    for kind, mine in outlines.items():
        own = min(likeness(mine[0], one) for one in mine)
        foreign = max(likeness(mine[0], one) for other in outlines if other != kind for one in outlines[other])
        assert own > foreign, KINDS[kind]
