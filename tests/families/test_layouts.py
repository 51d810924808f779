"""Where the tokens are: sizes, separators, and which pixels a token shows."""

from __future__ import annotations

import math

import pytest
import torch

from tiny_encoders import PIXELS, arguments, family_of, modalities, observe
from tiny_models import Tiny, build
from tiny_parts import IMAGE, SIDE, VIDEO
from vlm_budget.errors import LayoutError
from vlm_budget.families.anyres import crop_grid
from vlm_budget.layout import VisualItem, group_rows

TOKENS = {"image": IMAGE, "video": VIDEO}


def test_item_sizes_add_up_to_the_placeholders_of_their_prompts(setup: Tiny) -> None:
    for modality in modalities(setup):
        items = observe(setup, modality)[1].items
        counts = (setup.inputs["input_ids"] == TOKENS[modality]).sum(1).tolist()
        rows = group_rows(items, counts)
        assert rows is not None
        assert [sum(item.size for item in row) for row in rows] == counts
        assert all(item.modality == modality for item in items)


def test_features_are_the_embeddings_the_model_puts_in_place(setup: Tiny) -> None:
    seen: list[torch.Tensor] = []
    language_model = family_of(setup).language_model(setup.model.model)
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        setup.model(**setup.clone())
    hook.remove()
    for modality in modalities(setup):
        observed = observe(setup, modality)[1]
        placed = seen[0][setup.inputs["input_ids"] == TOKENS[modality]]
        assert [len(part) for part in observed.features] == [item.size for item in observed.items]
        assert torch.equal(torch.cat(observed.features), placed)


def test_layouts_are_well_formed(setup: Tiny) -> None:
    for modality in modalities(setup):
        for item in observe(setup, modality)[1].items:
            assert item.partition.dtype == item.patch.dtype == item.line.dtype == torch.int64
            assert len(item.partition) == len(item.patch) == len(item.line)
            assert torch.equal(item.partition < 0, item.patch < 0)
            tokens = item.candidates
            places = list(zip(item.partition[tokens].tolist(), item.patch[tokens].tolist(), strict=True))
            assert len(set(places)) == len(places), "two tokens in one place"
            for index, grid in enumerate(item.partitions):
                assert (item.patch[item.partition == index] < grid.rows * grid.cols).all()


def test_separators_are_where_the_features_are_the_newline_vector(setup: Tiny) -> None:
    newline = getattr(setup.model.model, "image_newline", None)
    for modality in modalities(setup):
        observed = observe(setup, modality)[1]
        for item, features in zip(observed.items, observed.features, strict=True):
            if newline is None:
                assert not len(item.separators)
            else:
                assert torch.equal((features == newline).all(1), item.partition < 0)


def test_a_separator_shares_its_line_with_the_tokens_before_it(setup: Tiny) -> None:
    for modality in modalities(setup):
        for item in observe(setup, modality)[1].items:
            ends = [-1, *item.separators.tolist()]
            for start, end in zip(ends, ends[1:], strict=False):
                members = item.line[start + 1 : end + 1]
                mosaic = members[members >= 0]
                assert len(mosaic) > 1 and (mosaic == mosaic[-1]).all()
                assert (members[len(members) - len(mosaic) :] >= 0).all()
            used = [int(item.line[end]) for end in ends[1:]]
            assert used == sorted(set(used))


# --- which pixels a token shows --------------------------------------------------------------------------------------


def without_mixing(tiny: Tiny) -> None:
    """Cut the attention of the tower, so that a patch shows its own pixels and nothing else."""
    family, base = family_of(tiny), tiny.model.model
    for layer in family.vision_layers(base):
        attention = family.layer_attention(layer)
        for name in ("out_proj", "projection_layer", "proj"):
            if hasattr(attention, name):
                torch.nn.init.zeros_(getattr(attention, name).weight)
                torch.nn.init.zeros_(getattr(attention, name).bias)


def to_patches(frames: torch.Tensor) -> torch.Tensor:
    """[T, 3, H, W] frames to Qwen's [patches, 3 * 2 * 4 * 4], in the order of its processor."""
    t, height, width = len(frames) // 2, frames.shape[2] // 8, frames.shape[3] // 8
    blocks = frames.reshape(t, 2, 3, height, 2, 4, width, 2, 4)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * height * width * 4, -1)


