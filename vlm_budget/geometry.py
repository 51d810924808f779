"""Where visual tokens lie in the world: from depth, camera poses and intrinsics.

A token's place is the mean of the points that its pixels show (SeGPruner, arXiv 2603.29437, Eq. 1 and 2), over the
pixels whose depth is known, each weighted by how much of it the token covers. Which pixels a token shows is the
family's to say: :class:`vlm_budget.layout.Partition` has the box of its grid, :class:`Fit` what the processor did to
the picture. A token at the edge of a thing shows two depths, and lies between them.

All is worked out in the pixels of the *source*: the token's cell is carried back through the processor's resizing and
padding, instead of the intrinsics forward through it. Both are the same, for resizing and padding move every pixel and
the principal point alike (:func:`fitted_intrinsics` does the latter); but depth, which has edges, is never resampled,
and padding cannot be mistaken for something seen.

Units are metres. Cameras are OpenCV's: x right, y down, z forward, depth along z. Pixel centres are whole numbers: the
pixel (0, 0) covers [-0.5, 0.5] in both axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from .cameras import Size, camera_views, intrinsics_of, same_aspect, tables, warn_of
from .errors import GeometryError
from .layout import Partition, VisualItem

FitKind = Literal["stretch", "pad", "crop"]

LEAST_VALID = 0.1
"""Share of a token's cell whose depth must be known; cells reach into padding, where it is not."""


