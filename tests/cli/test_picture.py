"""The drawing: a panel per partition, kept cells bright, dropped ones dim, padding grey."""

import itertools

import pytest
import torch
from PIL import Image

from vlm_budget.layout import Partition, VisualItem
from vlm_budget.panels import DROPPED, KEPT, NO_TOKEN, Panel, arrange
from vlm_budget.picture import draw_kept, place
from vlm_budget.report import KeptItem

WHITE = Image.new("RGB", (90, 60), "white")
BLANK = (44, 48, 58)


def kept_item(
    grids: list[Partition], every: int = 3, modality: str = "image", lost: frozenset[tuple[int, int]] = frozenset()
) -> KeptItem:
    """Every ``every``-th token of the grids kept; ``lost`` (partition, patch) pairs have no token."""
    places = [
        (index, patch)
        for index, grid in enumerate(grids)
        for patch in range(grid.rows * grid.cols)
        if (index, patch) not in lost
    ]
    partition, patch = (torch.tensor(column) for column in zip(*places, strict=True))
    item = VisualItem(modality, tuple(grids), partition, patch, torch.full_like(patch, -1))
    return KeptItem(0, item, tuple(range(0, len(places), every)))


def crop(row: int, col: int, rows: int, cols: int, side: int = 4) -> Partition:
    return Partition("crop", side, side, (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows))


def mosaic(rows: int, cols: int, side: int = 4) -> list[Partition]:
    crops = [crop(row, col, rows, cols, side) for row in range(rows) for col in range(cols)]
    return [Partition("thumbnail", side, side), *crops]


LAYOUTS = {
    "one image": ([Partition("image", 5, 7)], (90, 60), "image"),
    "mosaic": (mosaic(2, 2), (90, 60), "image"),
    "many crops": (mosaic(6, 6, 24), (900, 700), "image"),
    "portrait": (mosaic(4, 1), (40, 300), "image"),
    "landscape": (mosaic(1, 5), (300, 40), "image"),
    "sliver": (mosaic(1, 3), (1000, 4), "image"),
    "one pixel": (mosaic(2, 2), (1, 1), "image"),
    "thumbnail last": (mosaic(2, 3)[::-1], (90, 60), "image"),
    "video": ([Partition("frame", 3, 5, time=time) for time in range(13)], (64, 48), "video"),
}


