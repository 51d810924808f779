"""Attention masks of every form: which columns hold tokens, and what is left after compaction."""

import itertools
from typing import Any

import pytest
import torch

from vlm_budget import PatchError
from vlm_budget.engine.compact import compact
from vlm_budget.engine.masks import compact_square, is_square, layer_mask, new_columns_valid, padding_mask

CPU = torch.device("cpu")
FLAT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
PADDINGS = pytest.mark.parametrize("right_padded", [False, True], ids=["left", "right"])


def causal(flat: torch.Tensor, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """[B, 1, L, L] causal mask over unpadded columns."""
    length = flat.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & flat.bool()[:, None, None, :]
    return (
        seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    )


@pytest.mark.parametrize("flat", [FLAT, FLAT.bool(), FLAT.flip(1)], ids=["left", "bool", "right"])
def test_a_flat_mask_says_which_columns_hold_tokens(flat: torch.Tensor) -> None:
    assert torch.equal(new_columns_valid(flat, None, 2, 5, CPU), flat.bool())
    assert torch.equal(new_columns_valid(flat, None, 2, 2, CPU), flat.bool()[:, -2:])  # the past stands in front
    assert torch.equal(new_columns_valid(None, flat, 2, 5, CPU), flat.bool())  # as the outer model got it
    assert torch.equal(new_columns_valid(causal(torch.ones(2, 5)), flat, 2, 5, CPU), flat.bool())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [FLAT, FLAT.flip(1)], ids=["left", "right"])
def test_a_square_mask_says_it_by_its_diagonal(dtype: torch.dtype, flat: torch.Tensor) -> None:
    square = causal(flat, dtype)
    wider = torch.cat([square, square[..., :3]], -1)  # a static cache has spare columns
    by_layer = {"sliding_attention": causal(torch.ones(2, 5)), "full_attention": square}
    for mask in (square, wider, by_layer):
        assert torch.equal(new_columns_valid(mask, None, 2, 5, CPU), flat.bool())
        assert torch.equal(new_columns_valid(None, mask, 2, 5, CPU), flat.bool())


def test_without_a_mask_every_column_holds_a_token() -> None:
    for mask, outer in ((None, None), (None, {}), ({}, None), (object(), None)):
        assert torch.equal(new_columns_valid(mask, outer, 2, 5, CPU), torch.ones(2, 5, dtype=torch.bool))


def test_one_mask_row_serves_the_whole_batch() -> None:
    assert torch.equal(new_columns_valid(FLAT[:1], None, 3, 5, CPU), FLAT[:1].bool().expand(3, -1))


@pytest.mark.parametrize(
    ("mask", "square"),
    [(None, False), (FLAT, False), (causal(FLAT), True), ({"full_attention": causal(FLAT)}, True), (object(), True)],
)
def test_only_a_flat_mask_or_none_leaves_the_square_to_the_language_model(mask: Any, square: bool) -> None:
    assert is_square(mask) is square


def test_the_inner_flat_mask_counts_before_the_outer() -> None:
    assert padding_mask(FLAT, FLAT.flip(1)) is FLAT
    assert padding_mask(causal(FLAT), FLAT) is FLAT
    assert padding_mask(None, causal(FLAT)) is None


@PADDINGS
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 63])
@pytest.mark.parametrize("batch", [1, 3])  # rows of the mask; 1 is broadcast
def test_rows_and_columns_of_a_square_mask_follow_the_survivors(
    right_padded: bool, dtype: torch.dtype, length: int, batch: int
) -> None:
    keep = torch.rand(3, length) < torch.tensor([[0.2], [0.6], [1.0]])
    keep[:, torch.randint(length, ())] = True
    plan = compact(keep, int(keep.sum(1).max()), right_padded)
    mask = causal((torch.rand(batch, length) < 0.9).int(), dtype)
    blocked = False if dtype == torch.bool else torch.finfo(dtype).min
    short = compact_square(mask, plan)
    assert short.shape == (3, 1, plan.slots, plan.slots) and short.dtype == dtype
    for row in range(3):
        columns = keep[row].nonzero().flatten()
        valid = plan.valid[row]
        wanted = mask[row if batch == 3 else 0, 0][columns][:, columns]
        assert torch.equal(short[row, 0][valid][:, valid], wanted)
        assert (short[row, 0][:, ~valid] == blocked).all()


