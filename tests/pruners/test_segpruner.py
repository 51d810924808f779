"""SeGPruner: salient tokens, and others far apart in the scene and in meaning; what two views show is kept once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from pretend_device import PretendDevice
from vlm_budget.errors import BudgetError, OptionError
from vlm_budget.geometry import token_coordinates
from vlm_budget.layout import VisualItem
from vlm_budget.pruner import Attention, Context, unprojected
from vlm_budget.pruners.segpruner import SeGPruner, choose, repeated

NEED = Attention(22, "received")
NOWHERE = [math.nan] * 3


def view(item: VisualItem, seed: int = 0, xyz: torch.Tensor | None = None, order: int = 0) -> Context:
    """Random scores and features; tokens at random places unless they are given."""
    generator = torch.Generator().manual_seed(100 + seed)
    places = torch.randn(item.size, 3, generator=generator) if xyz is None else xyz.clone()
    places[item.separators] = math.nan
    ctx = make.context(item, make.random_attention(SeGPruner(), item, seed), order, width=16)
    hidden = torch.randn(item.size, 16, generator=generator) * (item.partition >= 0)[:, None]
    return replace(ctx, hidden=hidden, xyz=places)


def views(count: int, side: int = 3, newline: bool = False) -> list[Context]:
    return [view(make.single(side, newline=newline), seed, order=seed) for seed in range(count)]


def farthest(
    features: torch.Tensor, xyz: torch.Tensor | None, tokens: Sequence[int], k: int, weight: float
) -> list[int]:
    """Eq. 4 to 9 with loops: the first of ``tokens`` is the seed."""
    if not k:
        return []

    unit = torch.nn.functional.normalize(features[tokens].double(), dim=1)
    apart = 1 - unit @ unit.T
    if xyz is not None:
        space = torch.cdist(xyz[tokens].double(), xyz[tokens].double(), compute_mode="donot_use_mm_for_euclid_dist")
        apart = weight * space / max(float(space[0].max()), 1e-6) + (1 - weight) * apart
    table, chosen = apart.tolist(), [0]
    while len(chosen) < k:
        left = [place for place in range(len(tokens)) if place not in chosen]
        chosen.append(max(left, key=lambda place: min(table[place][other] for other in chosen)))
    return [tokens[place] for place in chosen]


def slowly(features: torch.Tensor, scores: torch.Tensor, xyz: torch.Tensor, k: int, pruner: SeGPruner) -> list[int]:
    """The whole method over one set of tokens."""
    ranked = sorted(range(len(scores)), key=lambda token: (-float(scores[token]), token))
    salient = int(k * pruner.saliency_ratio)
    rest, wanted = ranked[salient:], k - salient
    located = [token for token in rest if bool(xyz[token].isfinite().all())]
    if not pruner.weight or not located:
        return ranked[:salient] + farthest(features, None, rest, wanted, 0)
    others = [token for token in rest if token not in located]
    first = farthest(features, xyz, located, min(wanted, len(located)), pruner.weight)
    return ranked[:salient] + first + farthest(features, None, others, wanted - len(first), 0)


def candidates_of(contexts: Sequence[Context]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Features, scores, places and positions of all candidates of a prompt."""
    rows: list[list[torch.Tensor]] = [[], [], []]
    positions, start = [], 0
    for ctx in contexts:
        own = ctx.item.candidates
        tokens = torch.tensor([grid.rows * grid.cols for grid in ctx.item.partitions])[ctx.item.partition[own]]
        assert ctx.hidden is not None
        places = torch.full((ctx.item.size, 3), math.nan) if ctx.xyz is None else ctx.xyz
        for column, values in zip(rows, (ctx.hidden, ctx.token_scores(NEED), places), strict=True):
            column.append(values[own])
        rows[1][-1] = rows[1][-1] * tokens
        positions += (own + start).tolist()
        start += ctx.item.size
    features, scores, xyz = (torch.cat(column) for column in rows)
    return features, scores, xyz, positions


