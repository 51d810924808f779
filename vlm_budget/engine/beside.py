"""What a user lays beside the next prompts: where their pictures' tokens lie, and how much their frames matter."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import FrameScoreError, GeometryError
from ..families.base import Family
from ..geometry import check_views, views_of
from ..layout import Modality, VisualItem, group_rows

if TYPE_CHECKING:
    from .prompts import Prompts


@dataclass(frozen=True)
class Repeated:
    """How ``generate`` repeated prompts along with their pixels, as it does up to 4.x of transformers for beams.

    Attributes:
        times: How often every prompt stands in the batch.
        tokens: Visual tokens of every prompt; empty where they are not known.
    """

    times: int = 1
    tokens: Sequence[int] = ()

    @classmethod
    def of(cls, generating: Prompts | None, given: Prompts | None, modality: Modality) -> Repeated:
        """What the forward at hand holds of the prompts that ``generate`` was given, if it is one of those."""
        if generating is None or given is None or not generating.rows:
            return cls()
        tokens = () if generating.counts is None else generating.counts.visual.get(modality, ())
        return cls(max(1, given.rows // generating.rows), tokens)

    def originals(self, items: Sequence[VisualItem], count: int) -> list[int] | None:
        """Which of the ``count`` items that something was laid beside every encoded one is; None where it is of others.

        Numbers that merely divide are no copies: 12 views are not of the 84 tiles that 12 pictures were cut into.
        """
        if len(items) == count:
            return list(range(count))
        if self.times == 1 or len(items) != count * self.times:
            return None
        rows = group_rows(items, [n for n in self.tokens for _ in range(self.times)]) if self.tokens else None
        if rows is None:
            return [index // self.times for index in range(len(items))]
        found, start = [], 0
        for row in rows[:: self.times]:
            found += self.times * list(range(start, start + len(row)))
            start += len(row)
        return found


ONCE = Repeated()


@dataclass(frozen=True, eq=False)
class Views:
    """Geometry of a batch's pictures, in the order of their placeholders.

    Attributes:
        given: As :meth:`vlm_budget.PatchHandle.views` has it; copies, so that what the user fills anew does not follow.
        count: Pictures they are of.
    """

    given: Mapping[str, Any]
    count: int

    @classmethod
    def of(cls, **given: Any) -> Views:
        """Check what can be checked before the pictures are known.

        Raises:
            GeometryError: It cannot be geometry of any pictures.
        """
        own = {name: _copied(value) for name, value in given.items()}
        return cls(own, check_views(**own))

    def coordinates(
        self, base: nn.Module, family: Family, items: Sequence[VisualItem], repeated: Repeated = ONCE
    ) -> list[torch.Tensor]:
        """Per picture [n, 3] float32, NaN where a token lies nowhere.

        Raises:
            GeometryError: There are other pictures than views.
        """
        originals = repeated.originals(items, self.count)
        if originals is None:
            raise GeometryError(
                f"views were laid beside {self.count} pictures, the prompts hold {len(items)} (of a picture cut into "
                "tiles, each counts). Call handle.views(...) with one view per picture, in the prompts' order."
            )
        own = [items[originals.index(view)] for view in range(self.count)]
        found = views_of(own, [family.fit(base, "image", item) for item in own], **self.given)
        return [found[view] for view in originals]


@dataclass(frozen=True, eq=False)
class FrameScores:
    """Relevance of a batch's frames to its questions.

    Attributes:
        modality: Whether the frames are those of videos, or pictures.
        rows: Per video, [T] float32; a single one of all pictures where the frames are pictures.
    """

    modality: Modality
    rows: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, scores: Any, modality: Modality) -> FrameScores:
        """Read scores: one vector, or one per video.

        Raises:
            FrameScoreError: No numbers, or some of them not finite or negative.
        """
        nested = isinstance(scores, Sequence) and len(scores) > 0 and all(_is_vector(one) for one in scores)
        rows = tuple(_vector(one) for one in (scores if nested else [scores]))
        return cls(modality, rows if modality == "video" else (torch.cat(rows),))

    def per_item(self, items: Sequence[VisualItem], repeated: Repeated = ONCE) -> list[torch.Tensor]:
        """Per video or picture, [P] float32 scores of its partitions.

        Raises:
            FrameScoreError: There are other videos, frames or pictures than scores.
        """
        mine = list(self.rows if self.modality == "video" else self.rows[0][:, None])
        originals = repeated.originals(items, len(mine))
        if originals is None:
            what = "videos" if self.modality == "video" else "pictures"
            raise FrameScoreError(
                f"scores were laid beside {len(mine)} {what}, the prompts hold {len(items)}. Call handle.frames(...) "
                f"with {'a vector per video' if self.modality == 'video' else 'a score per picture'}, in their order."
            )
        return [_of_partitions(mine[original], item) for original, item in zip(originals, items, strict=True)]


@dataclass(frozen=True, eq=False)
class Beside:
    """All that was laid beside; a new one replaces it, so that the object tells what a choice was made for."""

    views: Views | None = None
    scores: FrameScores | None = None

    def laid(
        self,
        base: nn.Module,
        family: Family,
        modality: Modality,
        items: Sequence[VisualItem],
        repeated: Repeated = ONCE,
    ) -> Laid:
        """What belongs to the items of an encoder call.

        Raises:
            GeometryError: There are other pictures than views.
            FrameScoreError: There are other frames than scores.
        """
        xyz = scores = None
        if self.views is not None and modality == "image":
            xyz = self.views.coordinates(base, family, items, repeated)
        if self.scores is not None and modality == self.scores.modality:
            scores = self.scores.per_item(items, repeated)
        return Laid(self, xyz, scores)


@dataclass(frozen=True, eq=False)
class Laid:
    """What was laid beside the items of an encoder call.

    Attributes:
        source: Where it comes from.
        xyz: Per item [n, 3]; None where no views were laid beside.
        scores: Per item [P]; None where no scores were.
    """

    source: Beside = field(default_factory=Beside)
    xyz: Sequence[torch.Tensor] | None = None
    scores: Sequence[torch.Tensor] | None = None


NOTHING = Beside()


def _copied(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.detach().clone()
    if type(given) in (list, tuple):
        return type(given)(_copied(one) for one in given)
    return copy.copy(given) if hasattr(given, "__array__") else given


def _is_vector(one: Any) -> bool:
    return isinstance(one, torch.Tensor) and one.ndim > 0 or isinstance(one, Sequence) or getattr(one, "ndim", 0) > 0


def _vector(scores: Any) -> torch.Tensor:
    try:
        found = torch.as_tensor(scores, dtype=torch.float32).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FrameScoreError(f"scores must be numbers, one per frame, got {scores!r:.80}: {error}") from error
    if found.ndim != 1 or not len(found):
        raise FrameScoreError(f"scores must be a vector, one number per frame, got shape {list(found.shape)}")
    if not bool((found.isfinite() & (found >= 0)).all()):
        bad = int((~(found.isfinite() & (found >= 0))).nonzero()[0])
        raise FrameScoreError(f"scores must be finite and not negative; that of frame {bad} is {float(found[bad])}")
    return found


def _of_partitions(scores: torch.Tensor, item: VisualItem) -> torch.Tensor:
    """[T] scores of frames, or [1] of a picture, to [P]; frames merged into one partition count as their best."""
    count = len(item.partitions)
    if len(scores) == count:
        return scores
    if item.modality == "image":
        return scores.expand(count)
    times = [grid.time for grid in item.partitions]
    merged = times[1] - times[0] if count > 1 else len(scores)
    if merged < 1 or not count - 1 < len(scores) / merged <= count:
        raise FrameScoreError(
            f"{len(scores)} scores were laid beside a video of {count} frames"
            + (f" (each made of {merged})" if merged > 1 else "")
            + "; pass one score per frame that the processor was given."
        )
    return torch.stack([part.max() for part in scores.split(merged)])