@PADDINGS
def test_without_a_mask_the_survivors_get_a_causal_one(right_padded: bool) -> None:
    keep = torch.tensor([[True, False, True, True], [False, True, False, False]])
    plan = compact(keep, 3, right_padded)
    assert torch.equal(compact_square(None, plan), causal(plan.valid))


@PADDINGS
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_cached_columns_are_gathered_by_where_the_caller_knows_them(right_padded: bool, dtype: torch.dtype) -> None:
    batch, start, length = (
        3,
        6,
        7,
    )
    past_columns = torch.tensor([[0, 0, 3, 5], [0, 1, 4, 5], [1, 2, 3, 4]])
    past_valid = torch.tensor([[False, True, True, True], [True] * 4, [True] * 4])
    keep = torch.rand(batch, length) < 0.6
    keep[:, -1] = True
    plan = compact(keep, int(keep.sum(1).max()), right_padded)
    mask = causal((torch.rand(batch, start + length) < 0.8).int(), dtype)[:, :, start:]
    short = compact_square(mask, plan, past=(past_valid, past_columns, start))
    blocked = False if dtype == torch.bool else torch.finfo(dtype).min
    assert short.shape == (batch, 1, plan.slots, 4 + plan.slots)
    for row in range(batch):
        new, valid = keep[row].nonzero().flatten(), plan.valid[row]
        columns = torch.cat([past_columns[row][past_valid[row]], new + start])
        flags = torch.cat([past_valid[row], valid])
        assert torch.equal(short[row, 0][valid][:, flags], mask[row, 0][new][:, columns])
        assert (short[row, 0][:, ~flags] == blocked).all()


def test_without_a_mask_the_cached_columns_are_all_seen() -> None:
    plan = compact(torch.tensor([[True, False, True]]), 2, right_padded=False)
    past = (torch.tensor([[False, True, True]]), torch.tensor([[0, 1, 4]]), 5)
    assert compact_square(None, plan, None, past)[0, 0].int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


def test_a_full_sliding_window_has_let_go_of_the_first_columns() -> None:
    plan = compact(torch.tensor([[True, False, True]]), 2, right_padded=False)
    past = (torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 2, 5]]), 6)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)  # of 6 + 3 columns the first 4 are gone, so column 2 is too
    assert compact_square(mask, plan, past=past)[0, 0].int().tolist() == [[0, 1, 1, 1]] * 2


def test_a_static_cache_keeps_its_spare_columns_blocked() -> None:
    plan = compact(torch.tensor([[True, False, True, False, True]]), 3, right_padded=False)
    mask = torch.cat([causal(torch.ones(1, 5)), torch.ones(1, 1, 5, 3, dtype=torch.bool)], -1)
    short = compact_square(mask, plan, {"full_attention": 8})
    assert short.shape == (1, 1, 3, 8)
    assert torch.equal(short[..., :3], causal(torch.ones(1, 3))) and not short[..., 3:].any()


def test_every_mask_in_a_dict_is_compacted() -> None:
    plan = compact(torch.tensor([[True, False, True]]), 2, right_padded=False)
    full, sliding = causal(torch.ones(1, 3)), torch.eye(3, dtype=torch.bool)[None, None]
    short = compact_square({"full_attention": full, "sliding_attention": sliding}, plan)
    assert torch.equal(short["full_attention"], causal(torch.ones(1, 2)))
    assert torch.equal(short["sliding_attention"], torch.eye(2, dtype=torch.bool)[None, None])


