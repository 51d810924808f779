"""QuoTA: every frame gets tokens by how much it says to the question.

QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension, arXiv 2503.08689 (AAAI
2026), from the formula. Frames share a prompt's tokens in proportion to the squares of their scores; each frame's grid
is resampled to its share; a frame whose share is nothing is dropped. The scores are laid beside the prompt.

Where this differs from the released code, and why:

* The sum is the budget. Released, shares are rounded down, again to a product h x w, and newlines are not counted.
* A frame has at most the tokens of its grid before pooling. Released, bilinear sampling blows a frame up beyond them.
* What such a cap refuses goes to all others, in proportion; released, only to later frames, and once.
* Pictures are frames, too: they share the budget with the videos and pictures of their prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_budget.allocate import split
from vlm_budget.budget import Budget
from vlm_budget.errors import BudgetError, FrameScoreError, InfeasibleBudgetError, OptionError
from vlm_budget.frames import allocate_frames
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Context, Finer, Pruner, Selection
from vlm_budget.pruners.assigners import ASSIGNERS, Assigner, merged, places, resampled
from vlm_budget.pruners.uniform import evenly, lattice


@dataclass(frozen=True, kw_only=True)
class QuoTA(Pruner):
    """Tokens per frame by relevance, each frame resampled to its share.

    Attributes:
        power: A frame weighs its score to this power.
        floor: The least tokens of each frame; with 0, frames may be dropped.
        assigner: How a frame becomes fewer tokens: ``"bilinear"``, ``"average"``, ``"merge"`` or ``"stride"``. Default
            ``"bilinear"``, and ``"stride"`` in models with M-RoPE, where a token's place is part of its meaning.
        unpooled: Frames that the model pools are resampled from, and capped at, their grid before pooling.
    """

    power: float = 2.0
    floor: int = 0
    assigner: Assigner | None = None
    unpooled: bool = True

    paper = "arXiv 2503.08689"
    reads_frames = True
    merges = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.power, bool) or not isinstance(self.power, int | float) or not 0 <= self.power < math.inf:
            raise OptionError(f"power must be a finite number of at least 0, got {self.power!r}")
        if isinstance(self.floor, bool) or not isinstance(self.floor, int) or self.floor < 0:
            raise OptionError(f"floor must be a number of tokens of at least 0, got {self.floor!r}")
        if self.assigner is not None and self.assigner not in ASSIGNERS:
            raise OptionError(f"assigner must be one of {ASSIGNERS} or None, got {self.assigner!r}")
        if not isinstance(self.unpooled, bool):
            raise OptionError(f"unpooled must be True or False, got {self.unpooled!r}")

    @property
    def joint(self) -> bool:
        """All frames of a prompt share its tokens."""
        return True

    @property
    def reads_unpooled(self) -> bool:
        """The field ``unpooled``."""
        return self.unpooled

    def tokens(self, budget: Budget, items: Sequence[VisualItem]) -> int:
        """How many tokens a prompt may keep.

        Raises:
            BudgetError: Also where they are fewer than ``floor`` asks for.
        """
        count = super().tokens(budget, items)
        least = sum(sum(self._floors(item)) for item in items)
        if count < least:
            total = sum(item.size for item in items)
            raise InfeasibleBudgetError(
                f"budget '{budget}' leaves {count} of {total} visual tokens, and {self} keeps at least {least}.",
                [Budget(least, "tokens", relative=False), Budget(least / total)],
            )
        return count

    def _floors(self, item: VisualItem) -> list[int]:
        return [min(self.floor, size) for size in frame_sizes(item)]

    def pick_prompt(self, contexts: Sequence[Context], k: int) -> Selection:
        """Share ``k`` tokens out over the prompt's items by the scores of their frames, then within each."""
        counts = self._counts(contexts, k)
        parts = [self._part(ctx, *of_item) for ctx, of_item in zip(contexts, counts, strict=True)]
        starts = [sum(ctx.item.size for ctx in contexts[:index]) for index in range(len(contexts))]
        keep = torch.cat([part.keep + start for part, start in zip(parts, starts, strict=True)])
        if all(part.values is None for part in parts):
            return Selection(keep)
        values = [
            ctx.features[part.keep] if part.values is None else part.values
            for ctx, part in zip(contexts, parts, strict=True)
        ]
        return Selection(keep, torch.cat(values))

    def _part(self, ctx: Context, patches: int, separators: int) -> Selection:
        count = patches + separators
        if self.newline == "keep_used_rows" and ctx.item.modality == "image" and count:
            return self.select(ctx, count)
        return self._with_separators(ctx, self._checked_pick(ctx, patches), ctx.separators[:separators], count)

    def _counts(self, contexts: Sequence[Context], k: int) -> list[tuple[int, int]]:
        """Per item, how many patch tokens and how many separators it keeps."""
        items = [ctx.item for ctx in contexts]
        room = [len(item.candidates) for item in items]
        least = max(1, sum(sum(self._floors(item)) for item in items))
        wanted: list[int] = [len(item.separators) if self._stays(item) else 0 for item in items]
        if k - sum(wanted) < least:
            if self.newline == "keep_all" and any(wanted):
                raise BudgetError(
                    f"newline='keep_all' keeps {sum(wanted)} separators, which leaves {max(k - sum(wanted), 0)} of {k} "
                    f"tokens for the frames, which take {least} or more. The nearest feasible count is "
                    f"{sum(wanted) + least}; or use newline='drop'."
                )
            wanted = [0] * len(items)
        while True:
            patches = self._shares_of_items(contexts, min(k - sum(wanted), sum(room)))
            idle = [count > 0 and not some for count, some in zip(wanted, patches, strict=True)]
            if self.newline == "keep_all" or not any(idle):
                break
            # A video that keeps no frame keeps no newline: the others share this token.
            wanted = [0 if vain else count for count, vain in zip(wanted, idle, strict=True)]
        left = k - sum(patches) - sum(wanted)
        free = [len(item.separators) - count for item, count in zip(items, wanted, strict=True)]
        for index, more in enumerate(split(left, free, free)):
            wanted[index] += more
        return list(zip(patches, wanted, strict=True))

    def _stays(self, item: VisualItem) -> bool:
        """Separators that are paid before any frame: those of rows by ``newline``, and always a video's closing one."""
        return self.newline == "keep_all" or (item.modality == "video" and len(item.separators) == 1)

    def _shares_of_items(self, contexts: Sequence[Context], k: int) -> list[int]:
        """Patch tokens per item: frames share as if they were of one video, within what the items have room for."""
        shares = [0] * len(contexts)
        scores, caps = prompt_scores(contexts), [self._caps(ctx) for ctx in contexts]
        floors = [self._floors(ctx.item) for ctx in contexts]
        open_ = list(range(len(contexts)))
        while open_:
            counts = iter(
                allocate_frames(
                    [score for index in open_ for score in scores[index]],
                    k,
                    caps=[cap for index in open_ for cap in caps[index]],
                    power=self.power,
                    floor=[low for index in open_ for low in floors[index]],
                )
            )
            for index in open_:
                shares[index] = sum(next(counts) for _ in caps[index])
            full = [index for index in open_ if shares[index] > len(contexts[index].item.candidates)]
            if not full:
                break
            for index in full:
                shares[index] = len(contexts[index].item.candidates)
                k -= shares[index]
                open_.remove(index)
        return shares

    def _caps(self, ctx: Context) -> list[int]:
        """The most tokens of every frame."""
        sizes, finer = frame_sizes(ctx.item), self._finer(ctx)
        return sizes if finer is None else [finer.rows * finer.cols] * len(sizes)

    def _finer(self, ctx: Context) -> Finer | None:
        return ctx.finer if self.unpooled and ctx.item.modality == "video" else None

    def pick(self, ctx: Context, k: int) -> Selection:
        """Resample the item's frames to ``k`` tokens in all."""
        item, finer = ctx.item, self._finer(ctx)
        how = self.assigner or ("stride" if ctx.mrope else "bilinear")
        if item.modality == "image":
            return _from_tokens(ctx, split(k, item.shown, item.shown), how)
        (scores,) = prompt_scores([ctx])
        counts = allocate_frames(scores, k, caps=self._caps(ctx), power=self.power, floor=self._floors(item))
        return _from_tokens(ctx, counts, how) if finer is None else _from_finer(ctx, finer, counts, how)


