import numpy as np
import torch

from vlm_budget.eval.nano.scene import COLOR_NAMES
from vlm_budget.eval.vit.pages import BACKGROUND, CLASSES, KEY, KINDS, NO_COLOR, PATCH, images, labels, pages


def test_a_page_depends_on_seed_and_index_alone() -> None:
    longer, shorter = pages(6, 7), pages(3, 7)
    for a, b in zip(longer, shorter, strict=False):
        assert np.array_equal(a.pixels, b.pixels)
    assert not np.array_equal(longer[0].pixels, longer[1].pixels)
    assert not np.array_equal(longer[0].pixels, pages(1, 8)[0].pixels)


def test_the_class_is_the_digit_in_the_colour_of_the_key() -> None:
    for page in pages(40, 11):
        (key,) = set(page.colors[page.kinds == KEY])
        alike = (page.colors == key) & (page.kinds < CLASSES)
        assert set(page.kinds[alike]) == {page.label}
        assert np.array_equal(alike, page.asked)


def test_labels_fit_the_heads_and_all_classes_occur() -> None:
    drawn = pages(200, 12)
    kinds, colors = np.stack([page.kinds for page in drawn]), np.stack([page.colors for page in drawn])
    assert set(kinds.flatten()) == set(range(KINDS))
    assert set(colors.flatten()) == set(range(len(COLOR_NAMES) + 1))
    assert np.array_equal(kinds == BACKGROUND, colors == NO_COLOR)
    counts = torch.bincount(labels(drawn), minlength=CLASSES)
    assert counts.min() >= 5
    assert {page.digits for page in drawn} == {3, 4, 5, 6}


def test_a_patch_says_what_its_pixels_show() -> None:
    # White marks are brighter in all channels than the page: patches labelled so must be, in raster order.
    white = COLOR_NAMES.index("white")
    found = 0
    for page in pages(60, 13):
        cells = page.pixels.reshape(12, PATCH, 12, PATCH, 3).transpose(0, 2, 1, 3, 4).reshape(144, -1, 3)
        bright = cells.min(-1).max(-1)
        page_level = np.median(cells.min(-1))
        marked = page.colors == white
        found += int(marked.sum())
        assert (bright[marked] > page_level + 30).all()
    assert found > 50


def test_images_are_what_the_model_is_fed() -> None:
    drawn = pages(2, 14)
    fed = images(drawn)
    assert fed.shape == (2, 3, 96, 96)
    assert fed.dtype == torch.float32
    torch.testing.assert_close(fed[1, 2, 5, 7], torch.tensor((float(drawn[1].pixels[5, 7, 2]) - 100) / 55))