def test_masks_that_cannot_be_shortened_are_refused_with_a_way_out() -> None:
    plan = compact(torch.ones(1, 5, dtype=torch.bool), 5, right_padded=False)
    with pytest.raises(PatchError, match="ready-made object.*attn_implementation='sdpa'"):
        compact_square(object(), plan)
    with pytest.raises(PatchError, match="cache of 3 columns is shorter than the prompt of 5.*default dynamic cache"):
        compact_square(torch.ones(1, 1, 5, 3, dtype=torch.bool), plan, {"full_attention": 3})


# --- layers that hold fewer columns ----------------------------------------------------------------------------------

# Two prompts of 5 columns behind 3 cached ones; the layer lost one cached column and two new ones of each.
ROWS = torch.tensor([[0, 2, 4], [1, 2, 4]])
CACHED = torch.tensor([[0, 2], [1, 2]])
COLUMNS = torch.cat([CACHED, ROWS + 3], 1)


def by_hand(rows: torch.Tensor, columns: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, 1, n, m] bool, what a layer's queries may see."""
    seen = torch.zeros(len(rows), 1, rows.shape[1], columns.shape[1], dtype=torch.bool)
    for row, query, column in itertools.product(*map(range, (len(rows), rows.shape[1], columns.shape[1]))):
        past = columns[row, column] <= rows[row, query] + 3
        seen[row, 0, query, column] = past & valid[row, column]
    return seen


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("hole", [None, 0, 2], ids=["full", "cached padding", "new padding"])
def test_a_layers_mask_is_gathered_from_that_of_layer_0(dtype: torch.dtype, hole: int | None) -> None:
    valid = torch.ones(2, 5, dtype=torch.bool)
    if hole is not None:
        valid[0, hole] = False
    whole = causal(torch.ones(2, 8), dtype)[:, :, 3:]
    found = layer_mask(whole, ROWS, COLUMNS, valid, hole is None, "sdpa", torch.float32)
    assert found is not None and found.dtype == dtype
    assert torch.equal(found if dtype == torch.bool else found == 0, by_hand(ROWS, COLUMNS, valid))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_where_layer_0_needs_no_mask_a_layer_with_padding_gets_its_own(implementation: str) -> None:
    valid = torch.tensor([[False, True, True], [True, True, True]])
    found = layer_mask(None, ROWS, ROWS, valid, False, implementation, torch.float32)
    want = causal(torch.ones(2, 3)) & valid[:, None, None, :]
    assert found is not None
    assert torch.equal(found == 0 if implementation == "eager" else found, want)


@pytest.mark.parametrize(("rows", "columns"), [(ROWS, ROWS), (ROWS[:, :1], COLUMNS)], ids=["prefill", "decoding"])
def test_a_layer_without_padding_needs_no_mask_where_layer_0_needs_none(
    rows: torch.Tensor, columns: torch.Tensor
) -> None:
    valid = torch.ones_like(columns, dtype=torch.bool)
    assert layer_mask(None, rows, columns, valid, True, "sdpa", torch.float32) is None
    assert layer_mask(None, rows, columns, valid, True, "flash_attention_2", torch.float32) is None
    eager = layer_mask(None, rows, columns, valid, True, "eager", torch.float32)
    assert (eager is None) == (rows.shape[1] == 1), "eager attention without a mask sees what comes later"


def test_several_queries_behind_a_cache_are_told_apart_even_without_padding() -> None:
    valid = torch.ones(2, 5, dtype=torch.bool)
    found = layer_mask(None, ROWS, COLUMNS, valid, True, "sdpa", torch.float32)
    assert found is not None
    assert torch.equal(found, by_hand(ROWS, COLUMNS, valid))


@pytest.mark.parametrize("given", [None, torch.ones(2, 8, dtype=torch.bool)])
def test_flash_attention_gets_one_flag_per_column_of_the_layer(given: torch.Tensor | None) -> None:
    valid = torch.tensor([[False, True, True, True, True], [True] * 5])
    assert layer_mask(given, ROWS, COLUMNS, valid, False, "flash_attention_2", torch.float32) is valid