def to_frames(patches: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """The inverse of :func:`to_patches`."""
    t, height, width = grid[0], grid[1] // 2, grid[2] // 2
    blocks = patches.reshape(t, height, width, 2, 2, 3, 2, 4, 4)
    return blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(2 * t, 3, 8 * height, 8 * width)


def test_patches_are_in_the_order_of_qwens_processor() -> None:
    from transformers import Qwen2VLImageProcessor

    off = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), False)
    processor = Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, **off)
    image = torch.randint(1, 255, (3, 40, 48), dtype=torch.uint8)
    pixels = processor([image.permute(1, 2, 0).numpy()], return_tensors="pt", input_data_format="channels_last")
    frames = image.float().expand(2, 3, 40, 48)
    assert torch.equal(pixels["pixel_values"].float(), to_patches(frames))
    assert torch.equal(to_frames(to_patches(frames), [1, 10, 12]), frames)


def poked(tiny: Tiny, modality: str, items: list[VisualItem], place: tuple[int, int, int, int]) -> torch.Tensor:
    """The set-up's pixels with those of one cell changed: of ``(item, partition, row, column)``."""
    number, partition, row, col = place
    pixels = tiny.inputs[PIXELS[modality]].clone()
    if tiny.family.startswith("qwen"):
        grids = tiny.inputs[f"{modality}_grid_thw"].tolist()
        parts = list(pixels.split([math.prod(grid) for grid in grids]))
        frames = to_frames(parts[number], grids[number])
        frames[items[number].partitions[partition].time, :, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8] += 1
        parts[number] = to_patches(frames)
        return torch.cat(parts)
    if tiny.family in ("idefics3", "smolvlm"):
        plane = [pixels[tuple(place)] for place in pixels.flatten(2).any(2).nonzero().tolist()][number]
    else:
        plane = pixels[number, partition] if pixels.ndim == 5 else pixels[number]
    height = SIDE // items[number].partitions[partition].rows
    width = SIDE // items[number].partitions[partition].cols
    plane[:, row * height : (row + 1) * height, col * width : (col + 1) * width] += 1
    return pixels


def test_a_token_shows_the_pixels_of_its_cell_and_no_others(copied: Tiny) -> None:
    without_mixing(copied)
    for modality in modalities(copied):
        before = observe(copied, modality)[1]
        items = before.items
        named = 0
        for number, item in enumerate(items):
            shrunk = copied.family == "llava_onevision" and len(item.partitions) > 1 and modality == "image"
            for index, grid in enumerate(item.partitions):
                # One corner, the opposite one and a cell off both diagonals: swapped rows and columns would show.
                for row, col in ((0, grid.cols - 1), (grid.rows - 1, 0), (1, 0)):
                    place = (number, index, row, col)
                    after = observe(copied, modality, pixels=poked(copied, modality, items, place))[1]
                    changed = [(a != b).any(1) for a, b in zip(after.features, before.features, strict=True)]
                    expected = (item.partition == index) & (item.patch == row * grid.cols + col)
                    assert not any(flags.any() for other, flags in enumerate(changed) if other != number)
                    if shrunk and index:  # a token of a shrunk mosaic mixes neighbouring patches
                        assert changed[number][expected].all()
                    else:
                        assert torch.equal(changed[number], expected)
                    named += int(expected.sum())
        assert named > len(items)


def test_tokens_of_a_shrunk_mosaic_are_named_after_the_patch_they_show_most_of() -> None:
    tiny = build("llava_onevision")
    base, side = tiny.model.model, SIDE // 8
    item = observe(tiny, "image")[1].items[2]
    count = len(item.partitions) * side**2
    assert item.size < count - side**2, "the set-up's square image must be shrunk"
    one_hot = torch.eye(count).reshape(len(item.partitions), side**2, count)
    weights, _ = base.pack_image_features(
        [one_hot], tiny.inputs["image_sizes"][2:], vision_aspect_ratio=base.config.vision_aspect_ratio
    )
    candidates = item.candidates
    named = (item.partition * side**2 + item.patch)[candidates]
    shown = weights[0]
    assert torch.allclose(shown.gather(1, named[:, None])[:, 0], shown.amax(1))


def test_only_an_image_alone_in_its_prompt_is_cut() -> None:
    items = observe(build("llava_onevision_multi"), "image")[1].items
    kinds = [[grid.kind for grid in item.partitions] for item in items]
    assert kinds == [["image"], ["image"], ["thumbnail", "crop", "crop", "crop", "crop"]]


def test_smolvlm_encodes_one_tile_of_an_empty_batch() -> None:
    tiny = build("smolvlm")
    empty = torch.zeros_like(tiny.inputs["pixel_values"])
    observed = observe(tiny, "image", pixels=empty)[1]
    assert [len(part) for part in observed.features] == [item.size for item in observed.items] == [36]


