"""SeGPruner: salient tokens, and among the rest those that are far from each other in the scene and in meaning.

SeGPruner, arXiv 2603.29437, from the formulas. A part of the tokens is chosen by the attention they receive in the
vision tower. Among the rest, farthest-point selection by a distance that is partly one of places in the world (from
depth, poses and intrinsics laid beside the prompt, see :meth:`vlm_budget.PatchHandle.views`), partly one of features.

Ours, for the paper chooses view by view and says nothing of views without geometry:

* ``scope="scene"`` makes one choice among all views, and what two views show is kept once: a token repeats one of
  another view that lies closer to it than a share (``repeats``) of its own spacing, the distance to its nearest
  neighbour in its view; of the two, the one of the finer spacing stays. Scores of pictures of different sizes are
  compared in multiples of their mean. ``scope="view"`` is the paper's.
* Tokens that lie nowhere come behind all that lie somewhere, and among themselves by features alone; where none lies
  anywhere, that is all there is.
* The share of salient tokens is not stated; 0.35 is that of a re-implementation by others (not verified).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch

from vlm_budget.errors import BudgetError, OptionError
from vlm_budget.ops import greedy_diversity
from vlm_budget.pruner import Attention, Context, Pruner, Selection, Tower, moved, unprojected


@dataclass(frozen=True, kw_only=True)
class SeGPruner(Pruner):
    """Salient tokens by received attention, diverse ones by place and meaning.

    Attributes:
        saliency_ratio: Share of the kept tokens that attention chooses, rounded down.
        weight: Share of the places in the distance (the paper's lambda): 0 is meaning alone, 1 places alone.
        scope: ``"scene"`` makes one choice among all views of a prompt; ``"view"`` one in each.
        repeats: Of a scene, a token closer to one of another view than this share of its spacing repeats it, and is
            only kept where all others are; 0 looks for none.
    """

    saliency_ratio: float = 0.35
    weight: float = 0.5
    scope: Literal["scene", "view"] = "scene"
    repeats: float = 0.5

    paper = "arXiv 2603.29437"
    reads_hidden = True
    reads_views = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        for name in ("saliency_ratio", "weight", "repeats"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
                raise OptionError(f"{name} must be a number in [0, 1], got {value!r}")
        if self.scope not in ("scene", "view"):
            raise OptionError(f"scope must be 'scene' or 'view', got {self.scope!r}")

    @property
    def joint(self) -> bool:
        """One choice among all views."""
        return self.scope == "scene"

    def needs(self, tower: Tower) -> tuple[Attention, ...]:
        """Attention received at the feature layer, class token or not."""
        return (Attention(tower.feature_layer, "received"),)

    def pick(self, ctx: Context, k: int) -> torch.Tensor:
        """Salient and diverse tokens of one view."""
        return self._choose([ctx], k)

    def pick_prompt(self, contexts: Sequence[Context], k: int) -> Selection:
        """Salient and diverse tokens of all views.

        Raises:
            BudgetError: ``newline="keep_all"`` leaves no room for a patch token.
        """
        ctx = contexts[0]
        separators = _end_to_end(contexts, [each.item.separators for each in contexts])
        patches = sum(len(each.item.candidates) for each in contexts)
        if self.newline == "keep_used_rows" and len(separators):
            return Selection(self._with_used_rows(contexts, ctx.there(separators), min(k, patches), k))
        reserved = len(separators) if self.newline == "keep_all" else max(0, k - patches)
        if reserved and k <= reserved:
            raise BudgetError(
                f"newline='keep_all' keeps {reserved} row separators, which leaves none of {k} tokens for the "
                f"pictures. The nearest feasible count is {reserved + 1}; or use newline='drop'."
            )
        keep = self._choose(contexts, k - reserved)
        return Selection(torch.cat([keep, ctx.there(separators[:reserved])]))

    def _with_used_rows(self, contexts: Sequence[Context], separators: torch.Tensor, most: int, k: int) -> torch.Tensor:
        """[k] the most patch tokens, by bisection, whose rows' separators still fit; waits for the device at each step.

        What is left over goes to the separators of unused rows.
        """
        lines, start = [], 0
        for each in contexts:
            lines.append(torch.where(each.item.line < 0, -1, each.item.line + start))
            start += int(each.item.line.max()) + 1
        line = contexts[0].there(torch.cat(lines))
        low, high = max(1, k - len(separators)), most  # with ``low``, there is room for every separator
        chosen = self._choose(contexts, low)
        while low < high:
            middle = (low + high + 1) // 2
            picked = self._choose(contexts, middle)
            if int(torch.isin(line[separators], line[picked]).sum()) <= k - middle:
                low, chosen = middle, picked
            else:
                high = middle - 1
        unused = ~torch.isin(line[separators], line[chosen])
        return torch.cat([chosen, separators[unused.long().argsort(stable=True)][: k - low]])

    def _choose(self, contexts: Sequence[Context], k: int) -> torch.Tensor:
        """[k] positions among the tokens of the items laid end to end."""
        ctx = contexts[0]
        need = next(iter(ctx.attention))
        # Rows before the projector are compared with their like only: items that are resampled behind it have none.
        bare = len({each.project is unprojected for each in contexts}) > 1
        features = torch.cat(
            [(each.features if bare or each.hidden is None else each.hidden)[each.candidates] for each in contexts]
        )
        scores = torch.cat([_in_means(each, need)[each.candidates] for each in contexts])
        tokens = ctx.there(_end_to_end(contexts, [each.item.candidates for each in contexts]))
        xyz = _places(contexts)
        if xyz is None or not self.joint or not self.repeats:
            return tokens[choose(features, scores, xyz, k, self.saliency_ratio, self.weight)]
        again = repeated(xyz, [len(each.item.candidates) for each in contexts], self.repeats)
        chosen, wanted = [], k
        for kind in ((~again).nonzero().flatten(), again.nonzero().flatten()):
            mine, count = ctx.there(kind), min(wanted, len(kind))
            if count:
                ranked = choose(features[mine], scores[mine], xyz[kind], count, self.saliency_ratio, self.weight)
                chosen.append(mine[ranked])
            wanted -= count
        return tokens[torch.cat(chosen)]


def repeated(xyz: torch.Tensor, sizes: Sequence[int], share: float) -> torch.Tensor:
    """Which tokens show a place that another view shows as finely or finer.

    Args:
        xyz: [n, 3] on the CPU, view after view, NaN where a token lies nowhere.
        sizes: Tokens of every view.
        share: Of a token's spacing, within which a token of another view is at the same place.

    Returns:
        [n] bool. Of tokens at one place and equally fine, the first is no repetition.
    """
    view = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), torch.tensor(sizes, device="cpu"))
    places = xyz.double()
    lies = places.isfinite().all(1)
    places = places - places[lies].mean(0)  # squares of small numbers are exact enough
    spacing = torch.cat([_spacing(part) for part in places.split(list(sizes))])
    reach = torch.where(spacing.isfinite(), share * spacing, -1)  # a view's only token repeats nothing
    squares = places.square().sum(1)
    again = torch.zeros(len(xyz), dtype=torch.bool, device="cpu")
    for index, mine in enumerate(torch.arange(len(xyz), device="cpu").split(list(sizes))):
        apart = torch.addmm(squares, places[mine], places.T, alpha=-2).add_(
            squares[mine, None]
        )  # NaN where one lies not
        one, other = (apart < (reach[mine] * reach[mine].abs())[:, None]).nonzero().unbind(1)
        one = mine[one]
        finer = (spacing[other] < spacing[one]) | ((spacing[other] == spacing[one]) & (other < one))
        again[one[finer & (view[other] != index)]] = True
    return again


def _spacing(places: torch.Tensor) -> torch.Tensor:
    """[m] distance of every token of a view to its nearest neighbour; infinite or NaN where there is none."""
    if len(places) < 2:
        return places.new_full((len(places),), math.inf)
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    return apart.nan_to_num(math.inf, posinf=math.inf).amin(1)


def choose(
    features: torch.Tensor, scores: torch.Tensor, xyz: torch.Tensor | None, k: int, ratio: float, weight: float
) -> torch.Tensor:
    """Salient and diverse tokens of a set.

    Args:
        features: [n, C].
        scores: [n] saliency.
        xyz: [n, 3] on the CPU, so that the host knows how many lie somewhere; NaN for those that do not. None where
            none does.
        k: How many, at most n.
        ratio: Share chosen by saliency.
        weight: Share of the places in the distance.

    Returns:
        [k] int64 indices, in the order of choice.
    """
    ranked = scores.argsort(descending=True, stable=True)
    salient, rest = ranked.split([n := int(k * ratio), len(ranked) - n])
    located = torch.zeros(0, device="cpu") if xyz is None else xyz.isfinite().all(1)
    count = int(located.sum())
    if xyz is None or not count or not weight:
        return torch.cat([salient, rest[greedy_diversity(features[rest], k - n, seed=0)]])
    there = moved(xyz, features.device)[rest]
    if count == len(ranked):
        spread = _by_place(features[rest], there, k - n, weight)
    else:
        spread = diverse(features[rest], there, moved(located, features.device)[rest], count, k - n, weight, count - n)
    return torch.cat([salient, rest[spread]])


def diverse(
    features: torch.Tensor, xyz: torch.Tensor, located: torch.Tensor, most: int, k: int, weight: float, spare: int
) -> torch.Tensor:
    """Farthest tokens first where only some lie somewhere: these by place and meaning, then the others by meaning.

    How many lie somewhere the device alone knows, so both choices are made among all tokens, with copies of its first
    one in the place of those that are not concerned.

    Args:
        features: [m, C], the most salient token first.
        xyz: [m, 3].
        located: [m] bool, which lie somewhere.
        most: At most so many do.
        k: How many, at most m.
        weight: Share of the places in the distance.
        spare: At least so many do (any number below 0: none).

    Returns:
        [k] int64 indices.
    """
    size, device = len(located), features.device
    order = (~located).long().argsort(stable=True)  # of equally far tokens, copies come last
    located, features, xyz = located[order], features[order], xyz[order]
    rank = torch.arange(size, device=device)
    there = rank.where(located, 0)
    first = _by_place(features[there], xyz[there], min(k, most), weight)
    # Who was not chosen comes behind those of its kind that were: it is only wanted where copies were chosen.
    key = torch.where(located, size + rank, 3 * size + rank)
    key = key.scatter(0, first, torch.where(located[first], rank[: len(first)], key[first]))
    if k > spare:
        start = located.sum().clamp_max(size - 1)
        second = greedy_diversity(features[rank.where(~located, start)], min(k, size), seed=start)
        key = key.scatter(0, second, torch.where(located[second], key[second], 2 * size + rank[: len(second)]))
    return order[key.argsort()[:k]]


def _by_place(features: torch.Tensor, xyz: torch.Tensor, k: int, weight: float) -> torch.Tensor:
    return greedy_diversity(None if weight == 1 else features, k, xyz=xyz, seed=0, weight=weight)


def _in_means(ctx: Context, need: Attention) -> torch.Tensor:
    """[n] scores in multiples of what every token of the grid would have if all were alike."""
    sizes = torch.tensor([float(grid.rows * grid.cols) for grid in ctx.item.partitions], device="cpu")
    return ctx.there(ctx.token_scores(need)) * ctx.there(sizes[ctx.item.partition])


def _places(contexts: Sequence[Context]) -> torch.Tensor | None:
    """[m, 3] of the candidates of all items; NaN for those of items that were laid nowhere."""
    if all(ctx.xyz is None for ctx in contexts):
        return None
    tables = [
        torch.full((ctx.item.size, 3), float("nan"), device="cpu") if ctx.xyz is None else ctx.xyz for ctx in contexts
    ]
    return torch.cat([table[ctx.item.candidates] for ctx, table in zip(contexts, tables, strict=True)])


def _end_to_end(contexts: Sequence[Context], positions: Sequence[torch.Tensor]) -> torch.Tensor:
    """[m] positions within the items to those within all of them."""
    starts = [0]
    for ctx in contexts[:-1]:
        starts.append(starts[-1] + ctx.item.size)
    return torch.cat([own + start for own, start in zip(positions, starts, strict=True)])