def _from_tokens(ctx: Context, counts: Sequence[int], how: Assigner) -> Selection:
    """Resample partitions of which the model's own tokens are all there is."""
    item = ctx.item
    columns, values = [], []
    for index, (grid, count) in enumerate(zip(item.partitions, counts, strict=True)):
        if not count:
            continue
        members = (item.partition == index).nonzero().flatten()
        patch, tokens = item.patch[members], ctx.there(members)
        sides = rectangle(patch, grid.cols)
        if how == "merge" and count < len(members):
            value, survivors = merged(ctx.features[tokens], count)
            columns.append(tokens[survivors])
        else:
            nearest = lattice(patch, grid.cols, count) if sides is None else places(*sides, count)
            columns.append(ctx.there(members[nearest]))
            if how == "stride" or sides is None or count == len(members):
                value = ctx.features[columns[-1]]
            else:
                value = resampled(ctx.features[tokens], *sides, count, how)
        values.append(value)
    keep = torch.cat(columns)
    return Selection(keep) if how == "stride" else Selection(keep, torch.cat(values))


def _from_finer(ctx: Context, finer: Finer, counts: Sequence[int], how: Assigner) -> Selection:
    """Resample frames from their grids before pooling; the model's own tokens follow each other frame by frame."""
    ideal, values, start = [], [], 0
    for index, (grid, size, count) in enumerate(zip(ctx.item.partitions, ctx.item.shown, counts, strict=True)):
        if count:
            ideal.append(start + (places(grid.rows, grid.cols, count) if count <= size else evenly(count, size)))
            values.append(resampled(finer.of(index), finer.rows, finer.cols, count, how))
        start += size
    keep = ctx.item.candidates[spaced(torch.cat(ideal), start)]
    return Selection(ctx.there(keep), torch.cat(values))


