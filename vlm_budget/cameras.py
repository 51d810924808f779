"""Depth maps, camera poses and intrinsics as users have them, checked.

Arrays of numpy, tensors on any device and lists of either are taken; what cannot be geometry of any pictures is refused
before the model runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from .errors import GeometryError

Size: TypeAlias = tuple[int, int]

_ASPECT = 0.01  # ScanNet's depth (640 x 480) and colour (1296 x 968) differ by 0.4 %
_RIGID = 1e-3
_FAR = 100.0  # metres; the median depth of a room in millimetres is above


def same_aspect(one: Size, other: Size) -> bool:
    """Two heights and widths have the same aspect ratio, but for a hundredth or a pixel."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= _ASPECT * one[1] * other[0] + max(*one, *other)


def camera_views(
    depth: Any, pose: Any, intrinsics: Any, size: Size | None
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """V depth maps, [V, 4, 4] poses and [V, 3, 3] intrinsics, as :func:`vlm_budget.geometry.check_views` takes them.

    Raises:
        GeometryError: They cannot be those of V pictures.
    """
    missing = [name for name, given in (("depth", depth), ("pose", pose), ("intrinsics", intrinsics)) if given is None]
    if missing:
        raise GeometryError(
            f"views need depth, pose and intrinsics (or token_xyz alone); {' and '.join(missing)} missing"
        )
    planes = _planes(depth, size)
    return planes, _poses(pose, len(planes)), intrinsics_of(intrinsics, len(planes))


def _planes(depth: Any, size: Size | None) -> list[torch.Tensor]:
    numbers = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    if size is not None and not numbers:
        raise GeometryError(f"size must be the height and width of the pictures, got {size!r}")
    rows = list(depth) if isinstance(depth, Sequence) else _tensor("depth", depth)
    if isinstance(rows, torch.Tensor) and rows.ndim != 3:
        raise GeometryError(f"depth must be [V, H, W], one map per picture, got shape {list(rows.shape)}")
    planes = [_tensor("depth", row) for row in rows]
    for view, plane in enumerate(planes):
        if plane.ndim != 2 or not plane.numel():
            raise GeometryError(f"depth must be [H, W] for every picture, got {list(plane.shape)} for picture {view}")
        if not plane.dtype.is_floating_point:
            raise GeometryError(
                f"depth of picture {view} is {plane.dtype}: whole numbers are no metres. Files of 16 bits hold "
                "millimetres as a rule; divide by 1000."
            )
        if size is not None and not same_aspect((plane.shape[0], plane.shape[1]), size):
            raise GeometryError(f"depth of {list(plane.shape)} has another aspect ratio than pictures of {list(size)}")
    if not planes:
        raise GeometryError("depth holds no view")
    return [plane.float() for plane in planes]


def _poses(pose: Any, count: int) -> torch.Tensor:
    poses = _stack("pose", pose).double()
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise GeometryError(f"pose must be [V, 4, 4], camera to world, got shape {list(poses.shape)}")
    if len(poses) != count:
        raise GeometryError(f"there are {count} depth maps and {len(poses)} poses; every picture needs one of each")
    finite = poses.isfinite().flatten(1).all(1)
    rotation = poses[:, :3, :3]
    skew = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs().flatten(1).amax(1)
    last = (poses[:, 3] - torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)).abs().amax(1)
    for view in finite.nonzero().flatten().tolist():
        what = (
            f"its last row is {poses[view, 3].tolist()}, not [0, 0, 0, 1]" if last[view] > _RIGID
            else "its rotation is not orthonormal" if skew[view] > _RIGID
            else "it mirrors (determinant -1)" if torch.linalg.det(rotation[view]) < 0
            else None
        )  # fmt: skip
        if what:
            raise GeometryError(
                f"the pose of picture {view} is not rigid: {what}. Expected is camera to world, [R t; 0 1], in metres."
            )
    return poses


