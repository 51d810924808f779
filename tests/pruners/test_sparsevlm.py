"""SparseVLM: raters among the text, recycling in version 1, attention without its rotary bias in version 2."""

import math
from dataclasses import replace

import pytest
import torch

import decoder_contexts as make
from vlm_budget import BudgetError, Selection
from vlm_budget.decoder import Captured, DecoderContext, Step
from vlm_budget.errors import OptionError, PatchError
from vlm_budget.pruners.sparsevlm import _LISTS_1, _LISTS_2, SparseVLM, cluster_count, cluster_means, raters

PROMPTS: list[list[str | int]] = [["ab", 41, "cdefgh"], [33, "xyz"], ["a", 30, "b", 50, "cdef"]]
RELEASED_1 = {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)}
RELEASED_2 = {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)}


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


# --- raters ---------------------------------------------------------------------------------------------------------


def naive_raters(ctx: DecoderContext) -> list[int]:
    text = [column for column in ctx.text.tolist() if column > max(ctx.visual.tolist())]
    weight = [0.0] * len(text)
    for visual in ctx.visual.tolist():
        row = make.softmax([dot(ctx.embeds[visual], ctx.embeds[column]) for column in text])
        weight = [a + b / len(ctx.visual) for a, b in zip(weight, row, strict=True)]
    mean = sum(weight) / len(weight)
    return [column for column, each in zip(text, weight, strict=True) if each > mean]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_raters_are_the_text_above_the_mean(prompt: list[str | int], seed: int) -> None:
    ctx = make.context(prompt, seed=seed)
    assert raters(ctx).tolist() == naive_raters(ctx)


def test_where_no_word_stands_out_all_rate() -> None:
    assert raters(make.context(["ab", 3, "c"])).tolist() == [5]
    ctx = make.context([3, "abcd"])
    ctx.embeds[:] = 1
    assert raters(ctx).tolist() == [3, 4, 5, 6]
    assert raters(make.context(["ab", 3])).tolist() == [4]  # no text behind: the last token


# --- version 1 ------------------------------------------------------------------------------------------------------


def naive_scores(ctx: DecoderContext) -> list[float]:
    seen = ctx.captured
    assert seen is not None
    rows = [make.softmax_row(seen, head, rater) for head in range(len(seen.query)) for rater in naive_raters(ctx)]
    return [sum(row[column] for row in rows) / len(rows) for column in ctx.columns.tolist()]