def frame_sizes(item: VisualItem) -> list[int]:
    """The model's own tokens of every frame: a video's partitions, and a picture as a whole."""
    return item.shown if item.modality == "video" else [len(item.candidates)]


def prompt_scores(contexts: Sequence[Context]) -> list[list[float]]:
    """Per item, the scores of its frames; what was not scored counts as the mean of what was, all 1 without any.

    Raises:
        FrameScoreError: An item has other frames than scores.
    """
    known: list[list[float]] = []
    for ctx in contexts:
        if ctx.scores is None:
            known.append([])
            continue
        if len(ctx.scores) != len(ctx.item.partitions):
            raise FrameScoreError(f"{len(ctx.scores)} scores were laid beside {len(ctx.item.partitions)} frames")
        found: list[float] = ctx.scores.tolist()
        known.append(found if ctx.item.modality == "video" else [max(found)])
    flat = [score for found in known for score in found]
    usual = sum(flat) / len(flat) if flat else 1.0
    return [found or [usual] * len(frame_sizes(ctx.item)) for found, ctx in zip(known, contexts, strict=True)]


def rectangle(patch: torch.Tensor, cols: int) -> tuple[int, int] | None:
    """Rows and columns of the tokens present in a grid; None where they are not some rows by some columns.

    Args:
        patch: [m] int64, ascending ``row * cols + col`` of the tokens present.
        cols: Grid width.
    """
    rows, columns = torch.unique(patch // cols), torch.unique(patch % cols)
    return (len(rows), len(columns)) if len(rows) * len(columns) == len(patch) else None


def spaced(ideal: torch.Tensor, size: int) -> torch.Tensor:
    """Distinct places that keep an order and leave the ideal ones by as little as they can.

    Args:
        ideal: [k] int64 in ``range(size)``, not descending but where frames that need more room than they have meet.
        size: Places, at least k.

    Returns:
        [k] int64, strictly ascending in ``range(size)``; no others have a smaller largest distance from the ideal ones.
    """
    steps = torch.arange(len(ideal), device="cpu")
    slack = ideal - steps
    low, high = slack.cummax(0).values, slack.flip(0).cummin(0).values.flip(0)
    return ((low + high) // 2).clamp(0, size - len(ideal)) + steps
