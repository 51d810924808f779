"""QuoTA: the whole budget over the frames of a prompt, each resampled to exactly its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

import synthetic_items as make
import tiny_models
import vlm_budget
from pretend_device import PretendDevice
from tiny_parts import VIDEO
from vlm_budget import Budget
from vlm_budget.errors import BudgetError, FrameScoreError, InfeasibleBudgetError, OptionError
from vlm_budget.frames import allocate_frames
from vlm_budget.layout import Partition, VisualItem
from vlm_budget.pruner import Context, Finer, Selection
from vlm_budget.pruners.assigners import ASSIGNERS, merged, resampled
from vlm_budget.pruners.quota import QuoTA, rectangle, spaced


def closed(count: int, rows: int, cols: int) -> VisualItem:
    """A video whose frames one newline closes, as LLaVA-OneVision gives it."""
    partitions = [Partition("frame", rows, cols, time=time) for time in range(count)]
    tokens = [(time, patch, 0) for time in range(count) for patch in range(rows * cols)]
    return make.tokens_item(partitions, [*tokens, (-1, -1, 0)], "video")


def context(
    item: VisualItem,
    scores: Sequence[float] | None = None,
    finer: int | None = None,
    order: int = 0,
    device: str = "cpu",
) -> Context:
    """What the method sees; with ``finer``, frames have that many times the rows and columns before pooling."""
    ctx = make.context(item, order=order, device=device)
    if scores is not None:
        ctx = replace(ctx, scores=torch.tensor(scores))
    if finer is not None:
        rows, cols = item.partitions[0].rows * finer, item.partitions[0].cols * finer
        generator = torch.Generator().manual_seed(order)
        table = torch.randn(len(item.partitions), rows * cols, 4, generator=generator).to(device)
        ctx = replace(ctx, finer=Finer(rows, cols, lambda index: table[index]))
    return ctx


def per_frame(ctx: Context, selection: Selection) -> list[int]:
    return make.per_partition(ctx.item, selection.keep)


# --- where they stand -------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 7))
def test_no_other_places_are_closer_to_the_ideal_ones(data: st.DataObject, size: int) -> None:
    ideal = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size))
    found = spaced(torch.tensor(ideal), size).tolist()
    assert found == sorted(set(found)) and found[0] >= 0 and found[-1] < size

    def farthest(chosen: Sequence[int]) -> int:
        return max(abs(place - wanted) for place, wanted in zip(chosen, ideal, strict=True))

    assert farthest(found) == min(map(farthest, combinations(range(size), len(ideal))))


@given(st.sets(st.integers(0, 40), min_size=1))
def test_places_that_are_distinct_already_stay(ideal: set[int]) -> None:
    assert spaced(torch.tensor(sorted(ideal)), 41).tolist() == sorted(ideal)


# --- frames of a video ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ASSIGNERS)
@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 2]), st.booleans())
@settings(max_examples=40)
def test_every_frame_has_exactly_its_share(
    how: Any, data: st.DataObject, count: int, rows: int, cols: int, finer: int | None, newline: bool
) -> None:
    item = closed(count, rows, cols) if newline else make.frames(count, rows, cols)
    scores = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), min_size=count, max_size=count))
    ctx, k = context(item, scores, finer), data.draw(st.integers(1, item.size))
    selection = QuoTA(assigner=how).select_prompt([ctx], k)
    keep = selection.keep
    assert keep.shape == (k,) and keep.tolist() == sorted(set(keep.tolist())) and keep[-1] < item.size
    separators = int(newline and k > 1)
    assert int((item.partition[keep] < 0).sum()) == separators
    caps = rows * cols * (finer or 1) ** 2
    shares = allocate_frames(torch.tensor(scores), k, caps=caps, separators=separators)
    if finer is None:
        assert per_frame(ctx, selection) == shares
    want = [
        resampled(ctx.finer.of(index) if ctx.finer else ctx.features[item.partition == index], *sides, share, how)
        for index, share in enumerate(shares)
        if share
        for sides in [(rows * (finer or 1), cols * (finer or 1))]
    ]
    if separators:
        want.append(ctx.features[-1:])
    values = ctx.features[keep] if selection.values is None else selection.values
    torch.testing.assert_close(values, torch.cat(want))
    assert torch.equal(QuoTA(assigner=how).select_prompt([ctx], k).keep, keep)


def test_frames_share_by_the_squares_of_their_scores_and_the_rest_is_dropped() -> None:
    ctx = context(make.frames(4, 4, 4), [0.1, 0.6, 0.3, 0.01])
    assert per_frame(ctx, QuoTA().select_prompt([ctx], 20)) == [0, 16, 4, 0]
    assert per_frame(ctx, QuoTA(power=1).select_prompt([ctx], 20)) == [2, 12, 6, 0]
    assert per_frame(ctx, QuoTA(floor=2).select_prompt([ctx], 20)) == [2, 13, 3, 2]
    assert per_frame(ctx, QuoTA(power=0).select_prompt([ctx], 20)) == [5, 5, 5, 5]


def test_without_scores_all_frames_are_equal() -> None:
    ctx = context(make.frames(4, 4, 4))
    assert per_frame(ctx, QuoTA().select_prompt([ctx], 22)) == [6, 6, 5, 5]


def test_a_token_stands_where_the_middle_of_its_cell_is() -> None:
    ctx = context(make.frames(2, 6, 6), [0.0, 1.0])
    for how in ("bilinear", "average", "stride"):
        keep = QuoTA(assigner=how).select_prompt([ctx], 9).keep  # type: ignore[arg-type]
        assert (keep - 36).tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]


def test_a_merged_token_stands_where_the_one_stood_that_took_in_the_others() -> None:
    ctx = context(make.frames(2, 4, 4), [0.0, 1.0])
    selection = QuoTA(assigner="merge").select_prompt([ctx], 5)
    assert (selection.keep - 16).tolist() == merged(ctx.features[16:], 5)[1].tolist()


def test_picked_tokens_stay_as_they_are() -> None:
    ctx = context(make.frames(3, 4, 4), [1.0, 0.5, 0.0])
    assert QuoTA(assigner="stride").select_prompt([ctx], 11).values is None
    assert QuoTA(assigner="stride").select_prompt([context(ctx.item, [1.0, 0.5, 0.0], 2)], 11).values is not None


def test_with_several_axes_of_positions_tokens_are_picked_unless_another_way_is_named() -> None:
    ctx = replace(context(make.frames(3, 4, 4), [1.0, 0.5, 0.0]), mrope=True)
    assert QuoTA().select_prompt([ctx], 11).values is None
    assert QuoTA(assigner="bilinear").select_prompt([ctx], 11).values is not None
    assert QuoTA().select_prompt([replace(ctx, mrope=False)], 11).values is not None


def test_a_frame_that_matters_has_more_tokens_than_the_model_gives_it() -> None:
    item = closed(6, 4, 4)
    ctx = context(item, [0.0, 0.1, 0.9, 0.1, 0.0, 0.0], finer=2)
    selection = QuoTA().select_prompt([ctx], 61)
    shares = allocate_frames(ctx.scores, 61, caps=64, separators=1)
    assert shares[2] > 16
    assert selection.values is not None and ctx.finer is not None
    start = sum(shares[:2])
    want = resampled(ctx.finer.of(2), 8, 8, shares[2], "bilinear")
    torch.testing.assert_close(selection.values[start : start + shares[2]], want)
    assert torch.equal(selection.values[-1], ctx.features[-1]), "the newline"
    capped = QuoTA(unpooled=False).select_prompt([ctx], 61)
    assert per_frame(ctx, capped) == allocate_frames(ctx.scores, 61, caps=16, separators=1)
    assert max(per_frame(ctx, capped)) == 16
    assert QuoTA().reads_unpooled and not QuoTA(unpooled=False).reads_unpooled


def test_frames_resampled_to_the_models_own_grid_are_what_the_model_makes_of_them() -> None:
    """LLaVA-OneVision pools by bilinear sampling, too."""
    item = make.frames(2, 14, 14)
    table = torch.randn(2, 729, 4)
    pooled = interpolate(table.reshape(2, 27, 27, 4).permute(0, 3, 1, 2), (14, 14), mode="bilinear")
    ctx = replace(context(item, [1.0, 1e-6]), finer=Finer(27, 27, lambda index: table[index]))
    selection = QuoTA(power=0).select_prompt([ctx], 391)
    assert per_frame(ctx, selection) == [196, 195] and selection.values is not None
    torch.testing.assert_close(selection.values[:196], pooled[0].flatten(1).T)


# --- separators -------------------------------------------------------------------------------------------------------


def test_the_newline_that_closes_a_video_is_paid_first() -> None:
    ctx = context(closed(3, 2, 2), [0.0, 1.0, 0.0])
    assert [QuoTA().select_prompt([ctx], k).keep.tolist()[-1] == 12 for k in (1, 2, 5, 12)] == [False, True, True, True]
    assert QuoTA().select_prompt([ctx], 5).keep.tolist() == [4, 5, 6, 7, 12]


def test_a_video_that_keeps_no_frame_keeps_no_newline() -> None:
    videos = [context(closed(2, 3, 3), [0.0, 0.0]), context(closed(2, 3, 3), [1.0, 0.5])]
    keep = QuoTA().select_prompt(videos, 8).keep
    assert (keep >= 19).all() and keep[-1] == 37 and len(keep) == 8


@given(
    st.data(), st.sampled_from(["drop", "keep_all", "keep_used_rows"]), st.lists(make.items(), min_size=1, max_size=3)
)
@settings(max_examples=80)
def test_prompts_of_any_items_keep_exactly_what_was_promised(
    data: st.DataObject, newline: Any, items: list[VisualItem]
) -> None:
    total, separators = sum(item.size for item in items), sum(len(item.separators) for item in items)
    assume(total > 1)
    k = data.draw(st.integers(1 + (separators if newline == "keep_all" else 0), total))
    contexts = []
    for order, item in enumerate(items):
        count = len(item.partitions)
        scores = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=count, max_size=count)
        contexts.append(context(item, data.draw(st.one_of(st.none(), scores)), order=order))
    pruner = QuoTA(newline=newline, assigner=data.draw(st.sampled_from([None, *ASSIGNERS])))
    selection = pruner.select_prompt(contexts, k)
    keep = selection.keep.tolist()
    assert len(keep) == k and keep == sorted(set(keep)) and keep[0] >= 0 and keep[-1] < total
    partition = torch.cat([item.partition for item in items])
    kept = int((partition[selection.keep] < 0).sum())
    if newline == "drop":
        assert kept == max(0, k - (total - separators))
    if newline == "keep_all":
        assert kept == separators


def test_separators_that_leave_no_room_are_refused() -> None:
    item = make.anyres(2, 2, side=4)  # eight rows
    with pytest.raises(BudgetError, match="keeps 8 separators, which leaves 0 of 8 .* nearest feasible count is 9"):
        QuoTA(newline="keep_all").select_prompt([context(item)], 8)
    selection = QuoTA(newline="keep_all").select_prompt([context(item)], 9)
    assert int((item.partition[selection.keep] < 0).sum()) == 8


# --- several items ----------------------------------------------------------------------------------------------------


def test_two_videos_share_as_if_they_were_one() -> None:
    first, second = [0.25, 0.5, 0.125], [0.875, 0.0]
    contexts = [context(make.frames(3, 5, 5), first), context(make.frames(2, 5, 5), second, order=1)]
    keep = QuoTA().select_prompt(contexts, 30).keep
    frame = torch.cat([contexts[0].item.partition, contexts[1].item.partition + 3])[keep]
    assert frame.bincount(minlength=5).tolist() == allocate_frames(first + second, 30, caps=25)


def test_what_a_video_has_no_room_for_goes_to_the_others() -> None:
    """Each frame could have four times the tokens, a video only as many as it has columns."""
    contexts = [context(make.frames(2, 2, 2), [9.0, 8.0], 2), context(make.frames(2, 2, 2), [1.0, 2.0], 2, order=1)]
    selection = QuoTA().select_prompt(contexts, 14)
    assert int((selection.keep < 8).sum()) == 8
    assert selection.keep.tolist() == sorted(set(selection.keep.tolist()))


def test_pictures_are_frames_and_what_was_not_scored_counts_as_the_mean() -> None:
    scores = [0.125, 0.875, 0.375]
    pictures = [context(make.single(5), [score], order=index) for index, score in enumerate(scores)]
    keep = QuoTA().select_prompt(pictures, 30).keep
    assert (keep // 25).bincount(minlength=3).tolist() == allocate_frames(scores, 30, caps=25)
    mixed = [context(make.single(5)), context(make.frames(2, 5, 5), [0.25, 0.75])]
    keep = QuoTA().select_prompt(mixed, 30).keep
    assert (keep // 25).bincount(minlength=3).tolist() == allocate_frames([0.5, 0.25, 0.75], 30, caps=25)


def test_a_picture_of_crops_is_one_frame_that_its_parts_share_by_size() -> None:
    item = make.anyres(1, 2, side=6, pad=(1, 0), newline=False)
    ctx = context(item, [1.0] * 3)
    other = context(make.single(6), [1.0], order=1)
    keep = QuoTA().select_prompt([ctx, other], 42).keep
    inside = keep[keep < item.size]
    assert len(inside) == 21
    assert make.per_partition(item, inside) == [9, 6, 6]  # of 36, 24 and 24 tokens


def test_padding_leaves_a_smaller_grid_and_other_shapes_are_picked_from() -> None:
    item = make.anyres(1, 2, side=6, pad=(2, 0), newline=False, thumbnail="none")
    selection = QuoTA().select_prompt([context(item)], 8)
    features = context(item).features[item.partition == 0]
    want = interpolate(features.T.reshape(1, -1, 2, 6), (1, 4), mode="bilinear")[0].flatten(1).T
    assert selection.values is not None and make.per_partition(item, selection.keep) == [4, 4]
    torch.testing.assert_close(selection.values[(item.partition[selection.keep] == 0)], want)
    ragged = make.tokens_item([Partition("image", 3, 3)], [(0, patch, -1) for patch in (0, 1, 2, 4, 7)])
    ctx = context(ragged)
    selection = QuoTA().select_prompt([ctx], 3)
    assert torch.equal(selection.values, ctx.features[selection.keep])


def test_rectangles_are_known() -> None:
    assert rectangle(torch.tensor([5, 6, 9, 10]), 4) == (2, 2)
    assert rectangle(torch.tensor([0, 2, 8, 10]), 4) == (2, 2)  # every second row and column
    assert rectangle(torch.tensor([0, 1, 2, 5]), 4) is None


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("power", -1.0),
        ("power", float("nan")),
        ("power", "2"),
        ("floor", -1),
        ("floor", 1.5),
        ("floor", True),
        ("assigner", "v1"),
        ("unpooled", 1),
        ("merge", "token_transforming"),
    ],
)
def test_unusable_fields_are_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        QuoTA(**{name: value})


def test_a_budget_below_the_floor_is_refused_before_any_work() -> None:
    items = [make.frames(4, 3, 3), make.single(1, 2)]
    assert QuoTA(floor=3).tokens(Budget(14, "tokens", relative=False), items) == 14
    with pytest.raises(InfeasibleBudgetError, match="keeps at least 14") as caught:
        QuoTA(floor=3).tokens(Budget(13, "tokens", relative=False), items)
    assert caught.value.nearest[0] == Budget(14, "tokens", relative=False)


def test_a_floor_is_met_as_far_as_the_models_own_tokens_go() -> None:
    """A frame's grid before pooling has 36 tokens, but the prompt has only 9 columns for it."""
    ctx = context(closed(3, 3, 3), [1.0, 0.0, 0.0], finer=2)
    for k in (27, 28):
        assert len(QuoTA(floor=20).select_prompt([ctx], k).keep) == k
    assert QuoTA(floor=20).tokens(Budget(27, "tokens", relative=False), [ctx.item]) == 27
    with pytest.raises(InfeasibleBudgetError, match="keeps at least 27"):
        QuoTA(floor=20).tokens(Budget(26, "tokens", relative=False), [ctx.item])