def naive_clusters(states: torch.Tensor, clusters: int) -> dict[int, list[int]]:
    """DPC-kNN, number by number: centre to members."""
    n, width = states.shape
    gap = [[math.dist(a, b) / math.sqrt(width) for b in states.tolist()] for a in states.tolist()]
    near = min(5, n - 1)
    density = []
    for i in range(n):
        nearest = sorted(gap[i][j] for j in range(n) if j != i)[:near]
        density.append(math.exp(-sum(distance**2 for distance in nearest) / max(near, 1)))
    peak = []
    for i in range(n):
        denser = [gap[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        peak.append(density[i] * (min(denser) if denser else max(map(max, gap))))
    centres = sorted(range(n), key=lambda i: -peak[i])[:clusters]
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in range(n):
        members[i if i in members else min(centres, key=lambda centre: gap[i][centre])].append(i)
    return members


def naive_recycling(ctx: DecoderContext, k: int, clusters: int) -> dict[int, torch.Tensor]:
    """Index to hidden state of what goes on."""
    scores = naive_scores(ctx)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    states = ctx.hidden[ctx.columns]
    kept = {index: states[index] for index in order[: k - clusters]}
    dropped = order[k - clusters :]
    recycled = dropped[: int(len(dropped) * 0.3 + 1e-9)]
    for centre, members in naive_clusters(states[recycled], clusters).items():
        kept[recycled[centre]] = torch.stack([states[recycled[i]] for i in members]).mean(0)
    return kept


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_raters_favourites_stay_and_the_best_of_the_rest_are_clustered(prompt: list[str | int], seed: int) -> None:
    for order in range(sum(isinstance(part, int) for part in prompt)):
        ctx = make.context(prompt, order, seed)
        m = len(ctx.alive)
        for k in (2, 7, m // 2):
            found = SparseVLM().pick(ctx, k)
            clusters = cluster_count(m, k)
            assert clusters and isinstance(found, Selection) and found.values is not None
            wanted = naive_recycling(ctx, k, clusters)
            assert found.keep.tolist() == sorted(wanted) and len(wanted) == k
            torch.testing.assert_close(found.values, torch.stack([wanted[index] for index in sorted(wanted)]))


def test_tokens_that_stay_as_they_are_keep_their_states_bit_for_bit() -> None:
    ctx = make.context(["a", 40, "bcd"])
    found = SparseVLM().pick(replace(ctx, hidden=ctx.hidden.bfloat16()), 12)
    assert isinstance(found, Selection) and found.values is not None and found.values.dtype == torch.bfloat16
    same = (found.values == ctx.hidden.bfloat16()[ctx.columns][found.keep]).all(1)
    assert int(same.sum()) >= 12 - cluster_count(40, 12)
    assert not same.all()


@pytest.mark.parametrize(("m", "k"), [(1, 1), (9, 1), (9, 8), (9, 7), (40, 1), (40, 39), (40, 37)])
def test_with_nothing_to_recycle_or_room_for_one_only_the_best_stay(m: int, k: int) -> None:
    ctx = make.context(["a", m, "bcd"])
    found = SparseVLM().pick(ctx, k)
    assert isinstance(found, torch.Tensor)
    assert sorted(found.tolist()) == make.best(naive_scores(ctx), k)


def test_cluster_counts_are_one_per_ten_recycled_and_at_most_half() -> None:
    for m in [*range(1, 60), 309, 576, 577]:
        for k in range(1, m):
            clusters = cluster_count(m, k)
            recycled = 3 * (m - k + clusters) // 10
            assert 0 <= clusters <= min(k // 2, recycled)
            wanted = recycled // 10 + 1 if recycled else 0
            assert clusters == wanted or (clusters == k // 2 < wanted)


@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (2, 1), (3, 3), (6, 2), (30, 4), (63, 7)])
def test_clusters_equal_the_naive_ones(count: int, clusters: int) -> None:
    states = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))
    centres, means = cluster_means(states, clusters)
    wanted = naive_clusters(states, clusters)
    assert centres.tolist() == list(wanted)
    torch.testing.assert_close(means, torch.stack([states[members].mean(0) for members in wanted.values()]))


def test_far_apart_groups_become_the_clusters() -> None:
    groups = torch.tensor([[0.0, 0.0], [500.0, 0.0], [0.0, 500.0]]).repeat_interleave(8, 0)
    states = groups + torch.randn(24, 2, generator=torch.Generator().manual_seed(0))  # densities underflow as numbers
    centres, means = cluster_means(states, 3)
    assert sorted(centre // 8 for centre in centres.tolist()) == [0, 1, 2]
    for centre, mean in zip(centres.tolist(), means, strict=True):
        first = centre // 8 * 8
        torch.testing.assert_close(mean, states[first : first + 8].mean(0))


def test_identical_tokens_can_be_clustered() -> None:
    centres, means = cluster_means(torch.full((12, 3), 2.0), 4)
    assert len(set(centres.tolist())) == 4 and torch.equal(means, torch.full((4, 3), 2.0))


# --- version 2 ------------------------------------------------------------------------------------------------------


def naive_without_gravity(ctx: DecoderContext) -> list[float]:
    seen = ctx.captured
    assert seen is not None and seen.cos is not None and seen.sin is not None
    dim, heads = seen.query.shape[-1], len(seen.query)

    def rotated_ones(column: int) -> list[float]:
        cos, sin = seen.cos[column].tolist(), seen.sin[column].tolist()  # type: ignore[index]
        turned = [-1.0] * (dim // 2) + [1.0] * (dim // 2)  # a rotation by a quarter of the all-ones vector
        return [c + s * t for c, s, t in zip(cos, sin, turned, strict=True)]

    mass, sums = [0.0] * heads, [[0.0] * len(ctx.columns) for _ in range(heads)]
    for head in range(heads):
        for row in naive_raters(ctx):
            logits = []
            for column in range(row + 1):
                key = seen.key[head // (heads // len(seen.key)), column]
                bias = sum(a * b for a, b in zip(rotated_ones(row), rotated_ones(column), strict=True)) / dim
                logits.append(dot(seen.query[head, row], key) * seen.scaling / max(bias, 0.1))
            attention = make.softmax(logits) + [0.0] * (len(ctx.hidden) - row - 1)
            mass[head] += sum(attention[column] for column in ctx.visual.tolist())
            for index, column in enumerate(ctx.columns.tolist()):
                sums[head][index] += attention[column]
    best = make.best(mass, max(1, round(heads * 14 / 32)))
    return [sum(sums[head][index] for head in best) for index in range(len(ctx.columns))]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_version_2_ranks_by_attention_without_the_rotary_bias_in_the_most_visual_heads(
    prompt: list[str | int], heads: int
) -> None:
    for order in range(sum(isinstance(part, int) for part in prompt)):
        columns = sum(part if isinstance(part, int) else len(part) for part in prompt)
        ctx = make.context(prompt, order, seen=make.captured(columns, heads, heads=heads))
        for k in {1, 7, len(ctx.alive) - 1}:
            found = SparseVLM(version=2).pick(ctx, k)
            assert isinstance(found, torch.Tensor), "version 2 merges nothing"
            assert sorted(found.tolist()) == make.best(naive_without_gravity(ctx), k)


def test_at_equal_positions_the_bias_is_one() -> None:
    ctx = make.context(["a", 20, "bc"])
    seen = ctx.captured
    assert seen is not None
    still = Captured(seen.query, seen.key, seen.scaling, None, torch.ones_like(seen.cos), torch.zeros_like(seen.sin))  # type: ignore[arg-type]
    ctx = replace(ctx, captured=replace(still, query=seen.query[:1], key=seen.key[:1]))
    found = SparseVLM(version=2).pick(ctx, 8)
    assert isinstance(found, torch.Tensor) and sorted(found.tolist()) == make.best(naive_scores(ctx), 8)


def test_version_2_says_that_it_needs_positions_of_one_axis() -> None:
    ctx = make.context(["a", 5, "b"])
    assert ctx.captured is not None
    ctx = replace(ctx, captured=replace(ctx.captured, cos=None, sin=None))
    with pytest.raises(PatchError, match=r"version=2.*M-RoPE.*version=1"):
        SparseVLM(version=2).pick(ctx, 2)
    assert SparseVLM().pick(ctx, 1) is not None


# --- schedule -------------------------------------------------------------------------------------------------------


def with_recycled(counts: tuple[int, int, int]) -> tuple[int, ...]:
    """What goes on at each stage when ``counts`` stay as they are."""
    total, after = 576, []
    for count in counts:
        recycled = 3 * (total - count) // 10
        total = count + recycled // 10 + 1
        after.append(total)
    return tuple(after)


def test_the_lists_are_the_released_ones_made_monotone() -> None:
    totals = {budget: with_recycled(counts) for budget, counts in RELEASED_1.items()}
    totals[128] = (totals[192][0], *totals[128][1:])
    assert ((0, 0, 0), *totals.values(), (576, 576, 576)) == _LISTS_1
    released = RELEASED_2 | {96: (RELEASED_2[128][0], *RELEASED_2[96][1:])}
    assert ((0, 0, 0), *released.values(), (576, 576, 576)) == _LISTS_2
    for lists in (_LISTS_1, _LISTS_2):
        assert all(list(stage) == sorted(stage) for stage in zip(*lists, strict=True))


@pytest.mark.parametrize("budget", RELEASED_1)
def test_the_released_lists_average_to_their_names_when_layers_2_6_and_15_see_fewer(budget: int) -> None:
    for counts in (with_recycled(RELEASED_1[budget]), RELEASED_2[budget]):
        steps = [Step(layer, count) for layer, count in zip((2, 6, 15), counts, strict=True)]
        assert abs(make.spent(steps, 576, 32) / 32 - budget) < 1
        later = [Step(layer, count) for layer, count in zip((3, 7, 16), counts, strict=True)]
        assert make.spent(later, 576, 32) / 32 - budget > 10


@pytest.mark.parametrize(("version", "released"), [(1, RELEASED_1), (2, RELEASED_2)])
@pytest.mark.parametrize("budget", RELEASED_1)
def test_a_named_budget_gives_its_released_list(version: int, released: dict, budget: int) -> None:  # type: ignore[type-arg]
    wanted = with_recycled(released[budget]) if version == 1 else released[budget]
    steps = SparseVLM(version=version).schedule(576, budget * 32, 32)
    assert [step.layer for step in steps] == [2, 6, 15]
    for stage, (step, count) in enumerate(zip(steps, wanted, strict=True)):
        assert abs(step.keep - count) <= (8 if stage == 0 else 1)  # levelled lists, and a sum below the budget


@pytest.mark.parametrize("version", [1, 2])
def test_other_sizes_depths_and_budgets_scale_the_lists(version: int) -> None:
    steps = SparseVLM(version=version).schedule(2880, 5 * 128 * 32, 32)
    small = SparseVLM(version=version).schedule(576, 128 * 32, 32)
    for many, few in zip(steps, small, strict=True):
        assert abs(many.keep - 5 * few.keep) <= 5
    assert [step.layer for step in SparseVLM(version=version).schedule(576, 128 * 28, 28)] == [2, 5, 13]


def test_fixed_shares_need_no_budget() -> None:
    pruner = SparseVLM(ratios=(300 / 576, 200 / 576, 110 / 576))
    assert pruner.fixed and not SparseVLM().fixed
    assert pruner.schedule(576, None, 32) == (Step(2, 300), Step(6, 200), Step(15, 110))
    assert SparseVLM(at=(0.5,), ratios=(0.25,)).schedule(64, None, 6) == (Step(3, 16),)


def test_the_layers_before_the_first_stage_are_the_least_budget() -> None:
    with pytest.raises(BudgetError, match=r"SparseVLM\(\).*'6.42%'"):
        SparseVLM().schedule(576, 2 * 576 + 29, 32)


# --- options --------------------------------------------------------------------------------------------------------


def test_positions_are_the_versions_own_unless_said() -> None:
    assert SparseVLM().positions == "packed" and SparseVLM(version=2).positions == "original"
    assert SparseVLM(positions="original").positions == "original"


@pytest.mark.parametrize(
    ("pruner", "text"),
    [
        (SparseVLM(), "SparseVLM()"),
        (SparseVLM(positions="packed"), "SparseVLM()"),
        (SparseVLM(version=2), "SparseVLM(version=2)"),
        (SparseVLM(version=2, positions="packed"), "SparseVLM(positions='packed', version=2)"),
        (SparseVLM(positions="original"), "SparseVLM(positions='original')"),
        (SparseVLM(at=(0.5,), ratios=(0.5,)), "SparseVLM(at=(0.5,), ratios=(0.5,))"),
    ],
)
def test_the_text_builds_an_equal_one(pruner: SparseVLM, text: str) -> None:
    assert str(pruner) == text
    assert eval(text) == pruner
    assert hash(eval(text)) == hash(pruner)


@pytest.mark.parametrize("version", [0, 3, "2", None, True, 1.0, [], {}])
def test_there_are_two_versions(version: object) -> None:
    with pytest.raises(OptionError, match="version must be 1 or 2"):
        SparseVLM(version=version)  # type: ignore[arg-type]


def test_other_options_are_checked() -> None:
    with pytest.raises(OptionError, match="three stages, at has 2; pass ratios"):
        SparseVLM(at=(0.25, 0.5))
    with pytest.raises(OptionError, match="positions must be one of"):
        SparseVLM(positions="sideways")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="ratios must be 3 shares"):
        SparseVLM(ratios=(0.5, 0.25))
