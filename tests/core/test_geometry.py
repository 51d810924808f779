"""Where tokens lie in the world: against loops over pixels, and back through the camera."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget.errors import GeometryError
from vlm_budget.geometry import STRETCH, Fit, check_views, fitted_intrinsics, token_coordinates, views_of
from vlm_budget.layout import Partition, VisualItem

FITS = [
    STRETCH,
    Fit(covered=27 * 14 / 384),
    Fit("pad"),
    Fit("pad", covered=0.9),
    Fit("crop", side=12),
    Fit("crop", side=7, covered=0.8),
]
NAMES = [f"{fit.kind}, {fit.covered:.2f} covered" for fit in FITS]


def camera(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A pose and intrinsics with a skew."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = turn * torch.linalg.det(turn)  # of odd dimension: that makes it a rotation
    pose[:3, 3] = 3 * torch.randn(3, generator=generator, dtype=torch.float64)
    return pose, torch.tensor([[9.0, 0.3, 4.2], [0, 11.0, 6.7], [0, 0, 1]])


def depth_map(height: int, width: int, holes: float = 0.3, seed: int = 1) -> torch.Tensor:
    """[H, W] metres, a share of them in every way that depth is not known."""
    generator = torch.Generator().manual_seed(seed)
    depth = 1 + 4 * torch.rand(height, width, generator=generator)
    bad = torch.tensor([0.0, -1.0, math.nan, math.inf])[torch.randint(4, (height, width), generator=generator)]
    return torch.where(torch.rand(height, width, generator=generator) < holes, bad, depth)


def cells_of(item: VisualItem, fit: Fit, size: tuple[int, int]) -> list[tuple[float, float, float, float] | None]:
    """Per token its cell, left, top, right and bottom in pixels from the picture's corner; None for separators."""
    height, width = size
    if fit.kind == "stretch":
        x0, y0, across, down = 0.0, 0.0, float(width), float(height)
    elif fit.kind == "pad":
        across = down = float(max(size))
        x0, y0 = -math.floor((across - width) / 2), -math.floor((down - height) / 2)
    else:
        new_h, new_w = (fit.side, int(fit.side * width / height))
        if height > width:
            new_h, new_w = int(fit.side * height / width), fit.side
        across, down = fit.side * width / new_w, fit.side * height / new_h
        x0, y0 = (new_w - fit.side) // 2 * width / new_w, (new_h - fit.side) // 2 * height / new_h
    found: list[tuple[float, float, float, float] | None] = []
    for partition, patch in zip(item.partition.tolist(), item.patch.tolist(), strict=True):
        if partition < 0:
            found.append(None)
            continue
        grid = item.partitions[partition]
        row, col = divmod(patch, grid.cols)
        left, top, right, bottom = grid.box
        wide, high = (right - left) * fit.covered / grid.cols, (bottom - top) * fit.covered / grid.rows
        x, y = left + col * wide, top + row * high
        found.append((x0 + x * across, y0 + y * down, x0 + (x + wide) * across, y0 + (y + high) * down))
    return found


def slowly(
    item: VisualItem, depth: torch.Tensor, pose: torch.Tensor, matrix: torch.Tensor, fit: Fit
) -> list[list[float]]:
    """Means over pixels, one by one."""
    height, width = depth.shape
    inverse = torch.linalg.inv(matrix.double()).numpy()
    found = []
    for cell in cells_of(item, fit, (height, width)):
        total, weight = np.zeros(3), 0.0
        left, top, right, bottom = cell or (0, 0, 0, 0)
        for v in range(height):
            for u in range(width):
                share = max(0.0, min(right, u + 1) - max(left, u)) * max(0.0, min(bottom, v + 1) - max(top, v))
                z = float(depth[v, u])
                if share and math.isfinite(z) and z > 0:
                    point = pose.numpy() @ np.append(inverse @ [u * z, v * z, z], 1)
                    total, weight = total + share * point[:3], weight + share
        enough = cell is not None and weight >= 0.1 * (right - left) * (bottom - top)
        found.append((total / weight).tolist() if enough else [math.nan] * 3)
    return found