def middle(page: Image.Image, panel: Panel, row: int, col: int) -> tuple[int, ...]:
    left, top, right, bottom = panel.cell_box(row, col)
    return page.getpixel(((left + right) // 2, (top + bottom) // 2))


def overlap(one: Panel, other: Panel) -> bool:
    return all(
        start < other_start + other_size and other_start < start + size
        for start, size, other_start, other_size in (
            (one.left, one.size[0], other.left, other.size[0]),
            (one.top, one.size[1], other.top, other.size[1]),
        )
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_partition_has_a_panel_of_its_own_on_the_page(name: str) -> None:
    grids, size, modality = LAYOUTS[name]
    entry = kept_item(grids, modality=modality)
    (block,) = place([size], [entry], titled=True)
    assert [panel.partition for panel in block.panels] == grids
    assert not any(overlap(*pair) for pair in itertools.combinations(block.panels, 2))
    page = draw_kept([Image.new("RGB", size)], [entry], "a title", ["a name"])
    assert all(panel.left + panel.size[0] < page.width for panel in block.panels)
    assert all(panel.top + panel.size[1] < page.height for panel in block.panels)


@pytest.mark.parametrize("name", LAYOUTS)
def test_captions_count_every_token_once(name: str) -> None:
    grids, size, modality = LAYOUTS[name]
    entry = kept_item(grids, modality=modality)
    counts = [tuple(map(int, panel.counts.split("/"))) for panel in arrange(entry, size).panels]
    assert sum(kept for kept, _ in counts) == len(entry.positions)
    assert sum(total for _, total in counts) == entry.item.size


def test_crops_stand_as_they_lie_in_the_picture() -> None:
    panels = arrange(kept_item(mosaic(2, 3)), (90, 60)).panels
    thumbnail, crops = panels[0], panels[1:]
    assert all(panel.left > thumbnail.left + thumbnail.size[0] for panel in crops)
    assert [panel.left for panel in crops[:3]] == [panel.left for panel in crops[3:]] == sorted({p.left for p in crops})
    assert len({panel.top for panel in crops[:3]}) == len({panel.top for panel in crops[3:]}) == 1
    assert crops[0].top < crops[3].top


def test_kept_cells_are_bright_dropped_cells_dark_and_padding_grey() -> None:
    lost = frozenset((1, patch) for patch in range(4))  # the top row of the first crop
    entry = kept_item(mosaic(2, 2), lost=lost)
    page = draw_kept([WHITE], [entry], "a title")
    seen = set()
    for panel in place([WHITE.size], [entry], titled=True)[0].panels:
        for row, col in itertools.product(range(panel.partition.rows), range(panel.partition.cols)):
            state = panel.cells[row * panel.partition.cols + col]
            color = middle(page, panel, row, col)
            seen.add(state)
            if state == KEPT:
                assert min(color) > 240
            elif state == DROPPED:
                assert max(color) < 150
                assert len(set(color)) == 1, "dropped cells lose their colour"
            else:
                assert color == BLANK
    assert seen == {NO_TOKEN, DROPPED, KEPT}


def test_a_cell_shows_its_own_part_of_the_picture() -> None:
    picture = Image.new("RGB", (80, 80), "red")
    picture.paste("blue", (40, 0, 80, 80))
    entry = kept_item(mosaic(1, 2), every=1)
    page = draw_kept([picture], [entry])
    thumbnail, left, right = place([picture.size], [entry], titled=False)[0].panels
    red, blue = (255, 0, 0), (0, 0, 255)
    assert (middle(page, thumbnail, 0, 0), middle(page, thumbnail, 3, 3)) == (red, blue)
    assert {middle(page, left, row, col) for row in range(4) for col in range(4)} == {red}
    assert {middle(page, right, row, col) for row in range(4) for col in range(4)} == {blue}


def test_several_pictures_stand_below_each_other() -> None:
    entries = [kept_item(mosaic(2, 2)), kept_item([Partition("image", 3, 3)])]
    first, second = place([(90, 60), (30, 30)], entries, titled=False)
    assert max(panel.top + panel.size[1] for panel in first.panels) < min(panel.top for panel in second.panels)
    page = draw_kept([WHITE, WHITE.resize((30, 30))], entries)
    assert second.end[1] < page.height


def test_a_crop_beyond_the_picture_is_padded_with_grey() -> None:
    grid = Partition("crop", 4, 4, (-0.5, 0.0, 0.5, 1.0))
    lost = frozenset((0, row * 4 + col) for row in range(4) for col in (0, 1))
    entry = kept_item([grid], every=1, lost=lost)
    assert arrange(entry, (60, 60)).panels[0].cells == bytes([NO_TOKEN, NO_TOKEN, KEPT, KEPT] * 4)
    draw_kept([Image.new("RGB", (60, 60), "white")], [entry])


def test_a_shrunk_mosaic_has_no_holes() -> None:
    grid = Partition("crop", 4, 4)
    lost = frozenset((0, row * 4 + col) for row in range(4) for col in range(4) if row == 1 or col == 2)
    entry = kept_item([grid], every=2, lost=lost)
    (panel,) = arrange(entry, (60, 60)).panels
    assert NO_TOKEN not in panel.cells
    assert panel.counts == "5/9"


def test_frames_show_their_own_pictures() -> None:
    grids = [Partition("frame", 2, 2, time=time) for time in (0, 2)]
    entry = kept_item(grids, every=1, modality="video")
    page = draw_kept([[Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]], [entry])
    colors = {color for _, color in page.getcolors(page.width * page.height) or []}
    assert {(255, 0, 0), (0, 0, 255)} <= colors
    assert (0, 255, 0) not in colors


def test_as_many_pictures_as_items() -> None:
    with pytest.raises(ValueError, match="1 items need as many pictures, got 2"):
        draw_kept([WHITE, WHITE], [kept_item(mosaic(2, 2))])
