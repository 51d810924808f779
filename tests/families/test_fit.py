"""What a token lies at is what the family's processor shows it, for pixels that hold their own coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tiny_encoders import family_of
from tiny_models import Tiny, build
from vlm_budget.errors import GeometryError
from vlm_budget.geometry import Fit, token_coordinates
from vlm_budget.layout import VisualItem

CELL = 8  # pixels along a token in all set-ups
# Padding of this mean is black; bilinear, for cubics ring beside it.
PLAIN = {"do_rescale": False, "do_normalize": False, "image_mean": [0.0, 0.0, 0.0], "resample": 2}
SIZES = [(48, 48), (60, 90), (90, 61), (37, 101), (110, 40), (96, 96)]

Run = Callable[[list[np.ndarray], int], dict[str, Any]]


def coordinates(size: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] of 8 bits: how far to the right, how far down, and that here is a picture."""
    down, right = np.mgrid[0 : size[0], 0 : size[1]]
    return (
        (np.stack([(right + 0.5) / size[1], (down + 0.5) / size[0], 1 + 0 * right], -1) * 255).round().astype("uint8")
    )


def anyres(name: str, several: bool = False) -> Run:
    def run(pictures: list[np.ndarray], side: int) -> dict[str, Any]:
        square = {"height": side, "width": side}
        pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [side, 3 * side]]
        size = square if name == "LlavaOnevision" else {"shortest_edge": side}
        make = getattr(transformers, f"{name}ImageProcessor")
        extra = {} if name == "LlavaOnevision" else {"crop_size": square}
        processor = make(size=size, image_grid_pinpoints=pinpoints, **extra, **PLAIN)
        return processor([pictures] if several else pictures, return_tensors="pt", input_data_format="channels_last")

    return run


def square(name: str, **options: Any) -> Run:
    def run(pictures: list[np.ndarray], side: int) -> dict[str, Any]:
        given = {"size": {"height": side, "width": side}} | {
            key: value(side) if callable(value) else value for key, value in options.items()
        }
        processor = getattr(transformers, f"{name}ImageProcessor")(**given, **PLAIN)
        return processor(pictures, return_tensors="pt", input_data_format="channels_last")

    return run


def cropped(name: str) -> Run:
    return square(
        name,
        size=lambda side: {"shortest_edge": side},
        crop_size=lambda side: {"height": side, "width": side},
    )


def qwen(pictures: list[np.ndarray], side: int) -> dict[str, Any]:
    options = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    processor = transformers.Qwen2VLImageProcessor(min_pixels=16 * 16, max_pixels=80 * 80, **options, **PLAIN)
    return processor(pictures, return_tensors="pt", input_data_format="channels_last")


def whole_tile(side: int) -> dict[str, int]:
    return {"longest_edge": side}


@dataclass(frozen=True)
class Case:
    """A set-up of ``tiny_models`` and its processor; several sides are those of the tower's picture."""

    setup: str
    run: Run
    sides: tuple[int, ...] = (48,)


# 50 pixels leave two that no patch of 8 looks at, as 384 leave six of patches of 14.
CASES = {
    "llava": Case("llava", cropped("Llava"), (48, 50)),
    "llava, CLIP's processor": Case("llava", cropped("CLIP"), (48, 50)),
    "llava_next": Case("llava_next", anyres("LlavaNext"), (48, 50)),
    "llava_next_video": Case("llava_next_video_image", anyres("LlavaNext")),
    "llava_onevision, one picture": Case("llava_onevision", anyres("LlavaOnevision"), (48, 50)),
    "llava_onevision, several": Case("llava_onevision", anyres("LlavaOnevision", several=True), (48, 50)),
    "internvl": Case("internvl", square("GotOcr2", crop_to_patches=False), (48, 50)),
    "qwen2_vl": Case("qwen2_vl", qwen),
    "qwen2_5_vl": Case("qwen2_5_vl", qwen),
    "qwen3_vl": Case("qwen3_vl", qwen),
    "paligemma": Case("paligemma", square("Siglip"), (48, 50)),
    "gemma3": Case("gemma3", square("Gemma3")),
    "idefics3": Case(
        "idefics3", square("Idefics3", size=whole_tile, max_image_size=whole_tile, do_image_splitting=False)
    ),
    "smolvlm": Case("smolvlm", square("SmolVLM", size=whole_tile, max_image_size=whole_tile, do_image_splitting=False)),
}
RUNS = [pytest.param(case, side, id=f"{name}, {side}") for name, case in CASES.items() for side in case.sides]


@cache
def model(setup: str, side: int) -> Tiny:
    """The set-up's model, told that its tower takes pictures of another side: nothing is encoded here."""
    tiny = build(setup)
    vision = tiny.model.config.vision_config
    if hasattr(vision, "image_size"):
        vision.image_size = [side, side] if isinstance(vision.image_size, list | tuple) else side
    if hasattr(tiny.model.config, "image_grid_pinpoints"):
        pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [side, 3 * side]]
        tiny.model.config.image_grid_pinpoints = pinpoints
        tiny.model.config.vision_aspect_ratio = "anyres_max_9"  # no mosaic is shrunk
    return tiny