def close(found: torch.Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize("fit", FITS, ids=NAMES)
@pytest.mark.parametrize("size", [(11, 7), (7, 12), (9, 9), (1, 1)], ids=str)
def test_a_token_lies_at_the_mean_of_the_points_its_pixels_show(size: tuple[int, int], fit: Fit) -> None:
    pose, matrix = camera()
    depth = depth_map(*size)
    for item in (make.single(3, 4, newline=True), make.anyres(2, 3, side=3, pad=(2, 0)), make.single(1)):
        found = token_coordinates(item, depth, pose, matrix, fit)
        assert found.shape == (item.size, 3) and found.dtype == torch.float32 and found.device.type == "cpu"
        close(found, slowly(item, depth, pose, matrix, fit))


@pytest.mark.filterwarnings("ignore:.*known nowhere")
def test_the_mean_is_of_the_known_tenth_or_of_nothing() -> None:
    item, pose, matrix = make.single(1), *camera()
    for known in range(21):
        depth = torch.zeros(4, 5)
        depth.view(-1)[:known] = 2.0
        assert token_coordinates(item, depth, pose, matrix).isnan().all() == (known < 2), "of 20 pixels"


def test_separators_lie_nowhere() -> None:
    item = make.anyres(1, 2, side=3)
    found = token_coordinates(item, torch.ones(6, 12), *camera())
    assert torch.equal(found.isnan().all(1), item.partition < 0)
    assert torch.equal(found.isnan().any(1), item.partition < 0)


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(FITS), st.integers(0, 9))
@pytest.mark.filterwarnings("ignore:.*known nowhere")
def test_points_projected_back_land_on_their_token(height: int, width: int, fit: Fit, seed: int) -> None:
    """Whatever the depth: what a cell shows lies in the pyramid behind it, and so does the mean."""
    item, (pose, matrix) = make.single(4, 3), camera(seed)
    found = token_coordinates(item, depth_map(height, width, 0.2, seed), pose, matrix, fit).double()
    local = (found - pose[:3, 3]) @ pose[:3, :3]
    pixels = local @ matrix.double().T
    pixels = pixels[:, :2] / pixels[:, 2:]
    for (u, v), cell in zip(pixels.tolist(), cells_of(item, fit, (height, width)), strict=True):
        assert cell is not None
        if math.isnan(u):
            continue
        # Half a pixel around, for the centre of a pixel that a cell has a part of may lie outside.
        assert cell[0] - 1 - 1e-3 <= u <= cell[2] + 1e-3 and cell[1] - 1 - 1e-3 <= v <= cell[3] + 1e-3


