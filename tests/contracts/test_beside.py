"""What is laid beside a prompt: geometry of pictures, scores of frames."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import synthetic_items
import vlm_budget
from tiny_models import Tiny, row_inputs
from tiny_parts import FLOOR, SIDE, VIDEO, batch, run, sizes
from vlm_budget import FrameScoreError, GeometryError, PatchError, PatchHandle
from vlm_budget.engine.beside import Beside, FrameScores, Repeated, Views
from vlm_budget.layout import Modality, VisualItem
from vlm_budget.models import find_family, layout_of

from . import test_every_method as every
from .conftest import BUDGET, fresh
from .patched import TOLERANCE, encode, forward, generate, unpatched_or_skip
from .reference import language_model, recorded

PICTURES = ["llava", "llava_next", "llava_onevision_multi", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
VIDEOS = ["llava_onevision_video", "llava_next_video", "qwen2_vl_video", "qwen2_5_vl_video", "qwen3_vl_video"]
SEG = [("segpruner", name) for name in PICTURES]
QUOTA = [("quota", name) for name in [*VIDEOS, "internvl", "llava"]]


def items_of(tiny: Tiny) -> list[list[VisualItem]]:
    """Per row."""
    _, base, family = find_family(tiny.model)
    return [list(row) for row in layout_of(base, family, tiny.clone()).rows]


def frames_of(tiny: Tiny) -> Modality:
    """What frames are in a set-up: those of its videos, if it has any."""
    return "video" if any(item.modality == "video" for items in items_of(tiny) for item in items) else "image"


def beside(tiny: Tiny, row: int | None = None) -> dict[str, Any]:
    """Coordinates of a batch's pictures and scores of its frames, or of one row of it: the same for the same item."""
    xyz, scores, of = [], [], frames_of(tiny)
    for index, items in enumerate(items_of(tiny)):
        for order, item in enumerate(items):
            made = torch.Generator().manual_seed(100 * index + order)
            place, score = torch.rand(item.size, 3, generator=made), torch.rand(len(item.partitions), generator=made)
            if row in (None, index) and item.modality == "image":
                xyz.append(place)
            if row in (None, index) and item.modality == of:
                scores.append(score if of == "video" else score[:1])
    return {"xyz": xyz, "scores": scores}


def lay(handle: PatchHandle, tiny: Tiny, row: int | None = None) -> None:
    """Lay beside what the method looks at."""
    things = beside(tiny, row)
    if handle.method.reads_views:
        handle.views(token_xyz=things["xyz"])
    else:
        handle.frames(things["scores"] or None, of=frames_of(tiny))


@pytest.mark.filterwarnings("error:.*beside the prompt")
@pytest.mark.parametrize(("method", "name"), [*SEG, *QUOTA])
def test_every_contract_holds_with_something_beside(method: str, name: str) -> None:
    known = every.unpatched(name)
    tiny = known.tiny
    with vlm_budget.patch(tiny.model, method, BUDGET) as handle:
        promised = handle.plan(**tiny.clone())
        lay(handle, tiny)
        found = forward(handle, tiny.clone(), known.full)
        packed = handle.report().positions == "packed"
        every.check_counts_promised_are_counts_kept(handle, promised, found)
        every.check_dropped_columns_repeat_the_last_kept_one(found)
        tokens = every.check_the_cache_holds_what_was_kept(handle, known, found)
        for index, row in enumerate(known.singles):
            lay(handle, tiny, index)
            alone = forward(handle, row_inputs(tiny, index), [row])
            assert alone.columns[0] == found.columns[index]
            torch.testing.assert_close(alone.logits[0], found.logits[index], **TOLERANCE)
    every.check_the_hand_compacted_reference(found, packed, tokens)
    with vlm_budget.patch(tiny.model, method, 1.0) as handle, torch.no_grad():
        lay(handle, tiny)
        assert torch.equal(tiny.model(**tiny.clone()).logits, known.logits)


@pytest.mark.filterwarnings("ignore:.*beside the prompt")
@pytest.mark.parametrize(("method", "name"), [("segpruner", "llava"), ("quota", "llava_onevision_video")])
def test_it_matters_stays_and_is_taken_away(method: str, name: str) -> None:
    tiny = fresh(name)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return tiny.model(**tiny.clone()).logits

    with vlm_budget.patch(tiny.model, method, BUDGET) as handle:
        bare = logits()
        lay(handle, tiny)
        laid = logits()
        assert not torch.equal(laid, bare)
        assert torch.equal(logits(), laid), "it stays until other things are laid beside"
        if method == "segpruner":
            assert handle.views() is handle
        else:
            assert handle.frames() is handle
        assert torch.equal(logits(), bare)