@dataclass(frozen=True)
class Fit:
    """How a picture was brought to the frame that the boxes of an item's partitions speak of.

    Attributes:
        kind: ``"stretch"``: the frame is the picture, squeezed to whatever the tower takes. ``"pad"``: it is the square
            around the picture, whose centre it has up to half a pixel. ``"crop"``: it is the square in the middle of
            the picture, once its short edge has ``side`` pixels.
        side: Pixels along the frame as the tower is given it; for ``"crop"``.
        covered: Share of a partition's box, from the top left, that its grid of tokens covers. Below 1 in towers whose
            patches do not fill the picture: 27 of 14 pixels in 384 (SigLIP) leave 6 unseen.
        native: The grid has the aspect ratio of the picture, up to a token in either direction.
    """

    kind: FitKind = "stretch"
    side: int = 0
    covered: float = 1.0
    native: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.kind not in get_args(FitKind):
            raise GeometryError(f"a picture is fitted by one of {get_args(FitKind)}, got {self.kind!r}")
        if self.kind == "crop" and self.side < 1:
            raise GeometryError(f"fit 'crop' needs the side of the frame in pixels, got {self.side}")

    def frame(self, size: Size) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge of the frame, in pixels from the top left corner of a picture.

        Args:
            size: Height and width of the picture.
        """
        height, width = size
        if self.kind == "pad":
            longest = max(size)
            margin, above = (longest - width) // 2, (longest - height) // 2
            return -margin, -above, longest - margin, longest - above
        if self.kind == "crop":
            # As transformers resizes a short edge: the long one is rounded down.
            new = [self.side if n == min(size) else int(self.side * n / min(size)) for n in size]
            starts = [(m - self.side) // 2 for m in new]
            top, left = (start * n / m for start, n, m in zip(starts, size, new, strict=True))
            bottom, right = ((start + self.side) * n / m for start, n, m in zip(starts, size, new, strict=True))
            return left, top, right, bottom
        return 0.0, 0.0, float(width), float(height)

    def check(self, item: VisualItem, size: Size) -> None:
        """Refuse a picture of another shape than the item's.

        Raises:
            GeometryError: It has another aspect ratio.
        """
        height, width = size
        if item.picture is not None and not same_aspect(size, item.picture):
            raise GeometryError(
                f"depth of {height} x {width} was given for a picture of {item.picture[0]} x {item.picture[1]}, which "
                "has another aspect ratio. Depth must show what the picture shows: is one of them cropped or turned?"
            )
        rows, cols = item.partitions[0].rows, item.partitions[0].cols
        near = (rows - 1) * width < (cols + 1) * height and (cols - 1) * height < (rows + 1) * width
        if self.native and not near:
            raise GeometryError(
                f"depth of {height} x {width} was given for a picture of {rows} x {cols} tokens, which has another "
                "aspect ratio. Depth must show what the picture shows: is one of them cropped or turned?"
            )


STRETCH = Fit()


def fitted_intrinsics(intrinsics: Any, fit: Fit, size: Size, to: Size) -> torch.Tensor:
    """Intrinsics of the frame as the tower is given it: the picture's, through its resizing, padding and cropping.

    Args:
        intrinsics: [3, 3], in pixels of the picture.
        fit: What the processor did to it.
        size: Height and width of the picture.
        to: Height and width of the frame in the tower's pixels.

    Returns:
        [3, 3] float64.

    Raises:
        GeometryError: The intrinsics are singular.
    """
    left, top, right, bottom = fit.frame(size)
    scale_x, scale_y = to[1] / (right - left), to[0] / (bottom - top)
    # From pixel centres to edges, out of the frame's corner, to its pixels, and back to centres.
    into = torch.tensor(
        [
            [scale_x, 0, (0.5 - left) * scale_x - 0.5],
            [0, scale_y, (0.5 - top) * scale_y - 0.5],
            [0, 0, 1],
        ],
        dtype=torch.float64,
    )
    return into @ intrinsics_of(intrinsics, 1)[0]


def token_coordinates(
    item: VisualItem, depth: Any, pose: Any, intrinsics: Any, fit: Fit = STRETCH, size: Size | None = None
) -> torch.Tensor:
    """Where every token of a picture lies in the world.

    Args:
        item: Its tokens.
        depth: [H, W] metres along the camera's axis; 0, negative, NaN and infinite where it is not known.
        pose: [4, 4] camera to world. One that is not finite (ScanNet has such) says nothing: there is a warning, and no
            token lies anywhere.
        intrinsics: [3, 3] in pixels of a picture of ``size``.
        fit: What the processor did to the picture, see ``Family.fit``.
        size: Height and width of the picture, where that is larger or smaller than ``depth``.

    Returns:
        [n, 3] float32 on the CPU. NaN for separators, and for tokens of whose cell less than a tenth has a depth.

    Raises:
        GeometryError: Shapes that do not fit, singular intrinsics, a pose that is not rigid, depth of another aspect
            ratio than the picture.
    """
    planes, poses, matrices = camera_views([depth], [pose], [intrinsics], size)
    warn_of(planes, poses)
    return _place(item, planes[0], poses[0], matrices[0], fit, size)


def check_views(
    depth: Any = None,
    pose: Any = None,
    intrinsics: Any = None,
    token_xyz: Any = None,
    size: Size | None = None,
    fit: FitKind | None = None,
) -> int:
    """Check what can be checked of views before their pictures are known; warns of poses that are not finite.

    Args:
        depth: [V, H, W], or a list of [H, W], one per picture.
        pose: [V, 4, 4] camera to world.
        intrinsics: [3, 3], or [V, 3, 3].
        token_xyz: Instead of these, [V, N, 3] or a list of [N, 3] coordinates of every token.
        size: Height and width of the pictures in whose pixels the intrinsics are, where depth is of another size.
        fit: What the processor did to the pictures, where that is not what the family says.

    Returns:
        V.

    Raises:
        GeometryError: They cannot be views of any pictures.
    """
    Fit(fit or "stretch", side=1)
    if token_xyz is not None:
        if any(given is not None for given in (depth, pose, intrinsics)):
            raise GeometryError("give token_xyz, or depth with pose and intrinsics, not both")
        return len(tables(token_xyz))
    planes, poses, _ = camera_views(depth, pose, intrinsics, size)
    warn_of(planes, poses)
    return len(planes)


def views_of(
    items: Sequence[VisualItem],
    fits: Sequence[Fit],
    depth: Any = None,
    pose: Any = None,
    intrinsics: Any = None,
    token_xyz: Any = None,
    size: Size | None = None,
    fit: FitKind | None = None,
) -> list[torch.Tensor]:
    """Where the tokens of pictures lie in the world.

    Args:
        items: The pictures, in the order of the views.
        fits: What the processor did to each.
        depth: As :func:`check_views` has it, and so what follows.
        pose: Likewise.
        intrinsics: Likewise.
        token_xyz: Likewise; N is a picture's tokens with or without separators.
        size: Likewise.
        fit: Likewise.

    Returns:
        Per picture [n, 3] float32 on the CPU, as :func:`token_coordinates` has it.

    Raises:
        GeometryError: These cannot be views of these pictures.
    """
    if token_xyz is not None:
        given = tables(token_xyz)
        _same_count(len(given), len(items))
        return [_in_token_order(item, table) for item, table in zip(items, given, strict=True)]
    planes, poses, matrices = camera_views(depth, pose, intrinsics, size)
    _same_count(len(planes), len(items))
    if fit is not None:
        fits = [replace(own, kind=fit, side=own.side or max(planes[0].shape)) for own in fits]
    views = zip(items, planes, poses, matrices, fits, strict=True)
    return [_place(*view, size) for view in views]


# --- from pixels to tokens -------------------------------------------------------------------------------------------


def _place(
    item: VisualItem, depth: torch.Tensor, pose: torch.Tensor, matrix: torch.Tensor, fit: Fit, size: Size | None
) -> torch.Tensor:
    """[n, 3]; see :func:`token_coordinates`."""
    if item.modality != "image":
        raise GeometryError("views are of pictures; the frames of a video have none. Pass them as pictures.")
    shape = (depth.shape[0], depth.shape[1])
    fit.check(item, size or shape)
    planes = _moments(depth, size or shape)
    cells = torch.cat([_cells(planes, grid, fit, size or shape) for grid in item.partitions])
    valid, share, moments = cells[:, 0], cells[:, 1], cells[:, 2:]
    # The mean of the points is the point of the mean, for what follows is linear.
    rays = moments / valid[:, None] @ torch.linalg.inv(matrix).T
    points = rays @ pose[:3, :3].T + pose[:3, 3]
    points[(share < LEAST_VALID - 1e-9) | ~points.isfinite().all(1)] = float("nan")
    found = points.float()[item.place]
    found[item.separators] = float("nan")
    return found


def _moments(depth: torch.Tensor, size: Size) -> torch.Tensor:
    """[4, h, w] float64 of every pixel of a depth map: 1, u z, v z and z; zeros where it is not known.

    Args:
        depth: [h, w].
        size: Height and width of the picture in whose pixels u and v are.
    """
    known = depth.isfinite() & (depth > 0)
    z = depth.where(known, 0.0).double()
    v, u = (
        (torch.arange(n, dtype=torch.float64) + 0.5) * (m / n) - 0.5 for n, m in zip(depth.shape, size, strict=True)
    )
    return torch.stack([known.double(), z * u, z * v[:, None], z])


def _cells(planes: torch.Tensor, grid: Partition, fit: Fit, size: Size) -> torch.Tensor:
    """[rows * cols, 5] of every cell: pixels of known depth, their share of it, and the sums of u z, v z and z."""
    left, top, right, bottom = fit.frame(size)
    height, width = planes.shape[1:]
    x = _edges(left, right, grid.box[0], grid.box[2], grid.cols, fit.covered) * (width / size[1])
    y = _edges(top, bottom, grid.box[1], grid.box[3], grid.rows, fit.covered) * (height / size[0])
    # What a cell has of a pixel is what it has of its row times what it has of its column.
    sums = (_overlaps(y, height) @ planes @ _overlaps(x, width).T).flatten(1).T
    area = (y.diff()[:, None] * x.diff()).flatten()
    return torch.cat([sums[:, :1], (sums[:, 0] / area)[:, None], sums[:, 1:]], 1)


def _overlaps(edges: torch.Tensor, count: int) -> torch.Tensor:
    """[cells, count] float64, how much of every pixel of a line lies between two edges."""
    start = torch.arange(count, dtype=torch.float64)
    return (torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)).clamp_min(0)


def _edges(start: float, stop: float, first: float, last: float, cells: int, covered: float) -> torch.Tensor:
    """[cells + 1] float64, the edges of cells in a stretch from ``first`` to ``last`` of that from start to stop."""
    places = first + (last - first) * covered * torch.arange(cells + 1, dtype=torch.float64) / cells
    return start + (stop - start) * places


def _in_token_order(item: VisualItem, table: torch.Tensor) -> torch.Tensor:
    """[n, 3] of coordinates that a user gave, with separators or without."""
    candidates = item.candidates
    if len(table) not in (item.size, len(candidates)):
        raise GeometryError(
            f"token_xyz has {len(table)} tokens for a picture of {item.size} ({len(candidates)} without separators)"
        )
    found = torch.full((item.size, 3), float("nan"))
    found[candidates] = table[candidates] if len(table) == item.size else table
    return found.where(found.isfinite().all(1, keepdim=True), float("nan"))


def _same_count(views: int, pictures: int) -> None:
    if views != pictures:
        raise GeometryError(f"there are {views} views and {pictures} pictures; give one view per picture, in order")
