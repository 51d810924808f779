"""Every frame its own grid before the tower: sums that meet the budget, shapes that are kept, models that run."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from PIL import Image

import tiny_models
from tiny_parts import IMAGE, VIDEO
from tiny_processors import onevision_processor, qwen_processor
from vlm_budget.errors import OptionError, UnsupportedModelError
from vlm_budget.video.frames.pixels import fit_grids, native_grid, own_grids, pixel_inputs, resized, token_side

WIDE, SQUARE, TALL = (64, 36), (48, 48), (36, 64)
QWENS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
COUNTS, TIMES = (12, 3, 20, 7, 1), (0.0, 1.5, 2.25, 8.0, 9.0)


def frames(count: int = 5, size: tuple[int, int] = WIDE) -> list[Image.Image]:
    return [Image.new("RGB", size, (40 * number, 90, 0)) for number in range(count)]


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [WIDE, SQUARE, TALL, (500, 100)])
@pytest.mark.parametrize("count", [1, 2, 8, 40])
def test_the_sum_is_met_or_missed_by_little_and_never_exceeded(size: tuple[int, int], count: int) -> None:
    draw = random.Random(count)
    counts = [draw.randint(1, 300) for _ in range(count)]
    fitted = fit_grids(counts, [size] * count)
    assert fitted.budget == sum(counts) and fitted.gap == sum(counts) - sum(fitted.tokens) >= 0
    assert fitted.gap == 0 if count >= 40 else fitted.gap <= 0.1 * sum(counts)
    assert all(rows >= 1 and cols >= 1 for rows, cols in fitted.grids)
    for (rows, cols), asked in zip(fitted.grids, counts, strict=True):
        if asked >= 30:
            assert abs(rows * cols - asked) <= 0.3 * asked
        if rows * cols >= 16:
            assert 1 / 1.4 < cols / rows / (size[0] / size[1]) < 1.4


def test_what_is_left_over_is_spent_as_no_other_grids_could() -> None:
    counts, allowed = (5, 7, 11), ((4, 6, 9), (6, 9), (9, 12))  # areas of squares: the largest within, and above
    fitted = fit_grids(counts, [SQUARE] * 3)
    best = max(sum(three) for three in itertools.product(*allowed) if sum(three) <= sum(counts))
    assert sum(fitted.tokens) == best == 22
    assert fitted.gap == 1
    assert all(area in areas for area, areas in zip(fitted.tokens, allowed, strict=True))


def test_counts_that_are_products_stay_as_they_are() -> None:
    fitted = fit_grids((36, 4, 144), [SQUARE] * 3)
    assert fitted.grids == ((6, 6), (2, 2), (12, 12)) and fitted.gap == 0


def test_a_cap_holds_for_what_is_taken_over() -> None:
    free, capped = (fit_grids((15, 15), [SQUARE] * 2, cap) for cap in (None, 15))
    assert (sorted(free.tokens), capped.tokens) == ([12, 16], (12, 12))


@pytest.mark.parametrize(("counts", "sizes"), [((1, 0), 2), ((-1,), 1), ((3, 3), 1)])
def test_counts_that_fit_no_frames_are_refused(counts: tuple[int, ...], sizes: int) -> None:
    with pytest.raises(OptionError, match="at least 1 token"):
        fit_grids(counts, [SQUARE] * sizes)


# --- processors and models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWENS)
@pytest.mark.parametrize("times", [(), TIMES])
def test_models_get_the_intended_grids_and_run(name: str, times: tuple[float, ...]) -> None:
    processor, tiny = qwen_processor(name), tiny_models.qwen(name)
    fitted = fit_grids(COUNTS, [WIDE] * 5)
    assert fitted.gap == 0
    inputs = pixel_inputs(processor, "what is it?", frames(), fitted.grids, tiny.model, times)
    as_videos = name == "Qwen3VL" and bool(times)
    grids = inputs["video_grid_thw" if as_videos else "image_grid_thw"].tolist()
    assert grids == [[1, 2 * rows, 2 * cols] for rows, cols in fitted.grids]
    token = VIDEO if as_videos else IMAGE
    assert int((inputs["input_ids"] == token).sum()) == sum(COUNTS)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    stamps = [text.find(f"<{time:.1f} seconds>") for time in times]
    assert all(place >= 0 for place in stamps) and stamps == sorted(stamps)
    with torch.no_grad():
        ids = tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        logits = tiny.model(**inputs).logits
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 2 and logits.isfinite().all()


def test_pixels_are_the_frames_at_the_size_of_their_grids() -> None:
    processor, tiny = qwen_processor(), tiny_models.qwen("Qwen2VL")
    (frame,) = frames(1)
    inputs = pixel_inputs(processor, "what?", [frame], [(3, 5)], tiny.model)
    small = resized(frame, (3, 5), token_side(processor))
    assert small.size == (40, 24)
    alone = processor.image_processor(images=[small], do_resize=False, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])


def test_the_native_grid_is_the_processors_own() -> None:
    assert native_grid(qwen_processor(), frames(1, (64, 36))[0]) == (4, 8)
    assert native_grid(qwen_processor(), frames(1, (200, 200))[0]) == (8, 8)


def test_other_processors_are_refused() -> None:
    processor = onevision_processor()
    assert not own_grids(processor)
    with pytest.raises(UnsupportedModelError, match="LlavaOnevisionProcessor gives no picture"):
        pixel_inputs(processor, "what?", frames(1), [(1, 1)], None)


@pytest.mark.parametrize(("grids", "times"), [([(1, 1)], ()), ([(1, 1)] * 2, (0.0,))])
def test_frames_grids_and_times_belong_together(grids: list[tuple[int, int]], times: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="as many grids and times"):
        pixel_inputs(qwen_processor(), "what?", frames(2), grids, None, times)