@pytest.mark.parametrize(
    ("method", "name", "told"),
    [("segpruner", "llava", "no views lie beside"), ("quota", "llava_onevision_video", "no scores lie beside")],
)
def test_without_it_the_method_says_so_once(method: str, name: str, told: str) -> None:
    tiny = fresh(name)
    with vlm_budget.patch(tiny.model, method, BUDGET), pytest.warns(UserWarning, match=told) as seen, torch.no_grad():
        for _ in range(2):
            tiny.model(**tiny.clone())
    assert sum(told in str(warning.message) for warning in seen) == 1


def calls(tiny: Tiny) -> list[int]:
    """Counts the calls of the vision tower."""
    _, base, family = find_family(tiny.model)
    counted = [0]
    family.vision_tower(base).register_forward_pre_hook(lambda *_: counted.__setitem__(0, counted[0] + 1))
    return counted


def test_views_of_other_pictures_are_refused_before_the_tower_runs(llava: Tiny) -> None:
    things, counted = beside(llava), calls(llava)
    with vlm_budget.patch(llava.model, "segpruner", BUDGET) as handle:
        handle.views(token_xyz=things["xyz"][:2])
        with pytest.raises(GeometryError, match="2 pictures, the prompts hold 3"):
            llava.model(**llava.clone())
        handle.views(token_xyz=[table[:5] for table in things["xyz"]])
        with pytest.raises(GeometryError):
            llava.model(**llava.clone())
        assert counted == [0]
        handle.views(token_xyz=things["xyz"])
        llava.model(**llava.clone())
    assert counted[0] > 0


@pytest.mark.parametrize("name", VIDEOS)
def test_scores_of_other_frames_are_refused_before_the_tower_runs(name: str) -> None:
    tiny = fresh(name)
    things, counted = beside(tiny), calls(tiny)
    with vlm_budget.patch(tiny.model, "quota", BUDGET) as handle:
        handle.frames([*things["scores"], *things["scores"], torch.ones(2)])
        with pytest.raises(FrameScoreError, match="videos, the prompts hold"):
            tiny.model(**tiny.clone())
        handle.frames([torch.ones(len(own) * 9 + 5) for own in things["scores"]])
        with pytest.raises(FrameScoreError, match="one score per frame"):
            tiny.model(**tiny.clone())
        assert counted == [2 if "pixel_values" in tiny.inputs else 0], "pictures are encoded before videos"


@pytest.mark.parametrize(("method", "name"), [("segpruner", "llava"), ("quota", "llava"), ("quota", "qwen2_vl_video")])
def test_fewer_than_the_prompts_hold_are_no_copies_even_where_they_divide(method: str, name: str) -> None:
    tiny = fresh(name)
    things, counted = beside(tiny), calls(tiny)
    with vlm_budget.patch(tiny.model, method, BUDGET) as handle:
        if method == "segpruner":
            handle.views(token_xyz=things["xyz"][:1])
        else:
            handle.frames(things["scores"][:1], of=frames_of(tiny))
        with pytest.raises((GeometryError, FrameScoreError), match=f"the prompts hold {len(sum(items_of(tiny), []))}"):
            tiny.model(**tiny.clone())
        with pytest.raises((GeometryError, FrameScoreError)):
            generate(tiny.model, tiny.clone(), num_beams=2)
    assert counted == [0]