def shown(given: dict[str, Any], picture: int, item: VisualItem) -> list[torch.Tensor]:
    """Per partition the [rows, cols, 3] mean colours of its tokens' cells, as the tower is given them."""
    if "image_grid_thw" in given:
        grids = given["image_grid_thw"]
        patches = given["pixel_values"].split(grids.prod(1).tolist())[picture]
        _, rows, cols = (grids[picture] // torch.tensor([1, 2, 2])).tolist()
        return [patches.reshape(rows, cols, 4, 3, 2 * 4 * 4).float().mean((2, 4))]
    pixels = given["pixel_values"].float()
    if "pixel_attention_mask" in given or pixels.ndim == 5 and pixels.shape[0] == 1 != len(SIZES):
        pixels = pixels.flatten(0, 1)[:, None]
    planes = pixels[picture] if pixels.ndim == 5 else pixels[picture][None]
    found = []
    for plane, grid in zip(planes, item.partitions, strict=False):
        cells = plane[:, : grid.rows * CELL, : grid.cols * CELL]
        found.append(cells.reshape(3, grid.rows, CELL, grid.cols, CELL).mean((2, 4)).permute(1, 2, 0))
    return found


@pytest.mark.parametrize(("case", "side"), RUNS)
def test_a_token_lies_where_the_processor_took_its_pixels_from(case: Case, side: int) -> None:
    tiny = model(case.setup, side)
    family, base = family_of(tiny), tiny.model.model
    given = case.run([coordinates(size) for size in SIZES], side)
    items = family.items(base, "image", dict(given))
    assert len(items) == len(SIZES)
    compared = dark = 0
    for picture, (item, size) in enumerate(zip(items, SIZES, strict=True)):
        fit = family.fit(base, "image", item)
        # With depth 1 everywhere and a camera that does nothing, places are pixels.
        places = token_coordinates(item, torch.ones(size), torch.eye(4), torch.eye(3), fit)
        colours = torch.cat([cells.flatten(0, 1) for cells in shown(given, picture, item)])[item.place] / 255
        for token in item.candidates.tolist():
            right, down, share = colours[token].tolist()
            x, y, _ = places[token].tolist()
            if share < 0.08:
                assert math.isnan(x)
                dark += 1
            elif share > 0.2:
                pixel = max(size) / side  # of the tower's, in the picture
                assert abs(right / share * size[1] - 0.5 - x) < 0.2 * max(pixel, 1)
                assert abs(down / share * size[0] - 0.5 - y) < 0.2 * max(pixel, 1)
                compared += 1
    assert compared > 20 * len(SIZES)
    assert (dark > 0) == (case.run is CASES["llava_onevision, several"].run)


def test_a_picture_padded_to_a_square_is_seen_from_far_if_it_is_taken_to_be_squeezed() -> None:
    """That the comparison above would notice."""
    tiny = model("llava_onevision", 48)
    family, base = family_of(tiny), tiny.model.model
    given = CASES["llava_onevision, several"].run([coordinates((60, 90)), coordinates((60, 90))], 48)
    item = family.items(base, "image", dict(given))[0]
    assert family.fit(base, "image", item) == Fit("pad")
    padded, squeezed = (
        token_coordinates(item, torch.ones(60, 90), torch.eye(4), torch.eye(3), fit) for fit in (Fit("pad"), Fit())
    )
    assert padded[:, 0][item.candidates].isnan().view(6, 6).all(1).tolist() == [True, *[False] * 4, True]
    assert float((padded - squeezed).nan_to_num()[:, 1].abs().max()) > 5


def test_released_siglip_leaves_six_pixels_unseen() -> None:
    tiny = model("llava_onevision", 48)
    tiny.model.config.vision_config.image_size, tiny.model.config.vision_config.patch_size = 384, 14
    try:
        family, base = family_of(tiny), tiny.model.model
        video = family.items(base, "video", {"pixel_values_videos": torch.zeros(1, 2, 3, 384, 384)})[0]
        assert family.fit(base, "video", video).covered == 378 / 384
        assert family.fit(base, "video", video).kind == "stretch"
    finally:
        tiny.model.config.vision_config.image_size, tiny.model.config.vision_config.patch_size = 48, 8


@pytest.mark.parametrize("setup", ["qwen2_vl", "llava_onevision", "llava_next"])
def test_depth_of_another_aspect_ratio_is_noticed_where_the_model_is_told(setup: str) -> None:
    name = {"qwen2_vl": "qwen2_vl", "llava_next": "llava_next"}.get(setup, "llava_onevision, several")
    tiny = model(setup, 48)
    family, base = family_of(tiny), tiny.model.model
    given = CASES[name].run([coordinates((60, 90)), coordinates((60, 90))], 48)
    item = family.items(base, "image", dict(given))[0]
    fit = family.fit(base, "image", item)
    token_coordinates(item, torch.ones(30, 45), torch.eye(4), torch.eye(3), fit)
    with pytest.raises(GeometryError, match="another aspect ratio"):
        token_coordinates(item, torch.ones(90, 60), torch.eye(4), torch.eye(3), fit)
