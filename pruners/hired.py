"""HiRED: High-Resolution Early Dropping.

HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models, arXiv
2408.10945 (AAAI 2025), written from the paper's equations. Phase 1 splits one budget over the thumbnail and the crops;
phase 2 keeps, in each, the patches the class token attends to most.

Where this differs from the released code, and why:

* Crop content (Eq. 1) sums the thumbnail's CLS attention under each crop. The released code counts hits of a top-M
  mask and reshapes the map so that a 2 x 2 grid gets horizontal strips; here every thumbnail patch belongs to the crop
  that holds its centre. ``content="count"`` gives the counting, with the correct crops.
* Quotas are exact (largest remainder, overflow poured again); the released code truncates and loses the rest.
* Padding is never a candidate; the released code ranks it, and drops it after the fact, below the budget.
* The budget is a share of the prompt's real tokens. ``budget_base="padded"`` takes it of all partitions' tokens,
  padding included and newlines excluded, as the released code does.
* Newlines are dropped, as released; ``newline=`` keeps them, inside the budget.

Ours, not the paper's: received attention stands in for the CLS row in towers without a class token, and partitions
without a thumbnail (tiles alone, video frames) share the budget in proportion to their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Literal

import torch

from vlm_budget.allocate import split
from vlm_budget.budget import Budget
from vlm_budget.errors import OptionError
from vlm_budget.greedy import whole_numbers
from vlm_budget.layout import Partition, VisualItem
from vlm_budget.ops import quota, segmented_topk
from vlm_budget.pruner import Attention, Context, Pruner, Tower, saliency
from vlm_budget.transfer import counts_on, moved


@dataclass(frozen=True, kw_only=True)
class HiRED(Pruner):
    """Budget per partition by thumbnail attention, top-k per partition by CLS attention.

    Attributes:
        alpha: Share of an image's tokens that goes to the thumbnail.
        init_layer: Vision layer (0-based) whose attention tells how much content a crop has.
        final_layer: Vision layer whose attention ranks the tokens; default the layer the language model reads.
        content: ``"mass"`` (Eq. 1) or ``"count"`` (hits of a top-M mask, as released).
        count_top: M for ``content="count"``; default ``int(N * (1 - alpha))`` of the thumbnail's N patches.
        budget_base: ``"valid"`` or ``"padded"`` (see module text); matters for ratio budgets only.
    """

    alpha: float = 0.5
    init_layer: int = 0
    final_layer: int | None = None
    content: Literal["mass", "count"] = "mass"
    count_top: int | None = None
    budget_base: Literal["valid", "padded"] = "valid"

    paper = "arXiv 2408.10945"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real):
            raise OptionError(f"alpha must be a number in [0, 1], got {self.alpha!r}")
        for name in ("init_layer", "final_layer", "count_top"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | None):
                raise OptionError(f"{name} must be an int, got {value!r}")
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha must lie in [0, 1], got {self.alpha}")
        if self.content not in ("mass", "count"):
            raise OptionError(f"content must be 'mass' or 'count', got {self.content!r}")
        if self.budget_base not in ("valid", "padded"):
            raise OptionError(f"budget_base must be 'valid' or 'padded', got {self.budget_base!r}")
        if self.count_top is not None and self.count_top < 1:
            raise OptionError(f"count_top must be at least 1, got {self.count_top}")

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """Content attention first, token attention second (the same need twice where the layers agree)."""
        final = tower.feature_layer if self.final_layer is None else self.final_layer
        return (saliency(tower, self.init_layer), saliency(tower, final))

    def tokens(self, budget: Budget, items: Sequence[VisualItem]) -> int:
        """Tokens of a prompt; with ``budget_base="padded"`` the sum of its items' padded shares."""
        if self.budget_base == "valid" or budget.unit != "ratio":
            return super().tokens(budget, items)
        total = sum(item.size for item in items)
        wanted = sum(self._padded(budget, items))
        return Budget(float(max(wanted, 1)), "tokens", relative=False).tokens(total, len(items))

    def shares(self, budget: Budget, items: Sequence[VisualItem]) -> list[int]:
        """Tokens per item; with ``budget_base="padded"`` the floor of rate x all grid tokens of each."""
        if self.budget_base == "valid" or budget.unit != "ratio" or min(self._padded(budget, items)) < 1:
            return super().shares(budget, items)
        return self._padded(budget, items)

    def _padded(self, budget: Budget, items: Sequence[VisualItem]) -> list[int]:
        grids = [sum(grid.rows * grid.cols for grid in item.partitions) for item in items]
        return [min(math.floor(budget.amount * grid), item.size) for grid, item in zip(grids, items, strict=True)]

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Split ``k`` over the partitions, then take each partition's most attended patches."""
        needs = [need for need in ctx.attention if need.kind in ("cls", "received")]  # a merging stage may ask for more
        quotas = self.quotas(ctx.item.partitions, ctx.item.shown, ctx.attention[needs[0]], k)
        return segmented_topk(ctx.token_scores(needs[-1]), ctx.partition, quotas, k)

    def quotas(
        self, partitions: Sequence[Partition], valid: Sequence[int], content: Sequence[torch.Tensor], k: int
    ) -> torch.Tensor:
        """Phase 1: tokens per partition, worked out on the device of the attention.

        Args:
            partitions: The item's grids.
            valid: Candidates per partition.
            content: Per partition [T] attention at the content layer.
            k: Tokens to split.

        Returns:
            [partitions] int32, summing to ``k``.
        """
        device = content[0].device
        thumbnail = next((i for i, grid in enumerate(partitions) if grid.kind == "thumbnail"), None)
        if thumbnail is None:
            return counts_on(device, split(k, [float(n) for n in valid], valid))
        crops = [i for i in range(len(partitions)) if i != thumbnail]
        pool = sum(valid[i] for i in crops)
        base = min(math.floor(self.alpha * k), valid[thumbnail])
        base = max(base, k - pool)  # what the crops cannot hold goes back to the thumbnail
        under = moved(patches_under(partitions[thumbnail], [partitions[i] for i in crops]), device)
        weights = self._crop_content(content[thumbnail], under, len(crops))
        shares = quota(k - base, weights, counts_on(device, [valid[i] for i in crops]))
        return torch.cat([shares[:thumbnail], shares.new_full((1,), base), shares[thumbnail:]])

    def _crop_content(self, attention: torch.Tensor, under: torch.Tensor, crops: int) -> torch.Tensor:
        mass = attention.double()
        if self.content == "count":
            top = int(len(mass) * (1 - self.alpha)) if self.count_top is None else self.count_top
            hits = mass.argsort(descending=True, stable=True)[: max(top, 1)]  # unlike topk, ties go to the earlier
            mass = torch.zeros_like(mass).index_fill_(0, hits, 1.0)
        whole = whole_numbers(mass)  # the sums are the same in any order, on every device
        return whole.new_zeros(crops + 1).index_add_(0, under, whole)[:crops].double()


def patches_under(thumbnail: Partition, crops: Sequence[Partition]) -> torch.Tensor:
    """Which crop holds the centre of each thumbnail patch.

    Returns:
        [rows * cols] int64 (CPU) crop indices; ``len(crops)`` where no crop holds the centre.
    """
    return _patches_under(thumbnail, tuple(crops))


@lru_cache(maxsize=256)
def _patches_under(thumbnail: Partition, crops: tuple[Partition, ...]) -> torch.Tensor:
    left, top, right, bottom = thumbnail.box
    x = left + (torch.arange(thumbnail.cols, dtype=torch.double, device="cpu") + 0.5) / thumbnail.cols * (right - left)
    y = top + (torch.arange(thumbnail.rows, dtype=torch.double, device="cpu") + 0.5) / thumbnail.rows * (bottom - top)
    owner = torch.full((thumbnail.rows, thumbnail.cols), len(crops), device="cpu")
    for index, crop in enumerate(crops):
        inside = ((y >= crop.box[1]) & (y < crop.box[3]))[:, None] & ((x >= crop.box[0]) & (x < crop.box[2]))[None]
        owner[inside & (owner == len(crops))] = index
    return owner.flatten()