def scene(contexts: Sequence[Context], k: int, pruner: SeGPruner) -> list[int]:
    *known, positions = candidates_of(contexts)
    return sorted(positions[token] for token in slowly(*known, k, pruner))


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("ratio", [0, 0.35, 1])
def test_a_view_follows_the_formulas(ratio: float, weight: float) -> None:
    pruner = SeGPruner(saliency_ratio=ratio, weight=weight, scope="view")
    for item in (make.single(1), make.single(4, 5, newline=True), make.anyres(1, 2, side=3)):
        ctx = view(item)
        for k in {1, len(item.candidates) // 3 or 1, len(item.candidates)}:
            assert pruner.select(ctx, k).keep.tolist() == scene([ctx], k, pruner)


@pytest.mark.parametrize("weight", [0, 0.5, 1])
@pytest.mark.parametrize("ratio", [0, 0.35, 1])
def test_a_scene_is_one_set_of_tokens(ratio: float, weight: float) -> None:
    pruner = SeGPruner(saliency_ratio=ratio, weight=weight, repeats=0)
    contexts = [*views(3), view(make.single(2, 5), 7, order=3)]
    for k in (1, 5, 17, 36):
        assert pruner.select_prompt(contexts, k).keep.tolist() == scene(contexts, k, pruner)


@given(st.integers(1, 16), st.data(), st.sampled_from([0, 0.4, 1]), st.sampled_from([0.0, 0.5, 1.0]))
def test_tokens_that_lie_nowhere_come_last(size: int, data: st.DataObject, ratio: float, weight: float) -> None:
    k = data.draw(st.integers(1, size))
    there = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    generator = torch.Generator().manual_seed(size)
    features, scores = torch.randn(size, 8, generator=generator), torch.rand(size, generator=generator)
    xyz = torch.randn(size, 3, generator=generator).where(there[:, None], math.nan)
    found = choose(features, scores, xyz, k, ratio, weight)
    pruner = SeGPruner(saliency_ratio=ratio, weight=weight)
    assert found.tolist() == slowly(features, scores, xyz, k, pruner)


@given(st.integers(2, 20), st.data())
def test_copies_never_stand_before_what_lies_somewhere(size: int, data: st.DataObject) -> None:
    """Few places and few meanings, so that most distances are ties; the counts must hold all the same."""
    k = data.draw(st.integers(1, size))
    kinds = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)))
    features, scores = torch.randn(3, 4)[kinds], torch.ones(size)
    xyz = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], NOWHERE])[kinds]
    found = choose(features, scores, xyz, k, 0, 0.5)
    assert len(found.unique()) == k
    there = int((kinds < 2).sum())
    assert int((kinds[found] < 2).sum()) == min(k, there)


def test_without_geometry_meaning_alone_counts() -> None:
    contexts = views(3)
    pruner = SeGPruner(weight=0.7)
    bare = [replace(ctx, xyz=None) for ctx in contexts]
    unknown = [replace(ctx, xyz=torch.full_like(ctx.xyz, math.nan)) for ctx in contexts]  # type: ignore[arg-type]
    expected = SeGPruner(weight=0, repeats=0).select_prompt(contexts, 9).keep
    for given_ in (bare, unknown):
        assert torch.equal(pruner.select_prompt(given_, 9).keep, expected)
    assert not torch.equal(pruner.select_prompt(contexts, 9).keep, expected)