def test_frames_know_their_time() -> None:
    for name, times in (
        ("llava_next_video", [[0, 1, 2, 3]] * 2),
        ("llava_onevision_video", [[0, 1, 2]]),
        ("qwen2_vl_video", [[0, 2, 4], [0, 2]]),
        ("qwen2_5_vl_video", [[0, 2, 4], [0, 2]]),
        ("qwen3_vl_video", [[0, 2, 4], [0, 2]]),
    ):
        items = observe(build(name), "video")[1].items
        assert [[grid.time for grid in item.partitions] for item in items] == times
        assert {grid.kind for item in items for grid in item.partitions} == {"frame"}


def test_features_of_another_length_than_the_layout_are_refused(setup: Tiny) -> None:
    modality = modalities(setup)[0]
    output, observed = observe(setup, modality)
    with pytest.raises(LayoutError, match="its layout says"):
        family_of(setup).features(setup.model.model, modality, output, observed.items[:-1])


# --- crops -----------------------------------------------------------------------------------------------------------

# Height, width and the crop grid of the released choice among 1 x 2, 2 x 1, 2 x 2 and 1 x 3.
PICTURES = {
    (48, 96): (1, 2),
    (40, 90): (1, 2),
    (30, 44): (1, 2),
    (96, 40): (2, 1),
    (100, 60): (2, 2),
    (120, 50): (2, 1),
    (90, 90): (2, 2),
    (96, 80): (2, 2),
    (40, 130): (1, 3),
    (48, 144): (1, 3),
    (33, 150): (1, 3),
}


def picture_item(tiny: Tiny, size: tuple[int, int]) -> VisualItem:
    inputs = arguments(tiny, "image") | {"image_sizes": torch.tensor([size])}
    inputs.pop("batch_num_images", None)
    return family_of(tiny).items(tiny.model.model, "image", inputs)[0]


@pytest.mark.parametrize("size", PICTURES)
def test_the_centre_of_every_thumbnail_patch_lies_under_exactly_one_crop(size: tuple[int, int]) -> None:
    tiny = build("llava_next")
    item = picture_item(tiny, size)
    grid = PICTURES[size]
    assert crop_grid(size, tiny.model.config.image_grid_pinpoints, SIDE) == grid
    thumbnail, *crops = item.partitions
    assert thumbnail.kind == "thumbnail" and [crop.kind for crop in crops] == ["crop"] * (grid[0] * grid[1])
    for row in range(thumbnail.rows):
        for col in range(thumbnail.cols):
            x, y = (col + 0.5) / thumbnail.cols, (row + 0.5) / thumbnail.rows
            under = [c for c in crops if c.box[0] <= x < c.box[2] and c.box[1] <= y < c.box[3]]
            assert len(under) == 1


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video_image", "llava_onevision"])
@pytest.mark.parametrize("size", PICTURES)
def test_boxes_are_where_the_processor_cut_the_picture(name: str, size: tuple[int, int]) -> None:
    """Pixels that hold their own coordinates, through the real processor: a token's patch shows what its box says."""
    import numpy as np
    import transformers

    ys, xs = np.mgrid[0 : size[0], 0 : size[1]]
    picture = np.stack([(xs + 0.5) / size[1], (ys + 0.5) / size[0], 0 * xs], -1) * 255
    onevision = name == "llava_onevision"
    make = transformers.LlavaOnevisionImageProcessor if onevision else transformers.LlavaNextImageProcessor
    square = {"height": SIDE, "width": SIDE}
    tiny = build(name)
    processor = make(
        size=square if onevision else {"shortest_edge": SIDE},
        crop_size=square,
        image_grid_pinpoints=tiny.model.config.image_grid_pinpoints,
        do_normalize=False,
        do_rescale=False,
    )
    pixels = processor([picture.round().astype("uint8")], return_tensors="pt", input_data_format="channels_last")
    shown = pixels["pixel_values"][0].float() / 255
    item = picture_item(tiny, size)
    assert len(item.partitions) == len(shown)
    checked = 0
    for index, patch in zip(item.partition.tolist(), item.patch.tolist(), strict=True):
        if index < 0:
            continue
        grid = item.partitions[index]
        row, col = divmod(patch, grid.cols)
        left, top, right, bottom = grid.box
        width, height = (right - left) / grid.cols, (bottom - top) / grid.rows
        x, y = left + col * width, top + row * height
        if min(x, y) < -1e-6 or max(x + width, y + height) > 1 + 1e-6:
            continue  # partly in the padding
        cell = shown[index, :2, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8].mean((1, 2))
        assert torch.allclose(cell, torch.tensor([x + width / 2, y + height / 2]), atol=0.015)
        checked += 1
    assert checked > item.size / 2