def test_scores_of_other_frames_are_refused() -> None:
    with pytest.raises(FrameScoreError, match="2 scores were laid beside 3 frames"):
        QuoTA().select_prompt([context(make.frames(3, 2, 2), [1.0, 2.0])], 4)


# --- in a model -------------------------------------------------------------------------------------------------------


def test_the_language_model_gets_frames_resampled_from_what_the_projector_returned() -> None:
    """LLaVA-OneVision, a picture and a video of three frames that it pools from 36 tokens to 9."""
    tiny = tiny_models.build("llava_onevision_video")
    inputs, scores = tiny_models.row_inputs(tiny, 0), [0.25, 0.875, 0.125]
    projected: list[torch.Tensor] = []
    entered: list[torch.Tensor] = []
    with vlm_budget.patch(tiny.model, "quota", 0.5) as handle, torch.no_grad():
        handle.frames([scores])
        base = tiny.model.model
        hooks = [
            base.multi_modal_projector.register_forward_hook(lambda _module, _args, output: projected.append(output)),
            base.language_model.register_forward_pre_hook(
                lambda _module, _args, given: entered.append(given["inputs_embeds"]), with_kwargs=True
            ),
        ]
        tiny.model(**inputs)
        for hook in hooks:
            hook.remove()
        picture, video = handle.kept()
    frames = next(output for output in projected if output.shape[:2] == (3, 36))
    shares = allocate_frames(scores, len(video.positions), caps=36, separators=1)
    assert shares[1] > 9 and len(picture.positions) > 0
    want = [resampled(frames[index], 6, 6, share, "bilinear") for index, share in enumerate(shares) if share]
    ids = inputs["input_ids"][0]
    text_behind = int((ids == VIDEO).nonzero()[-1])
    stop = entered[0].shape[1] - (len(ids) - 1 - text_behind)
    found = entered[0][0, stop - len(video.positions) : stop]
    torch.testing.assert_close(found[:-1], torch.cat(want))
    torch.testing.assert_close(found[-1], base.image_newline)


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ASSIGNERS)
@pytest.mark.parametrize("finer", [None, 2])
def test_the_host_does_not_wait_for_the_device(how: Any, finer: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")
    item, scores = closed(4, 4, 4), [0.1, 0.9, 0.0, 0.3]
    want = QuoTA(assigner=how).select_prompt([context(item, scores, finer)], 30)
    with PretendDevice(("vlm_budget", __name__)) as device, torch.no_grad():
        ctx = context(item, scores, finer, device="cuda")
        with device.watch() as found:
            selection = QuoTA(assigner=how).select_prompt([ctx], 30)
        keep = selection.keep.cpu()
        values = None if selection.values is None else selection.values.cpu()
    assert not [wait for wait in found if not wait.by.reference], found
    assert torch.equal(keep, want.keep) and (values is None) == (want.values is None)
    if values is not None and want.values is not None:
        assert torch.equal(values, want.values)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ASSIGNERS)
@pytest.mark.parametrize("finer", [None, 2])
def test_the_gpu_makes_what_the_cpu_makes(how: Any, finer: int | None) -> None:
    item, scores = closed(8, 14, 14), [0.1, 0.9, 0.0, 0.3, 0.3, 0.2, 0.0, 0.5]
    want = QuoTA(assigner=how).select_prompt([context(item, scores, finer)], 784)
    found = QuoTA(assigner=how).select_prompt([context(item, scores, finer, device="cuda")], 784)
    assert found.keep.is_cuda and torch.equal(found.keep.cpu(), want.keep)
    assert (found.values is None) == (want.values is None)
    if found.values is not None and want.values is not None:
        torch.testing.assert_close(found.values.cpu(), want.values, atol=1e-4, rtol=1e-4)