def test_a_view_without_geometry_is_only_asked_when_the_others_are_used_up() -> None:
    contexts = views(3)
    for xyz in (None, torch.full((9, 3), math.nan)):
        mixed = [contexts[0], replace(contexts[1], xyz=xyz), contexts[2]]
        pruner = SeGPruner(saliency_ratio=0, repeats=0)
        for k in (4, 18):
            assert not ((pruner.select_prompt(mixed, k).keep // 9) == 1).any()
        assert ((pruner.select_prompt(mixed, 20).keep // 9) == 1).sum() == 2


# --- what the weight means -------------------------------------------------------------------------------------------


def test_at_zero_places_do_not_matter_and_at_one_nothing_else_does() -> None:
    contexts = views(4)
    other = [replace(ctx, xyz=ctx.xyz.flip(0)) for ctx in contexts]  # type: ignore[union-attr]
    renamed = [replace(ctx, hidden=ctx.hidden.flip(0)) for ctx in contexts]  # type: ignore[union-attr]
    by = {weight: SeGPruner(weight=weight, saliency_ratio=0, repeats=0) for weight in (0, 0.5, 1)}
    keep = {weight: pruner.select_prompt(contexts, 10).keep for weight, pruner in by.items()}
    for weight, changed, same in ((0, other, True), (0, renamed, False), (1, other, False), (1, renamed, True)):
        found = by[weight].select_prompt(changed, 10).keep
        assert torch.equal(found, keep[weight]) == same
    assert not torch.equal(keep[0], keep[0.5]) and not torch.equal(keep[0.5], keep[1])


def test_at_one_it_is_farthest_point_sampling_in_space() -> None:
    *_, xyz, positions = candidates_of(contexts := views(3))
    scores = candidates_of(contexts)[1]
    chosen = [int(scores.argmax())]
    while len(chosen) < 8:
        chosen.append(int(torch.cdist(xyz, xyz[chosen]).amin(1).argmax()))
    found = SeGPruner(weight=1, saliency_ratio=0, repeats=0).select_prompt(contexts, 8).keep
    assert found.tolist() == sorted(positions[token] for token in chosen)


# --- scenes ----------------------------------------------------------------------------------------------------------


def test_the_only_token_of_a_view_that_lies_somewhere_repeats_nothing() -> None:
    xyz = torch.full((8, 3), math.nan)
    xyz[:4] = torch.eye(4)[:, :3]
    xyz[6] = torch.tensor([50.0, 0, 0])
    assert not repeated(xyz, [4, 4], 0.5).any()


def plane_view(item: VisualItem, distance: float, right: float = 0.0) -> torch.Tensor:
    """Places on a wall so far ahead of a camera that stands so far to the right."""
    pose = torch.eye(4)
    pose[0, 3] = right
    intrinsics = torch.tensor([[20.0, 0, 11.5], [0, 20.0, 11.5], [0, 0, 1]])
    return token_coordinates(item, torch.full((24, 24), distance), pose, intrinsics)


def test_of_two_planes_both_are_covered_however_alike_their_tokens_look() -> None:
    """A wall near by and one far away, in two views; variety is all on the first."""
    item = make.single(6)
    near, far = (view(item, 3, plane_view(item, distance), order) for order, distance in ((0, 1.0), (1, 8.0)))
    alike = torch.ones(36, 16) + 1e-3 * torch.randn(36, 16, generator=torch.Generator().manual_seed(1))
    far = replace(far, hidden=alike)
    corners = {36, 41, 66, 71}
    for k in (4, 8, 24):
        kept = set(SeGPruner(saliency_ratio=0, weight=0.5).select_prompt([near, far], k).keep.tolist())
        blind = SeGPruner(saliency_ratio=0, weight=0).select_prompt([near, far], k).keep
        assert kept & set(range(36)) and kept & corners
        assert int((blind >= 36).sum()) <= 1
    assert corners <= kept
    whole = SeGPruner(saliency_ratio=0, weight=1).select_prompt([far], 12).keep
    assert {0, 5, 30, 35} <= set(whole.tolist())


def test_what_a_second_view_repeats_is_kept_once() -> None:
    """By neither stage, until there is nothing else."""
    item = make.single(5)
    one, other = view(item, 1), view(item, 2, order=1)
    again = replace(one, order=2)
    assert one.xyz is not None and other.xyz is not None
    new = int((~repeated(torch.cat([one.xyz, other.xyz]), [25, 25], 0.5)).sum())
    assert 25 < new <= 50
    for pruner in (SeGPruner(), SeGPruner(saliency_ratio=0), SeGPruner(saliency_ratio=1)):
        for k in (5, 20, new):
            kept = pruner.select_prompt([one, other, again], k).keep
            assert torch.equal(kept, pruner.select_prompt([one, other], k).keep), "nothing of the copy"
        assert (pruner.select_prompt([one, other, again], new + 3).keep < 75).sum() == new + 3
    # View by view, every view is given as much.
    by_view = SeGPruner(saliency_ratio=0, scope="view")
    assert torch.equal(by_view.select(again, 6).keep, by_view.select(one, 6).keep)


@pytest.mark.parametrize("sizes", [[9, 9, 9], [1, 16, 4], [7], [1, 1], [12, 0, 3]])
@pytest.mark.parametrize("share", [0.25, 0.5, 2.0])
def test_a_repetition_is_closer_to_a_finer_token_than_to_its_neighbours(sizes: list[int], share: float) -> None:
    made = torch.Generator().manual_seed(sum(sizes))
    scale = torch.cat([torch.full((size, 1), 0.5 + index) for index, size in enumerate(sizes)])
    xyz = torch.rand(sum(sizes), 3, generator=made) * scale
    xyz[1::7] = math.nan
    owner = [index for index, size in enumerate(sizes) for _ in range(size)]

    def apart(one: int, two: int) -> float:
        distance = math.dist(xyz[one].tolist(), xyz[two].tolist())
        return math.inf if math.isnan(distance) else distance

    tokens = range(len(xyz))
    spacing = [min((apart(i, j) for j in tokens if j != i and owner[j] == owner[i]), default=math.inf) for i in tokens]
    slow = [
        any(
            owner[j] != owner[i] and apart(i, j) < share * spacing[i] and (spacing[j], j) < (spacing[i], i)
            for j in tokens
        )
        and math.isfinite(spacing[i])
        for i in tokens
    ]
    assert repeated(xyz, sizes, share).tolist() == slow


def test_the_same_wall_from_two_places_is_covered_once() -> None:
    """The second camera stands so that half of what it sees the first has seen."""
    item = make.single(6)
    near, beside = (view(item, 4, plane_view(item, 5.0, right), order) for order, right in ((0, 0.0), (1, 3.0)))
    assert near.xyz is not None and beside.xyz is not None
    seen = {tuple(place) for place in near.xyz.mul(100).round().tolist()}
    twice = torch.tensor([tuple(place) in seen for place in beside.xyz.mul(100).round().tolist()])
    assert int(twice.sum()) == 18
    both = repeated(torch.cat([near.xyz, beside.xyz]), [36, 36], 0.5)
    assert both.sum() == 18
    kept = SeGPruner(saliency_ratio=0, weight=1, repeats=0).select_prompt([near, beside], 54).keep
    places = torch.cat([near.xyz, beside.xyz])[kept].mul(100).round()
    assert len(places.unique(dim=0)) == 54, "36 and the new half of 36"


def test_views_on_their_own_do_not_ask_for_their_order() -> None:
    contexts = views(4)
    pruner = SeGPruner(scope="view")
    alone = [pruner.select(ctx, 4).keep for ctx in contexts]
    for order in ((3, 1, 0, 2), (2, 3, 1, 0)):
        for place, index in enumerate(order):
            moved = replace(contexts[index], order=place)
            assert torch.equal(pruner.select(moved, 4).keep, alone[index])


@pytest.mark.parametrize("weight", [0, 0.5, 1])
def test_a_scene_does_not_ask_for_the_order_of_its_views_either(weight: float) -> None:
    contexts = views(4)
    pruner = SeGPruner(weight=weight)
    kept = pruner.select_prompt(contexts, 13).keep
    order = [2, 0, 3, 1]
    again = pruner.select_prompt([contexts[index] for index in order], 13).keep
    assert sorted(order[token // 9] * 9 + token % 9 for token in again.tolist()) == kept.tolist()


def test_scores_of_pictures_of_different_sizes_are_compared_by_their_means() -> None:
    """A score is a share of its picture's attention: of a small picture, each has more."""
    small, large = make.single(2), make.single(8)
    flat = [
        replace(view(item, order), attention={NEED: [torch.full((item.size,), 1 / item.size)]})
        for order, item in enumerate((small, large))
    ]
    attention = flat[1].attention[NEED][0].clone()
    attention[37] *= 2
    flat[1] = replace(flat[1], attention={NEED: [attention]})
    assert SeGPruner(saliency_ratio=1).select_prompt(flat, 1).keep.tolist() == [4 + 37]


def test_the_host_waits_for_nothing_wherever_tokens_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a choice is made, the device alone knows which tokens are left; the references may wait, kernels do not."""
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")
    generator = torch.Generator().manual_seed(0)
    features, scores = torch.randn(30, 8, generator=generator), torch.rand(30, generator=generator)
    xyz = torch.randn(30, 3, generator=generator)
    somewhere = torch.rand(30, generator=generator) < 0.5
    places = [None, xyz, xyz.where(somewhere[:, None], math.nan), torch.full_like(xyz, math.nan)]
    expected = [choose(features, scores, known, k, 0.3, 0.5) for known in places for k in (5, 12, 28)]
    with torch.no_grad(), PretendDevice(("vlm_budget", __name__)) as device:
        features, scores = features.to("cuda"), scores.to("cuda")
        with device.watch() as found:
            chosen = [choose(features, scores, known, k, 0.3, 0.5) for known in places for k in (5, 12, 28)]
        waits = [wait for wait in found if not wait.by.reference]
        assert not waits, waits
        assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(chosen, expected, strict=True))


# --- counts, separators, options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["drop", "keep_all"])
@pytest.mark.parametrize("known", [True, False])
def test_every_count_is_met_exactly(newline: Any, known: bool) -> None:
    contexts = views(3, side=2, newline=True)
    contexts.append(replace(view(make.anyres(1, 2, side=2), 5, order=3), xyz=None))
    if not known:
        contexts = [replace(ctx, xyz=None) for ctx in contexts]
    total = sum(ctx.item.size for ctx in contexts)
    separators, start = [], 0
    for ctx in contexts:
        separators += (ctx.item.separators + start).tolist()
        start += ctx.item.size
    pruner = SeGPruner(newline=newline)
    least = len(separators) + 1 if newline == "keep_all" else 1
    for k in range(least, total):
        keep = pruner.select_prompt(contexts, k).keep
        assert keep.dtype == torch.int64 and len(keep.unique()) == k and torch.equal(keep, keep.sort().values)
        kept = len(set(keep.tolist()) & set(separators))
        assert kept == (len(separators) if newline == "keep_all" else max(0, k - (total - len(separators))))
        assert torch.equal(pruner.select_prompt(contexts, k).keep, keep)


def test_separators_that_take_all_the_room_are_refused() -> None:
    contexts = views(3, side=2, newline=True)
    with pytest.raises(BudgetError, match=r"keeps 3 row separators.*nearest feasible count is 4"):
        SeGPruner(newline="keep_all").select_prompt(contexts, 3)


def test_items_resampled_behind_the_projector_are_compared_by_their_features() -> None:
    """The rows of the one and the features of the other are no things to compare."""
    contexts = views(2)
    resampled = replace(contexts[1], hidden=contexts[1].features, project=unprojected)
    pruner = SeGPruner(saliency_ratio=0)
    found = pruner.select_prompt([contexts[0], resampled], 7).keep
    plain = [replace(ctx, hidden=ctx.features) for ctx in contexts]
    assert torch.equal(found, pruner.select_prompt(plain, 7).keep)
    wide = replace(resampled, hidden=torch.randn(9, 5))
    assert torch.equal(found, pruner.select_prompt([contexts[0], wide], 7).keep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saliency_ratio": 1.1}, r"saliency_ratio must be a number in \[0, 1\], got 1.1"),
        ({"saliency_ratio": "0.3"}, "saliency_ratio must be a number"),
        ({"weight": -0.1}, r"weight must be a number in \[0, 1\], got -0.1"),
        ({"weight": True}, "weight must be a number"),
        ({"weight": math.nan}, "weight must be a number"),
        ({"scope": "room"}, "scope must be 'scene' or 'view', got 'room'"),
        ({"repeats": -0.1}, "repeats must be a number"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SeGPruner(**options)


def test_what_it_asks_for() -> None:
    assert SeGPruner().joint and not SeGPruner(scope="view").joint
    assert SeGPruner().needs(make.CLIP) == (Attention(22, "received"),), "class token or not"
    assert SeGPruner().needs(make.SIGLIP) == (Attention(26, "received"),)
    assert SeGPruner().reads_views and SeGPruner().wants_hidden and not SeGPruner().reads_text
    assert str(SeGPruner(weight=0.2, scope="view")) == "SeGPruner(weight=0.2, scope='view')"
