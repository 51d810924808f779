"""SparseVLM: visual tokens that the text tokens concerned with the picture look at, dropped at three depths.

SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv 2410.04417 (ICML 2025), from
the paper and the released settings. Raters are the instruction tokens whose mean over the visual tokens of
``softmax_t(H_v H_t^T)``, on the embeddings that entered the language model, exceeds the mean. Score: attention of the
raters, mean over heads and raters, in the layer before the drop.

Version 1 recycles: of the dropped tokens the best 30 % are clustered (DPC-kNN, one cluster per ten and one more), and
each cluster's mean goes on in the place of its centre. Positions are renumbered. Version 2 (SparseVLM+) merges nothing
and keeps positions; it divides the logits by what rotary positions alone would give (the bias of all-ones queries and
keys), and listens only to the 14 of 32 heads that look at the picture most.

Drops are at the input of layers 2, 6 and 15 of 32. The source counts the layers whose attention ranks, "2, 6, 15"; read
from 1, so that layers 2, 6 and 15 counted from 0 see fewer, the released keep lists average to the 192, 128, 96 and 64
tokens they are named after, recycled tokens included (192.0, 128.6, 96.9, 64.8); read from 0 they do not (206.5, ...).

How many raters there are is for the device to say, for which the host waits at every step and item.

Where this differs:

* Any budget: the released lists are joined by straight lines, below the least and above the largest list towards none
  and all. Two counts of the lists that fall while the budget grows are levelled. Sums are exact.
* A count includes the recycled tokens; at most half of a count are clusters.
* The rank test that lets the paper skip a layer is not built; the released code has lists instead.
* Raters are sought behind the last visual token: text in front of it cannot look at it. Each step weighs them against
  the visual tokens still there.
* Neighbours in DPC-kNN are 5 (the source at hand does not say); version 2's bias is at least 0.1, for far tokens, where
  it swings around zero.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch

from vlm_budget.decoder import DecoderContext, DecoderPruner, Step, received_from
from vlm_budget.errors import OptionError, PatchError
from vlm_budget.pruner import Positions, Selection
from vlm_budget.schedules import check_stages, fixed_stages, solved_stages, stage_layers

# Tokens of 576 that go on at each stage, recycled ones included: from [66, 30, 17], [238, 48, 26], [303, 110, 36] and
# [300, 200, 110] of the released lists, where 303 was made 300 for a count that never falls.
_LISTS_1 = ((0, 0, 0), (82, 32, 18), (249, 55, 27), (309, 117, 39), (309, 204, 113), (576, 576, 576))
# As released, where 246 in the third was made 238.
_LISTS_2 = ((0, 0, 0), (66, 34, 20), (238, 54, 28), (238, 108, 60), (300, 200, 118), (576, 576, 576))
_POSITIONS: dict[int, Positions] = {1: "packed", 2: "original"}
_HEADS = 14 / 32
_LEAST_BIAS = 0.1
_NEIGHBOURS = 5
_ROWS = 64  # attention rows held at a time


@dataclass(frozen=True, kw_only=True)
class SparseVLM(DecoderPruner):
    """Keep what the raters attend to, in three steps.

    Attributes:
        version: 1 recycles dropped tokens; 2 (SparseVLM+) corrects the attention instead, for 1-D rotary positions.
        positions: None takes the version's: ``"packed"`` for 1, ``"original"`` for 2.
        at: Where stages begin, as shares of the depth; each goes to the nearest layer that may drop.
        ratios: Share of all visual tokens that each stage keeps; the method then takes no budget. None: the released
            lists, joined and scaled to the budget; they need three stages.
    """

    version: int = 1
    positions: Positions | None = None  # type: ignore[assignment]  # a str once constructed
    at: tuple[float, ...] = (2 / 32, 6 / 32, 15 / 32)
    ratios: tuple[float, ...] | None = None

    paper = "arXiv 2410.04417"
    merges: ClassVar[bool] = True  # version 1

    def __post_init__(self) -> None:
        """Check the version and the stages; fill in the version's positions."""
        if isinstance(self.version, bool) or not isinstance(self.version, int) or self.version not in _POSITIONS:
            raise OptionError(f"version must be 1 or 2, got {self.version!r}")
        if self.positions is None:
            object.__setattr__(self, "positions", _POSITIONS[self.version])
        super().__post_init__()
        at, ratios = check_stages(self.at, self.ratios)
        if ratios is None and len(at) != 3:
            raise OptionError(f"the released lists have three stages, at has {len(at)}; pass ratios for other numbers")
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "ratios", ratios)

    def __str__(self) -> str:
        """The constructor call; positions are left out where they are the version's."""
        asked = copy.copy(self)
        if self.positions == _POSITIONS[self.version]:
            object.__setattr__(asked, "positions", None)
        return super(SparseVLM, asked).__str__()

    @property
    def fixed(self) -> bool:
        """``ratios`` say how many stay."""
        return self.ratios is not None

    def schedule(self, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """One step per stage."""
        return self.schedule_behind(1, tokens, spend, layers)

    def schedule_behind(self, first: int, tokens: int, spend: int | None, layers: int) -> tuple[Step, ...]:
        """The same; stages that would begin before layer ``first`` begin there."""
        if self.ratios is not None:
            return fixed_stages(self, self.at, self.ratios, tokens, layers, first)
        assert spend is not None
        return solved_stages(self, stage_layers(self, self.at, layers, first), self.curve, tokens, spend, layers)

    def curve(self, parameter: float) -> list[float]:
        """Share of all visual tokens per stage, on the straight lines that join the lists from none (0) to all (1)."""
        lists = _LISTS_1 if self.version == 1 else _LISTS_2
        place = parameter * (len(lists) - 1)
        lower = min(int(place), len(lists) - 2)
        part = place - lower
        return [(a + (b - a) * part) / 576 for a, b in zip(lists[lower], lists[lower + 1], strict=True)]

    def pick(self, ctx: DecoderContext, k: int) -> torch.Tensor | Selection:  # type: ignore[override]
        """Top ``k`` by the raters' attention; in version 1 a few of them are cluster means instead."""
        rows = raters(ctx)
        if self.version == 2:
            return _without_gravity(ctx, rows).argsort(descending=True, stable=True)[:k]
        order = received_from(ctx, rows).argsort(descending=True, stable=True)
        clusters = cluster_count(len(order), k)
        if not clusters:
            return order[:k]
        recycled = order[k - clusters :][: _recyclable(len(order) - k + clusters)]
        states = ctx.hidden[ctx.columns]
        centres, means = cluster_means(states[recycled], clusters)
        keep, by_index = torch.cat([order[: k - clusters], recycled[centres]]).sort()
        values = torch.cat([states[order[: k - clusters]], means])
        return Selection(keep, values[by_index])


def raters(ctx: DecoderContext) -> torch.Tensor:
    """Columns of the text tokens that weigh in on the visual ones more than the mean; all where none stands out."""
    text = ctx.readers
    relevance = (ctx.embeds[ctx.visual].float() @ ctx.embeds[text].float().T).softmax(-1).mean(0)
    above = (relevance > relevance.mean()).nonzero()[:, 0]  # the host waits for their number
    return text[above] if len(above) else text


def _recyclable(dropped: int) -> int:
    return 3 * dropped // 10


def cluster_count(tokens: int, k: int) -> int:
    """How many of ``k`` survivors of ``tokens`` are clusters: one per ten recycled tokens and one more, at most half.

    With ``c`` clusters, ``k - c`` tokens stay as they are, and 30 % of the rest are recycled.
    """
    clusters = 0
    while clusters < k // 2:
        recycled = _recyclable(tokens - k + clusters)
        if clusters >= (recycled // 10 + 1 if recycled else 0):
            break
        clusters += 1
    return clusters


def cluster_means(states: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Density peak clustering by k nearest neighbours (DPC-kNN).

    Density of a token: ``exp(-mean of squared distances to its nearest neighbours)``, distances over ``sqrt(D)``. Peaks
    have the largest density times distance to the nearest token of higher density; every token joins its nearest peak.

    Args:
        states: [r, D] hidden states.
        clusters: How many, at most r.

    Returns:
        [clusters] int64 indices of the centres, and [clusters, D] means of their members, in the dtype of ``states``.
    """
    count, width = states.shape
    points = states.float()
    points = points - points.mean(0)  # what all share only costs digits
    gap = torch.cdist(points, points) / width**0.5
    gap.fill_diagonal_(torch.inf)
    neighbours = min(_NEIGHBOURS, count - 1)
    density = -gap.topk(neighbours, largest=False).values.square().sum(1) / max(neighbours, 1)  # its logarithm
    gap.fill_diagonal_(0)
    rank = torch.empty_like(density, dtype=torch.long)
    rank[density.argsort(descending=True, stable=True)] = torch.arange(count, device=states.device)
    to_denser = gap.masked_fill(rank[None] >= rank[:, None], torch.inf).amin(1)
    to_denser = torch.where(rank == 0, gap.max(), to_denser)
    centres = (density + to_denser.log()).argsort(descending=True, stable=True)[:clusters]
    nearest = gap[:, centres].argmin(1)
    nearest[centres] = torch.arange(clusters, device=states.device)  # also where two centres coincide
    members = torch.nn.functional.one_hot(nearest, clusters).T.float()
    return centres, (members @ states.float() / members.sum(1, keepdim=True)).to(states.dtype)


def _without_gravity(ctx: DecoderContext, rows: torch.Tensor) -> torch.Tensor:
    """[m] float32 attention from ``rows`` with the logits over the all-ones bias, mean over the most visual heads."""
    seen = ctx.captured
    assert seen is not None
    if seen.cos is None or seen.sin is None:
        raise PatchError(
            "SparseVLM(version=2) divides out 1-D rotary positions, and this model's positions have several axes "
            "(M-RoPE). Use version=1."
        )
    cos, sin = seen.cos.float(), seen.sin.float()
    sums, mass = [], []
    for part in rows.split(_ROWS):
        # (R_i 1) . (R_j 1) / d: of every pair the sines and cosines of the distance, the sines cancel.
        bias = (cos[part] @ cos.T + sin[part] @ sin.T) / cos.shape[-1]
        attention = (seen.logits(part) / bias.clamp_min(_LEAST_BIAS)).softmax(-1)
        sums.append(attention[..., ctx.columns].sum(1))
        mass.append(attention[..., ctx.visual].sum((1, 2)))
    visual = torch.stack(mass).sum(0)
    heads = visual.argsort(descending=True, stable=True)[: max(1, round(len(visual) * _HEADS))]
    return torch.stack(sums).sum(0)[heads].mean(0) / len(rows)
