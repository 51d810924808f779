"""One question of a benchmark, as every task hands it to the runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_budget.errors import DataError, ImageError
from vlm_budget.images import decode_image, load_image, upright_rgb

if TYPE_CHECKING:
    from PIL import Image

    from vlm_budget.video.frames.queries import Query


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that is read when it is needed.

    Attributes:
        name: What reports call it: a file name, or where it stands in its dataset.
        source: A file, its bytes, or the picture itself.
    """

    name: str
    source: Path | bytes | Image.Image

    @classmethod
    def inside(cls, root: Path, relative: str) -> Picture:
        """A file of a dataset's folder.

        Raises:
            DataError: The path leads out of the folder.
        """
        return cls(str(relative), inside(root, relative))

    def load(self) -> Image.Image:
        """The picture, RGB and upright.

        Raises:
            ImageError: It is missing or damaged.
        """
        if isinstance(self.source, Path):
            return load_image(self.source)
        if isinstance(self.source, bytes):
            return decode_image(self.source, self.name)
        try:
            return upright_rgb(self.source)
        except (OSError, SyntaxError, ValueError) as error:  # opened, but not yet decoded
            raise ImageError(f"{self.name!r} is damaged or truncated: {error}") from error


@dataclass(frozen=True, eq=False)
class Clip:
    """A video file, or a part of it.

    Attributes:
        name: What reports call it.
        path: The file.
        start: Seconds from its beginning.
        end: Seconds; None for its end.
        draw: For a video that is made on the spot and lies in no file: a number to that many of its frames, spread
            evenly. None for a file.
    """

    name: str
    path: Path
    start: float = 0.0
    end: float | None = None
    draw: Callable[[int], list[Image.Image]] | None = None


@dataclass(frozen=True, eq=False)
class Views:
    """Where a sample's pictures were taken, for methods that read geometry; see :meth:`vlm_budget.PatchHandle.views`.

    Attributes:
        depth: Per picture, [H, W] metres along the optical axis.
        pose: [V, 4, 4] camera to world.
        intrinsics: [V, 3, 3], in the pixels of ``depth``.
    """

    depth: Sequence[Any]
    pose: Any
    intrinsics: Any


@dataclass(frozen=True, eq=False)
class Sample:
    """One question.

    Attributes:
        id: Unique in its task, and the same in every run.
        prompt: What the model is asked.
        answers: The references, as the task's metric reads them.
        images: Its pictures, in order.
        clip: Its video, or None.
        group: What it shares with other samples (a page, a picture): errors are clustered by it. Its id by default.
        facts: What else the metric and the report want: a category, the choices.
        views: Where its pictures were taken; None where that is not known.
        query: What frames are scored for, where it is known better than from the prompt.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    images: tuple[Picture, ...] = ()
    clip: Clip | None = None
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    views: Views | None = None
    query: Query | None = None

    @property
    def cluster(self) -> str:
        """The group, or the id where there is none."""
        return self.group or self.id


@dataclass(frozen=True)
class Broken:
    """A record that is no question: it is counted and shown, and the run goes on.

    Attributes:
        id: Where it stands, such as ``"line 17"``.
        error: What is wrong with it.
    """

    id: str
    error: str


def inside(root: Path, relative: str) -> Path:
    """A path below a folder.

    Raises:
        DataError: It leads out of the folder, also through a link, or cannot be a path.
    """
    try:
        path = (root / str(relative)).resolve()
        base = root.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte; a loop of links, before Python 3.13
        raise DataError(f"{relative!r} is no usable path: {error}") from error
    if not path.is_relative_to(base):
        raise DataError(f"{relative!r} leads out of the data folder {str(root)!r}")
    return path