def test_prompts_repeated_with_their_pixels_keep_what_was_laid_beside() -> None:
    """As ``generate`` does up to 4.x: Qwen-VL repeats all pictures of a prompt, LLaVA every picture."""
    one, two, three = (synthetic_items.single(side) for side in (2, 3, 4))
    xyz = [torch.rand(item.size, 3) for item in (one, two, three)]
    model = fresh("llava").model
    _, base, family = find_family(model)
    laid = Beside(views=Views.of(token_xyz=xyz), scores=FrameScores.of([1.0, 2.0, 3.0], "image"))
    by_prompt = laid.laid(base, family, "image", [one, two, one, two, three, three], Repeated(2, (4 + 9, 16)))
    each = laid.laid(base, family, "image", [one, one, two, two, three, three], Repeated(2))
    for found, order in ((by_prompt, [0, 1, 0, 1, 2, 2]), (each, [0, 0, 1, 1, 2, 2])):
        assert found.xyz is not None and found.scores is not None
        assert all(torch.equal(table, xyz[index]) for table, index in zip(found.xyz, order, strict=True))
        assert [float(score) for score in found.scores] == [index + 1.0 for index in order]
    for times in (1, 3):
        with pytest.raises(GeometryError, match="3 pictures, the prompts hold 6"):
            laid.laid(base, family, "image", [one, two, one, two, three, three], Repeated(times, (4 + 9, 16)))


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_what_was_laid_beside_is_a_copy(kind: Any) -> None:
    tiny = fresh("llava")
    xyz, scores = [kind(table.numpy()) for table in beside(tiny)["xyz"]], kind([0.25, 0.5, 1.0], dtype=kind(0.5).dtype)
    for method, given in (("segpruner", xyz), ("quota", [scores])):
        with vlm_budget.patch(tiny.model, method, BUDGET) as handle, torch.no_grad():
            handle.views(token_xyz=given) if method == "segpruner" else handle.frames(scores)
            expected = tiny.model(**tiny.clone()).logits
            for each in given:
                each[:] = each[::-1].copy() if isinstance(each, np.ndarray) else each.flip(0)
            assert torch.equal(tiny.model(**tiny.clone()).logits, expected)


def test_arrays_turned_over_are_read(llava: Tiny) -> None:
    depth = np.linspace(1, 4, 3 * 8 * 8).reshape(3, 8, 8)
    given: dict[str, Any] = {"pose": np.eye(4)[None].repeat(3, 0), "intrinsics": np.diag([8.0, 8, 1])}
    logits = []
    with vlm_budget.patch(llava.model, "segpruner", BUDGET) as handle, torch.no_grad():
        for turned in (np.flip(depth, 1), np.flip(depth, 1).copy()):
            logits.append(handle.views(depth=turned, **given).model(**llava.clone()).logits)
    assert torch.equal(*logits)


def test_nothing_can_be_laid_beside_a_patch_that_is_gone(llava: Tiny) -> None:
    xyz = beside(llava)["xyz"]
    first = vlm_budget.patch(llava.model, "segpruner", BUDGET)
    second = vlm_budget.patch(llava.model, "quota", BUDGET)
    with pytest.raises(PatchError, match="replaced by a later one"):
        first.views(token_xyz=xyz)
    second.undo()
    with pytest.raises(PatchError, match="this patch was undone"):
        second.frames([1.0, 2.0, 3.0])


def test_what_says_nothing_without_depth_does_not_take_the_views_away(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, "segpruner", BUDGET) as handle:
        for alone in ({"fit": "pad"}, {"size": (8, 8)}):
            with pytest.raises(GeometryError, match="missing"):
                handle.views(**alone)


@pytest.mark.filterwarnings("error:.*beside the prompt")
def test_where_all_stays_nothing_is_missing(llava: Tiny) -> None:
    for method in ("segpruner", "quota"):
        with vlm_budget.patch(llava.model, method, 1.0), torch.no_grad():
            llava.model(**llava.clone())


@pytest.mark.parametrize(
    "scores", [[], "abc", [[]], 0.5, [0.1, float("nan")], [float("inf")], [-0.1, 1], [[1.0], "x"], [10**400]]
)
def test_what_is_no_scores_is_refused_at_once(llava: Tiny, scores: Any) -> None:
    with vlm_budget.patch(llava.model, "quota", BUDGET) as handle, pytest.raises(FrameScoreError):
        handle.frames(scores)


def test_a_method_that_does_not_look_says_which_do(llava: Tiny) -> None:
    with vlm_budget.patch(llava.model, "hired", BUDGET) as handle:
        with pytest.raises(PatchError, match=r"HiRED\(\) does not look at geometry.*'segpruner'"):
            handle.views(token_xyz=beside(llava)["xyz"])
        with pytest.raises(PatchError, match="scores of frames.*'quota'"):
            handle.frames([1.0, 2.0])
    with vlm_budget.patch(llava.model, "quota", BUDGET) as handle, pytest.raises(PatchError, match="of must be one of"):
        handle.frames([1.0], of="video")


