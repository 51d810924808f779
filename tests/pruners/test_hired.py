"""HiRED: quotas by the thumbnail's attention, tokens by each partition's own, every count exact."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget import Budget, BudgetError
from vlm_budget.errors import OptionError
from vlm_budget.layout import Partition, VisualItem
from vlm_budget.pruner import Attention, Context
from vlm_budget.pruners.hired import HiRED, patches_under

GRIDS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (1, 4)]
CONTENT, TOKENS = Attention(0, "cls"), Attention(22, "cls")


def context(item: VisualItem, content: torch.Tensor, thumbnail: int = 0, seed: int = 0) -> Context:
    """Attention of ``content`` in the thumbnail at the content layer, random everywhere else."""
    attention = make.random_attention(HiRED(), item, seed)
    attention[CONTENT][thumbnail] = content / content.sum().clamp_min(1e-9)
    return make.context(item, attention)


def shares(pruner: HiRED, ctx: Context, k: int) -> list[int]:
    return make.per_partition(ctx.item, pruner.select(ctx, k).keep)


def picture(side: int, *blocks: tuple[int, int, int, int]) -> torch.Tensor:
    """[side * side] attention of a picture that shows something in blocks of (top, left, height, width) patches."""
    shown = torch.full((side, side), 1e-4)
    for top, left, height, width in blocks:
        shown[top : top + height, left : left + width] = 1.0
    return shown.flatten()


# --- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["drop", "keep_all", "keep_used_rows"])
@pytest.mark.parametrize("content", ["mass", "count"])
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_keeps_exactly_the_budget(grid: tuple[int, int], alpha: float, content: Any, newline: Any) -> None:
    pruner = HiRED(alpha=alpha, content=content, newline=newline)
    for pad in [(0, 0), (1, 0), (0, 2)]:
        item = make.anyres(*grid, side=6, pad=pad)
        ctx = make.context(item, make.random_attention(pruner, item))
        for k in {len(item.separators) + 1, 63, item.size // 5, item.size // 2, item.size - 1, item.size}:
            if len(item.separators) < k <= item.size:
                assert len(pruner.select(ctx, k).keep) == k


@given(st.data(), make.items(), st.floats(0, 1), st.sampled_from(["mass", "count"]), st.sampled_from([None, 1, 2]))
def test_quotas_are_exact_and_within_what_each_partition_shows(
    data: st.DataObject, item: VisualItem, alpha: float, content: Any, levels: int | None
) -> None:
    pruner = HiRED(alpha=alpha, content=content)
    attention = make.random_attention(pruner, item, levels=levels)
    valid = make.per_partition(item, item.candidates)
    k = data.draw(st.integers(1, sum(valid)))
    quotas = pruner.quotas(item.partitions, valid, attention[CONTENT], k).tolist()
    assert sum(quotas) == k
    assert all(0 <= quota <= most for quota, most in zip(quotas, valid, strict=True))
    assert make.per_partition(item, pruner.pick(make.context(item, attention), k)) == quotas


# --- phase 1: how many tokens per partition -------------------------------------------------------------------------


def test_the_worked_example_of_the_paper() -> None:
    side, ratios = 24, (0.32, 0.08, 0.58, 0.02)
    item = make.anyres(2, 2, side=side, newline=False)
    content = torch.zeros(side, side)
    for ratio, (row, col) in zip(ratios, [(3, 5), (9, 20), (14, 1), (23, 12)], strict=True):
        content[row, col] = ratio
    assert shares(HiRED(), context(item, content.flatten()), 100) == [50, 16, 4, 29, 1]


# (crop, block of patches in the crop's quadrant, the strip the released code would count it in)
QUADRANTS = [
    (0, (6, 2, 6, 8), 1),
    (1, (0, 14, 6, 8), 0),
    (2, (18, 2, 6, 8), 3),
    (3, (12, 14, 6, 8), 2),
]


@pytest.mark.parametrize("content", ["mass", "count"])
@pytest.mark.parametrize(("crop", "block", "strip"), QUADRANTS)
def test_the_crop_that_shows_the_content_gets_the_most(
    crop: int, block: tuple[int, int, int, int], strip: int, content: Any
) -> None:
    shown = picture(24, block)
    # The released code reshapes the map without splitting rows and columns: it would favour another crop.
    strips = shown.reshape(2, 2, -1).sum(-1).flatten()
    assert int(strips.argmax()) == strip != crop
    pruner = HiRED(content=content, count_top=48 if content == "count" else None)
    thumbnail, *crops = shares(pruner, context(make.anyres(2, 2, side=24), shown), 576)
    assert thumbnail == 288
    assert crops[crop] == max(crops) and sorted(crops)[-2] < crops[crop] / 4


@pytest.mark.parametrize("grid", GRIDS)
def test_content_under_any_crop_of_any_grid_is_found(grid: tuple[int, int]) -> None:
    side = 24
    rows, cols = grid
    for crop in range(rows * cols):
        height, width = side // rows, side // cols
        shown = picture(side, (crop // cols * height + 1, crop % cols * width + 1, height - 2, width - 2))
        _, *crops = shares(HiRED(), context(make.anyres(*grid, side=side), shown), 200)
        assert crops.index(max(crops)) == crop and max(crops) >= 97


def test_what_a_full_crop_cannot_take_goes_to_the_others_and_then_back_to_the_thumbnail() -> None:
    item = make.anyres(2, 2, side=4, newline=False)  # 16 tokens per partition
    ctx = context(item, picture(4, (0, 0, 2, 2)))
    assert shares(HiRED(), ctx, 40) == [16, 16, 3, 3, 2]  # the thumbnail is full at 16, the first crop at 16
    few = make.anyres(2, 2, side=4, pad=(3, 0), newline=False)  # 4 tokens per crop
    assert shares(HiRED(alpha=0.3), context(few, picture(4, (0, 0, 2, 2))), 30) == [14, 4, 4, 4, 4]


def test_crops_without_any_content_share_by_what_they_show() -> None:
    item = make.anyres(1, 3, side=4, pad=(0, 2), newline=False)  # 8, 16 and 8 tokens
    assert shares(HiRED(), context(item, torch.zeros(16)), 16) == [8, 2, 4, 2]


@pytest.mark.parametrize(
    ("alpha", "k", "thumbnail"),
    [(0, 50, 0), (0.5, 50, 25), (0.5, 51, 25), (1, 50, 36), (1, 30, 30), (0.3, 11, 3), (0.5, 1, 0), (0, 149, 5)],
)
def test_alpha_is_the_thumbnails_share_rounded_down_and_capped(alpha: float, k: int, thumbnail: int) -> None:
    item = make.anyres(2, 2, side=6, newline=False)  # 36 in the thumbnail, 144 in the crops
    assert item.size == 180
    assert shares(HiRED(alpha=alpha), context(item, picture(6, (0, 0, 3, 3))), k)[0] == max(thumbnail, k - 144)


def test_mass_weighs_attention_and_count_counts_patches() -> None:
    item = make.anyres(1, 2, side=4, newline=False)
    content = torch.zeros(4, 4)
    content[0, 0] = 0.60  # one strong patch on the left
    content[:, 2:] = 0.05  # eight weak ones on the right
    ctx = context(item, content.flatten())
    assert shares(HiRED(), ctx, 20) == [10, 6, 4]
    assert shares(HiRED(content="count", count_top=9), ctx, 20) == [10, 1, 9]
    assert shares(HiRED(content="count", count_top=3), ctx, 18) == [9, 3, 6]
    assert shares(HiRED(content="count", count_top=999), ctx, 20) == [10, 5, 5]


@pytest.mark.parametrize(("alpha", "hits"), [(0.5, 8), (0.25, 12), (0, 16), (1, 1), (0.9, 1)])
def test_by_default_count_takes_what_alpha_leaves_of_the_patches(alpha: float, hits: int) -> None:
    content = torch.arange(16, 0, -1.0)  # patches in order of attention, the first 8 of them in the upper crop
    pruner = HiRED(alpha=alpha, content="count")
    quotas = pruner.quotas(make.anyres(2, 1, side=4).partitions, [0, 16, 16], [content], 16).tolist()
    assert quotas == [0, round(16 * min(hits, 8) / hits), round(16 * max(hits - 8, 0) / hits)]


def test_tied_hits_are_counted_from_the_first() -> None:
    even = torch.ones(16)
    partitions = make.anyres(2, 1, side=4).partitions
    assert HiRED(content="count", count_top=8).quotas(partitions, [0, 16, 16], [even], 16).tolist() == [0, 16, 0]


# --- which crop a thumbnail patch belongs to ------------------------------------------------------------------------


def owners(rows: int, cols: int, crops: Sequence[tuple[float, float, float, float]]) -> list[list[int]]:
    partitions = [Partition("crop", 4, 4, box) for box in crops]
    return patches_under(Partition("thumbnail", rows, cols), partitions).reshape(rows, cols).tolist()


def test_quadrants_split_rows_and_columns() -> None:
    boxes = [grid.box for grid in make.anyres(2, 2, side=4).partitions[1:]]
    assert owners(4, 4, boxes) == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_a_padded_landscape_maps_by_the_picture_and_not_by_the_canvas() -> None:
    # A picture twice as wide as high on a canvas of three crops: half of each outer crop is padding.
    boxes = [grid.box for grid in make.anyres(1, 3, side=4, pad=(0, 2)).partitions[1:]]
    assert boxes == [(-0.25, 0, 0.25, 1), (0.25, 0, 0.75, 1), (0.75, 0, 1.25, 1)]
    assert owners(2, 8, boxes) == [[0, 0, 1, 1, 1, 1, 2, 2]] * 2


def test_a_padded_portrait_maps_by_the_picture_and_not_by_the_canvas() -> None:
    boxes = [grid.box for grid in make.anyres(3, 1, side=4, pad=(2, 0)).partitions[1:]]
    assert owners(8, 2, boxes) == [[0, 0]] * 2 + [[1, 1]] * 4 + [[2, 2]] * 2


def test_a_boundary_patch_belongs_to_the_crop_that_holds_its_centre() -> None:
    thirds = [(0, 0, 1 / 3, 1), (1 / 3, 0, 2 / 3, 1), (2 / 3, 0, 1, 1)]
    assert owners(1, 4, thirds) == [[0, 1, 1, 2]]  # centres 0.125, 0.375, 0.625, 0.875
    assert owners(1, 5, [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]) == [[0, 0, 1, 1, 1]]  # on the line: the right one
    assert owners(5, 1, [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]) == [[0], [0], [1], [1], [1]]  # and the lower one


def test_a_thumbnail_with_padding_of_its_own_maps_by_the_picture_too() -> None:
    whole = Partition("thumbnail", 4, 4, (0, -0.5, 1, 1.5))  # a landscape in the middle rows of a square
    crops = [Partition("crop", 4, 4, (0, 0, 0.5, 1)), Partition("crop", 4, 4, (0.5, 0, 1, 1))]
    assert patches_under(whole, crops).reshape(4, 4).tolist() == [[2] * 4, [0, 0, 1, 1], [0, 0, 1, 1], [2] * 4]


def test_a_patch_under_no_crop_is_nobodys_and_one_under_two_the_firsts() -> None:
    assert owners(2, 2, [(0, 0, 0.5, 0.5)]) == [[0, 1], [1, 1]]
    assert owners(1, 4, [(0, 0, 0.75, 1), (0.25, 0, 1, 1)]) == [[0, 0, 0, 1]]
    assert owners(2, 2, []) == [[0, 0], [0, 0]]


@given(st.integers(1, 27), st.sampled_from(GRIDS), st.integers(1, 9), st.data())
def test_every_patch_of_the_picture_lies_under_exactly_one_crop(
    patches: int, grid: tuple[int, int], side: int, data: st.DataObject
) -> None:
    pad = data.draw(st.integers(0, (grid[0] * side - 1) // 2))
    item = make.anyres(*grid, side=side, pad=(pad, 0))
    under = patches_under(Partition("thumbnail", patches, patches), item.partitions[1:])
    assert under.shape == (patches * patches,) and under.min() >= 0 and under.max() < grid[0] * grid[1]


# --- padding, newlines, other layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [(5, 0), (0, 5)], ids=["landscape", "portrait"])
def test_padding_is_never_chosen_however_much_attention_it_gets(pad: tuple[int, int]) -> None:
    item = make.anyres(2, 2, side=6, pad=pad)
    attention = make.random_attention(HiRED(), item)
    for index, grid in enumerate(item.partitions):
        shown = item.patch[item.partition == index]
        padding = torch.ones(grid.rows * grid.cols, dtype=torch.bool).index_fill_(0, shown, False)
        attention[TOKENS][index][padding] = 1e6
    for k in (7, 36, len(item.candidates)):
        keep = HiRED().select(make.context(item, attention), k).keep
        assert len(keep) == k and (item.partition[keep] >= 0).all()


def test_a_crop_of_padding_alone_gets_nothing() -> None:
    item = make.anyres(1, 3, side=4, pad=(0, 4), newline=False)
    assert shares(HiRED(), context(item, torch.ones(16)), 20) == [10, 0, 10, 0]


def test_kept_newlines_are_paid_from_the_budget_before_it_is_split() -> None:
    item = make.anyres(2, 2, side=6)  # 12 newlines
    ctx = context(item, torch.ones(36))
    keep = HiRED(newline="keep_all").select(ctx, 52).keep
    assert make.per_partition(item, keep) == [20, 5, 5, 5, 5] and (item.partition[keep] < 0).sum() == 12
    keep = HiRED().select(ctx, 52).keep
    assert make.per_partition(item, keep) == [26, 7, 7, 6, 6] and (item.partition[keep] < 0).sum() == 0


def test_without_a_thumbnail_partitions_share_by_what_they_show() -> None:
    tiles = make.anyres(1, 3, side=4, pad=(0, 2), newline=False, thumbnail="none")
    assert shares(HiRED(), make.context(tiles, make.random_attention(HiRED(), tiles)), 16) == [4, 8, 4]
    video = make.frames(4, 3, 3)
    assert shares(HiRED(alpha=1), make.context(video, make.random_attention(HiRED(), video)), 12) == [3, 3, 3, 3]


@pytest.mark.parametrize("newline", [False, True])
@pytest.mark.parametrize("side", [1, 7, 24])
def test_a_single_partition_is_plain_top_k(side: int, newline: bool) -> None:
    item = make.single(side, newline=newline)
    ctx = make.context(item, make.random_attention(HiRED(), item))
    for k in {1, max(side * side // 5, 1), side * side}:
        best = ctx.attention[TOKENS][0].topk(k).indices
        assert HiRED().select(ctx, k).keep.tolist() == best.sort().values.tolist()


@pytest.mark.parametrize("content", ["mass", "count"])
def test_a_thumbnail_behind_its_crops_makes_no_difference(content: Any) -> None:
    pruner = HiRED(content=content)
    shown = picture(12, QUADRANTS[1][1])
    first, last = (make.anyres(2, 2, side=12, thumbnail=place) for place in ("first", "last"))
    in_front = context(first, shown)
    moved = {need: [*rows[1:], rows[0]] for need, rows in in_front.attention.items()}
    behind = make.context(last, moved)
    assert shares(pruner, behind, 200) == [*shares(pruner, in_front, 200)[1:], shares(pruner, in_front, 200)[0]]
    mine = {(int(first.partition[i]), int(first.patch[i])) for i in pruner.select(in_front, 200).keep}
    its = {((int(last.partition[i]) + 1) % 5, int(last.patch[i])) for i in pruner.select(behind, 200).keep}
    assert its == mine


# --- phase 2: which tokens ------------------------------------------------------------------------------------------


def test_every_partition_keeps_what_its_own_map_of_the_final_layer_ranks_highest() -> None:
    item = make.anyres(2, 2, side=6, pad=(1, 0))
    attention = make.random_attention(HiRED(), item, seed=3)
    keep = HiRED().select(make.context(item, attention), 60).keep
    quotas = make.per_partition(item, keep)
    assert min(quotas) > 1
    for index, quota in enumerate(quotas):
        shown = item.patch[item.partition == index]
        best = shown[attention[TOKENS][index][shown].topk(quota).indices]
        kept = keep[item.partition[keep] == index]
        assert set(item.patch[kept].tolist()) == set(best.tolist())


def test_content_comes_from_the_first_layer_and_ranks_from_the_one_the_language_model_reads() -> None:
    assert HiRED().needs(make.CLIP) == (CONTENT, TOKENS)
    assert HiRED(init_layer=1, final_layer=20).needs(make.CLIP) == (Attention(1, "cls"), Attention(20, "cls"))
    assert HiRED().needs(make.SIGLIP) == (Attention(0, "received"), Attention(26, "received"))


def test_one_layer_may_serve_both_purposes() -> None:
    pruner = HiRED(init_layer=22)
    assert pruner.needs(make.CLIP) == (TOKENS, TOKENS)
    item = make.anyres(2, 2, side=6, newline=False)
    ctx = make.context(item, make.random_attention(pruner, item))
    assert len(ctx.attention) == 1 and len(pruner.select(ctx, 60).keep) == 60


# --- the budget -----------------------------------------------------------------------------------------------------


def test_a_padded_budget_base_counts_all_grid_tokens_and_no_newlines() -> None:
    item = make.anyres(2, 2, side=6, pad=(3, 0))  # 5 grids of 36, of which 108 show something, and 6 newlines
    assert (item.size, len(item.candidates)) == (114, 108)
    budget = Budget(0.2)
    assert HiRED().tokens(budget, [item]) == 23  # 22.8
    assert HiRED(budget_base="padded").tokens(budget, [item]) == 36
    assert HiRED(budget_base="padded").tokens(Budget(0.19), [item]) == math.floor(34.2)
    assert HiRED(budget_base="padded").tokens(Budget(1.0), [item]) == item.size  # 180 do not exist
    both = [item, make.single(7)]
    assert HiRED(budget_base="padded").tokens(budget, both) == 36 + 9
    assert HiRED(budget_base="padded").tokens(Budget.parse(63), both) == 63
    with pytest.raises(BudgetError, match="less than one each"):
        HiRED(budget_base="padded").tokens(Budget(1e-4), both)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -0.1}, r"alpha must lie in \[0, 1\], got -0.1"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"content": "area"}, "content must be 'mass' or 'count', got 'area'"),
        ({"budget_base": "all"}, "budget_base must be 'valid' or 'padded', got 'all'"),
        ({"count_top": 0}, "count_top must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HiRED(**fields)


def test_its_text_tells_what_was_changed() -> None:
    assert str(HiRED(alpha=0.3, content="count", count_top=100)) == "HiRED(alpha=0.3, content='count', count_top=100)"


@pytest.mark.gpu
@pytest.mark.parametrize("content", ["mass", "count"])
def test_the_gpu_keeps_what_the_cpu_keeps(content: Any) -> None:
    pruner = HiRED(content=content)
    item = make.anyres(2, 2, side=24, pad=(5, 0))
    attention = make.random_attention(pruner, item, levels=50)  # ties, too
    on_gpu = {need: [row.cuda() for row in rows] for need, rows in attention.items()}
    keep = pruner.select(make.context(item, on_gpu, device="cuda"), 577).keep
    assert keep.is_cuda and torch.equal(keep.cpu(), pruner.select(make.context(item, attention), 577).keep)
