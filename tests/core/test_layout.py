"""Where tokens are: items, and how a batch's items are handed out to its prompts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import synthetic_items as make
from vlm_budget import VisualLayout
from vlm_budget.layout import VisualItem, group_rows


def of_sizes(*sizes: int) -> list[VisualItem]:
    return [make.single(1, size) for size in sizes]


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), max_size=5))
def test_items_are_handed_out_in_order_to_the_rows_that_hold_them(rows: list[list[int]]) -> None:
    items = of_sizes(*[size for row in rows for size in row])
    grouped = group_rows(items, [sum(row) for row in rows])
    assert grouped is not None
    assert [[item.size for item in row] for row in grouped] == rows
    assert [id(item) for row in grouped for item in row] == [id(item) for item in items]


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ([3, 4], [4, 3]),  # no split between the items fits
        ([3, 4], [3]),  # an item is left over
        ([3, 4], [3, 3]),
        ([3], [3, 4]),  # a row stays hungry
        ([3], []),
        ([], [1]),
        ([7], [3, 4]),  # an item cannot span rows
        ([3, 4], [2, 5]),
    ],
)
def test_items_that_do_not_fit_the_rows_are_not_handed_out(sizes: list[int], counts: list[int]) -> None:
    assert group_rows(of_sizes(*sizes), counts) is None


def test_rows_without_visual_tokens_stay_empty() -> None:
    (item,) = of_sizes(3)
    assert group_rows([item], [0, 3, 0]) == [[], [item], []]
    assert group_rows([], [0, 0]) == [[], []]
    assert group_rows([], []) == []


def test_the_given_list_of_items_is_left_alone() -> None:
    items = of_sizes(3, 4)
    group_rows(items, [3, 4])
    assert [item.size for item in items] == [3, 4]


@given(make.items())
def test_every_token_is_a_candidate_or_a_separator(item: VisualItem) -> None:
    both = torch.cat([item.candidates, item.separators])
    assert both.sort().values.tolist() == list(range(item.size))
    assert (item.partition[item.candidates] >= 0).all() and (item.partition[item.separators] == -1).all()


def test_a_mosaic_line_shares_its_number_with_the_separator_at_its_end() -> None:
    item = make.anyres(1, 2, side=2)
    assert item.partition.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, -1, 1, 1, 2, 2, -1]
    assert item.patch.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, -1, 2, 3, 2, 3, -1]
    assert item.line.tolist() == [-1, -1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert item.candidates.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert item.separators.tolist() == [8, 13]


def test_a_layout_counts_its_tokens() -> None:
    one, two, three = of_sizes(3, 4, 7)
    layout = VisualLayout(((one, two), (), (three,)))
    assert layout.total == 14
    assert layout.row_sizes() == [[3, 4], [], [7]]