def test_a_score_per_frame_serves_where_two_frames_make_a_partition() -> None:
    tiny = fresh("qwen2_vl_video")
    each = beside(tiny)["scores"]
    with vlm_budget.patch(tiny.model, "quota", BUDGET) as handle, torch.no_grad():
        lay(handle, tiny)
        merged = tiny.model(**tiny.clone()).logits
        handle.frames([torch.stack([own, own / 2], 1).flatten() for own in each])
        assert torch.equal(tiny.model(**tiny.clone()).logits, merged)


@pytest.mark.parametrize(("method", "name"), [("segpruner", "llava"), ("quota", "llava_onevision_video")])
def test_features_encoded_before_it_was_laid_beside_follow_it(method: str, name: str) -> None:
    tiny = fresh(name)
    if "mm_encoder_outputs" not in inspect.signature(tiny.model.forward).parameters:
        pytest.skip(f"the model of transformers {transformers.__version__} itself takes no encoded features")
    with vlm_budget.patch(tiny.model, method, BUDGET) as handle, torch.no_grad():
        encoded = encode(tiny.model, tiny.clone())
        lay(handle, tiny)
        expected = tiny.model(**tiny.clone()).logits
        given = {key: value for key, value in tiny.clone().items() if "pixel_values" not in key}
        assert torch.equal(tiny.model(**given, mm_encoder_outputs=encoded).logits, expected)


@pytest.mark.parametrize("name", ["llava", "llava_onevision_multi", "qwen2_vl"])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_share_what_was_laid_beside(name: str, options: dict[str, int]) -> None:
    tiny = fresh(name)
    single = row_inputs(tiny, 0)
    if FLOOR and name != "qwen2_vl":
        # Not ours to mend: the first beam of pictures a and b gets a twice, the second gets b twice.
        pytest.skip(f"transformers {transformers.__version__} itself repeats pictures one by one for beams")
    unpatched_or_skip(lambda: generate(tiny.model, single, **options), None, "beams")
    with vlm_budget.patch(tiny.model, "segpruner", BUDGET) as handle:
        lay(handle, tiny, 0)
        generate(tiny.model, single)
        once = handle.kept()[0].positions
        generate(tiny.model, single, **options)
        assert handle.kept()[0].positions == once


def test_a_copy_of_a_patched_model_has_it_too() -> None:
    tiny = fresh("llava")
    with vlm_budget.patch(tiny.model, "segpruner", BUDGET) as handle, torch.no_grad():
        lay(handle, tiny)
        expected = tiny.model(**tiny.clone()).logits
        twin = copy.deepcopy(tiny.model)
        assert torch.equal(twin(**tiny.clone()).logits, expected)
        vlm_budget.unpatch(twin)


@pytest.mark.parametrize("name", ["llava_onevision_video", "llava_next_video"])
def test_a_frame_of_weight_gets_its_grid_from_before_the_pooling(name: str) -> None:
    model = fresh(name).model
    _, base, _ = find_family(model)
    frames = torch.randn(1, 8, 3, SIDE, SIDE)
    newline = int(name == "llava_onevision_video")
    encoded = sizes(model, "video", frames)[0] + newline * int(FLOOR)  # up to 4.x the newline is added in the forward
    inputs = batch([[5, *run(VIDEO, encoded), 7]]) | {"pixel_values_videos": frames}
    with torch.no_grad():
        hidden = base.vision_tower(frames[0, 1:2], output_hidden_states=True).hidden_states
        hidden = hidden[base.config.vision_feature_layer]
        hidden = hidden[:, 1:] if base.config.vision_feature_select_strategy == "default" else hidden
        grid = base.multi_modal_projector(hidden)[0]
    scores = torch.zeros(8)
    scores[1] = 1
    with vlm_budget.patch(model, "quota", len(grid) + newline) as handle, recorded(language_model(model)) as seen:
        handle.frames(scores)
        with torch.no_grad():
            model(**inputs)
        (item,) = handle.kept()
    assert len(grid) > item.item.shown[1], "frames are pooled"
    embeds = seen[0]["inputs_embeds"][0]
    assert len(embeds) == len(grid) + newline + 2
    torch.testing.assert_close(embeds[1 : 1 + len(grid)], grid, **TOLERANCE)