def intrinsics_of(intrinsics: Any, count: int) -> torch.Tensor:
    """[V, 3, 3] float64 of ``count`` views.

    Raises:
        GeometryError: No camera has such intrinsics.
    """
    matrices = _stack("intrinsics", intrinsics).double()
    if matrices.shape[-2:] != (3, 3) or matrices.ndim not in (2, 3):
        hint = "; of [4, 4] pass [:3, :3]" if matrices.shape[-2:] == (4, 4) else ""
        raise GeometryError(f"intrinsics must be [3, 3] or [V, 3, 3], got shape {list(matrices.shape)}{hint}")
    if matrices.ndim == 3 and len(matrices) not in (1, count):
        raise GeometryError(f"there are {count} depth maps and {len(matrices)} intrinsics; give one for all, or each")
    flat = matrices.reshape(-1, 3, 3)
    last = (flat[:, 2] - torch.tensor([0.0, 0, 1], dtype=torch.float64)).abs().amax(1)
    focal = torch.linalg.det(flat[:, :2, :2]).abs()
    good = flat.isfinite().flatten(1).all(1) & (last < 1e-6) & (focal > 1e-6)
    if not bool(good.all()):
        bad = int((~good).nonzero()[0])
        raise GeometryError(
            f"intrinsics {flat[bad].tolist()} are singular or no camera's; expected [[fx, 0, cx], [0, fy, cy], "
            "[0, 0, 1]] in pixels of the picture"
        )
    return matrices.expand(count, 3, 3)


def warn_of(planes: Sequence[torch.Tensor], poses: torch.Tensor) -> None:
    """Of views that say nothing, and of depth that is hardly in metres."""
    unknown = (~poses.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if unknown:
        warnings.warn(
            f"the poses of pictures {unknown} are not finite: their tokens have no place in the world, and are told "
            "apart by what they show alone.",
            stacklevel=3,
        )
    known = [plane[plane.isfinite() & (plane > 0)] for plane in planes]
    blind = [view for view, values in enumerate(known) if not len(values)]
    if blind:
        warnings.warn(
            f"the depth of pictures {blind} is known nowhere: their tokens have no place in the world, and are told "
            "apart by what they show alone.",
            stacklevel=3,
        )
    far = [view for view, values in enumerate(known) if len(values) and float(values.median()) > _FAR]
    if far:
        warnings.warn(
            f"by their depth, half of pictures {far} is more than {_FAR:g} m away. If that is in millimetres, divide "
            "by 1000: poses are in metres.",
            stacklevel=3,
        )


def tables(token_xyz: Any) -> list[torch.Tensor]:
    """Per picture [N, 3] float32 coordinates.

    Raises:
        GeometryError: They are none.
    """
    given = list(token_xyz) if isinstance(token_xyz, Sequence) else _tensor("token_xyz", token_xyz)
    if isinstance(given, torch.Tensor) and given.ndim != 3:
        raise GeometryError(f"token_xyz must be [V, N, 3], one table per picture, got shape {list(given.shape)}")
    found = [_tensor("token_xyz", table).float() for table in given]
    for view, table in enumerate(found):
        if table.ndim != 2 or table.shape[1] != 3:
            raise GeometryError(f"token_xyz must be [N, 3] for every picture, got {list(table.shape)} for {view}")
    if not found:
        raise GeometryError("token_xyz holds no picture")
    return found


def _tensor(name: str, given: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise GeometryError(f"{name} must be numbers, got {given!r:.80}: {error}") from error


def _stack(name: str, given: Any) -> torch.Tensor:
    if not isinstance(given, Sequence):
        return _tensor(name, given)
    rows = [_tensor(name, row) for row in given]
    if len({row.shape for row in rows}) > 1:
        raise GeometryError(f"{name} must have one shape for all pictures, got {[list(row.shape) for row in rows]}")
    return torch.stack(rows) if rows else torch.empty(0)