def test_two_cameras_agree_on_a_wall() -> None:
    """A wall at z = 5 seen from two places; each camera's depth is worked out by itself."""
    matrix = torch.tensor([[40.0, 0, 31.5], [0, 40.0, 23.5], [0, 0, 1]], dtype=torch.float64)
    item = make.single(6, 8)
    for angle in (0.0, 0.4, -0.7):
        pose = torch.eye(4, dtype=torch.float64)
        pose[0, 0] = pose[2, 2] = math.cos(angle)
        pose[0, 2], pose[2, 0] = math.sin(angle), -math.sin(angle)
        pose[:3, 3] = torch.tensor([angle, -2 * angle, angle])
        v, u = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
        rays = torch.stack([u, v, torch.ones_like(u)], -1).double() @ torch.linalg.inv(matrix).T
        along = rays @ pose[2, :3]
        depth = torch.where(along > 0, (5 - pose[2, 3]) / along, torch.inf)
        found = token_coordinates(item, depth, pose, matrix)
        torch.testing.assert_close(found[:, 2], torch.full((48,), 5.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fit", FITS, ids=NAMES)
def test_intrinsics_carried_forward_say_the_same(fit: Fit) -> None:
    """A point of the scene, through the picture's camera and the processor, and through the frame's camera."""
    size, to = (30, 44), (12, 12) if fit.kind == "crop" else (20, 32)
    _, matrix = camera()
    left, top, right, bottom = fit.frame(size)
    points = torch.randn(50, 3, dtype=torch.float64).abs() + torch.tensor([0, 0, 1])
    one = points @ matrix.double().T
    u, v = one[:, 0] / one[:, 2] + 0.5, one[:, 1] / one[:, 2] + 0.5  # from the corner
    expected = torch.stack([(u - left) / (right - left) * to[1], (v - top) / (bottom - top) * to[0]], 1) - 0.5
    other = points @ fitted_intrinsics(matrix, fit, size, to).T
    torch.testing.assert_close(other[:, :2] / other[:, 2:], expected)


def test_tokens_of_the_frame_and_of_the_picture_lie_in_the_same_places() -> None:
    """The other way round: the picture padded and doubled first, and then its own intrinsics."""
    item, (pose, matrix), fit = make.single(4), camera(), Fit("pad")
    depth = depth_map(8, 6, holes=0.0)
    expected = token_coordinates(item, depth, pose, matrix, fit)
    frame = torch.nn.functional.pad(depth, (1, 1, 0, 0)).repeat_interleave(2, 0).repeat_interleave(2, 1)
    there = fitted_intrinsics(matrix, fit, (8, 6), (16, 16))
    # A pixel that was doubled has two centres, each half a pixel of the frame off.
    close(token_coordinates(item, frame, pose, there), expected)


def test_depth_may_be_of_another_size_than_the_picture_of_the_intrinsics() -> None:
    item, (pose, matrix) = make.single(3, 4), camera()
    depth = torch.full((12, 16), 2.5)
    whole = token_coordinates(item, depth, pose, matrix)
    for factor in (2, 3):
        larger = depth.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        close(token_coordinates(item, larger, pose, matrix, size=(12, 16)), whole)
    close(token_coordinates(item, depth[::2, ::2], pose, matrix, size=(12, 16)), whole)
    assert not torch.allclose(token_coordinates(item, depth[::2, ::2], pose, matrix), whole)


def test_lists_arrays_and_tensors_are_one() -> None:
    items = [make.single(2), make.single(3, 4, newline=True)]
    depth = [depth_map(4, 4), depth_map(6, 8)]
    pose, matrix = torch.stack([camera(1)[0], camera(2)[0]]), camera()[1]
    fits = [STRETCH, Fit("pad")]
    found = views_of(items, fits, depth, pose, matrix)
    alone = [token_coordinates(*each, matrix, fit) for *each, fit in zip(items, depth, pose, fits, strict=True)]
    for one in (
        views_of(items, fits, [plane.numpy() for plane in depth], pose.numpy(), [matrix.numpy()] * 2),
        views_of(items, fits, [plane.double() for plane in depth], list(pose), matrix.tolist()),
        alone,
    ):
        for mine, theirs in zip(one, found, strict=True):
            assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    assert check_views(depth, pose, matrix) == 2
    same = views_of(items[:1] * 2, [STRETCH] * 2, torch.stack([depth[0]] * 2), pose, matrix)
    assert torch.equal(same[0].nan_to_num(), found[0].nan_to_num())


def test_the_fit_of_a_processor_set_otherwise_can_be_said() -> None:
    item, (pose, matrix), depth = make.single(4), camera(), depth_map(6, 9, holes=0)
    (said,) = views_of([item], [Fit("crop", side=8)], [depth], pose[None], matrix, fit="pad")
    close(said, token_coordinates(item, depth, pose, matrix, Fit("pad")), 0)


def test_coordinates_can_be_given() -> None:
    item = make.anyres(1, 2, side=3)
    table = torch.randn(item.size, 3)
    table[item.candidates[2], 1] = math.inf
    with_all, without = (views_of([item], [STRETCH], token_xyz=[t])[0] for t in (table, table[item.candidates]))
    assert torch.equal(with_all.nan_to_num(9.0), without.nan_to_num(9.0))
    assert with_all[item.separators].isnan().all() and with_all[item.candidates[2]].isnan().all()
    rest = torch.cat([item.candidates[:2], item.candidates[3:]])
    assert torch.equal(with_all[rest], table[rest])
    assert check_views(token_xyz=torch.zeros(3, 5, 3)) == 3


@pytest.mark.parametrize("unknown", [0.0, -1.0, math.nan, math.inf])
def test_of_depth_that_is_known_nowhere_there_is_a_warning(unknown: float) -> None:
    depth, pose = torch.ones(3, 4, 4), torch.eye(4).expand(3, 4, 4)
    depth[1] = unknown
    with pytest.warns(UserWarning, match=r"depth of pictures \[1\] is known nowhere"):
        check_views(depth, pose, torch.eye(3))


def test_a_pose_that_is_not_finite_is_no_geometry_and_there_is_a_warning() -> None:
    item, (pose, matrix), depth = make.single(2), camera(), torch.ones(3, 4, 4)
    poses = torch.stack([pose, torch.full((4, 4), -math.inf), pose.masked_fill(torch.eye(4) > 0, math.nan)])
    with pytest.warns(UserWarning, match=r"poses of pictures \[1, 2\] are not finite"):
        assert check_views(depth, poses, matrix) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = views_of([item] * 3, [STRETCH] * 3, depth, poses, matrix)
    assert [bool(one.isnan().all()) for one in found] == [False, True, True]
    with pytest.warns(UserWarning, match="not finite"):
        assert token_coordinates(item, depth[0], poses[1], matrix).isnan().all()


def test_millimetres_are_noticed() -> None:
    pose, matrix = camera()
    with pytest.warns(UserWarning, match="divide by 1000"):
        check_views(torch.full((1, 4, 4), 2500.0), pose[None], matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_views(torch.tensor([[[0.0, 9000.0], [3.0, 2.0]]]), pose[None], matrix)
    with pytest.raises(GeometryError, match="whole numbers are no metres.*divide by 1000"):
        check_views(torch.full((1, 4, 4), 2500, dtype=torch.int32), pose[None], matrix)


POSE, MATRIX = camera()
GOOD: dict[str, Any] = {"depth": torch.ones(2, 6, 8), "pose": torch.stack([POSE, POSE]), "intrinsics": MATRIX}


def changed(tensor: torch.Tensor, *place: Any, to: float) -> torch.Tensor:
    copy = tensor.clone()
    copy[place] = to
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": None}, "need depth, pose and intrinsics.*depth missing"),
        ({"pose": None, "intrinsics": None}, "pose and intrinsics missing"),
        ({"depth": torch.ones(6, 8)}, r"\[V, H, W\].*got shape \[6, 8\]"),
        ({"depth": [torch.ones(6, 8), torch.ones(6, 8, 1)]}, r"got \[6, 8, 1\] for picture 1"),
        ({"depth": torch.ones(3, 6, 8)}, "3 depth maps and 2 poses"),
        ({"depth": []}, "depth holds no view"),
        ({"depth": torch.ones(2, 0, 8)}, r"got \[0, 8\] for picture 0"),
        ({"depth": "depth.png"}, "depth must be numbers"),
        ({"pose": POSE}, r"\[V, 4, 4\].*got shape \[4, 4\]"),
        ({"pose": GOOD["pose"][:, :3]}, r"got shape \[2, 3, 4\]"),
        ({"pose": [POSE, POSE[:3]]}, "one shape for all pictures"),
        ({"pose": changed(GOOD["pose"], 1, 0, 0, to=2.0)}, "picture 1 is not rigid: its rotation is not orthonormal"),
        ({"pose": 1.002 * GOOD["pose"]}, "picture 0 is not rigid: its last row"),
        ({"pose": GOOD["pose"].mT}, "picture 0 is not rigid: its last row"),
        ({"pose": GOOD["pose"] * torch.tensor([-1.0, 1, 1, 1])}, "picture 0 is not rigid: it mirrors"),
        ({"intrinsics": torch.zeros(3, 3)}, "singular"),
        ({"intrinsics": changed(MATRIX, 0, 0, to=0.0)}, "singular"),
        ({"intrinsics": changed(MATRIX, 1, 1, to=1e-9)}, "singular"),
        ({"intrinsics": changed(MATRIX, 0, 2, to=math.nan)}, "singular or no camera's"),
        ({"intrinsics": MATRIX.T}, "singular or no camera's"),
        ({"intrinsics": torch.eye(4)}, r"pass \[:3, :3\]"),
        ({"intrinsics": MATRIX.expand(3, 3, 3)}, "2 depth maps and 3 intrinsics"),
        ({"intrinsics": [1.0, 2.0]}, r"got shape \[2\]"),
        ({"size": (6, 12)}, "another aspect ratio"),
        ({"size": (6.0, 8.0)}, "size must be"),
        ({"size": 6}, "size must be"),
        ({"fit": "squeeze"}, "'squeeze'"),
        ({"token_xyz": torch.ones(2, 4, 3)}, "not both"),
    ],
)
def test_what_is_no_geometry_is_refused(change: dict[str, Any], message: str) -> None:
    assert check_views(**GOOD) == 2
    with pytest.raises(GeometryError, match=message):
        check_views(**GOOD | change)
    if not change.keys() & {"fit", "token_xyz"}:
        with pytest.raises(GeometryError):
            views_of([make.single(2)] * 2, [STRETCH] * 2, **GOOD | change)


def test_a_little_rounding_is_no_fault() -> None:
    check_views(**GOOD | {"pose": GOOD["pose"].float() + 1e-5})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.ones(4, 3), r"\[V, N, 3\].*got shape \[4, 3\]"),
        ([torch.ones(4, 2)], r"got \[4, 2\] for 0"),
        ([torch.ones(5, 3)], "5 tokens for a picture of 4"),
        ([torch.ones(4, 3)] * 2, "2 views and 1 pictures"),
        ([], "no picture"),
    ],
)
def test_coordinates_that_are_not_the_pictures_are_refused(table: Any, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        views_of([make.single(2)], [STRETCH], token_xyz=table)


def test_other_pictures_than_views_are_refused() -> None:
    for count in (1, 3):
        with pytest.raises(GeometryError, match=f"2 views and {count} pictures"):
            views_of([make.single(2)] * count, [STRETCH] * count, **GOOD)


def test_depth_of_another_shape_than_the_picture_is_refused() -> None:
    pose, matrix = camera()
    known = replace(make.single(2), picture=(60, 80))
    for shape in ((60, 80), (30, 40), (119, 160)):
        token_coordinates(known, torch.ones(shape), pose, matrix)
    for shape in ((80, 60), (60, 60), (60, 84)):
        with pytest.raises(GeometryError, match=f"depth of {shape[0]} x {shape[1]}.*picture of 60 x 80"):
            token_coordinates(known, torch.ones(shape), pose, matrix)
    native = Fit(native=True)
    token_coordinates(make.single(6, 8), torch.ones(60, 84), pose, matrix, native)
    with pytest.raises(GeometryError, match="6 x 8 tokens"):
        token_coordinates(make.single(6, 8), torch.ones(80, 60), pose, matrix, native)


def test_frames_of_a_video_have_no_views() -> None:
    with pytest.raises(GeometryError, match="frames of a video"):
        token_coordinates(make.frames(1, 2, 2), torch.ones(4, 4), *camera())


def test_a_crop_knows_its_side() -> None:
    with pytest.raises(GeometryError, match="side of the frame"):
        Fit("crop")


def test_a_grid_may_lie_anywhere_in_the_frame() -> None:
    """A box outside shows nothing; one that reaches over the edge shows what is there."""
    pose, matrix = torch.eye(4), torch.eye(3)
    beside, over = (
        make.tokens_item([Partition("crop", 1, 1, (left, 0.0, left + 1, 1.0))], [(0, 0, -1)]) for left in (1.0, 0.5)
    )
    assert token_coordinates(beside, torch.ones(4, 8), pose, matrix).isnan().all()
    close(token_coordinates(over, torch.ones(4, 8), pose, matrix), [[5.5, 1.5, 1.0]])
