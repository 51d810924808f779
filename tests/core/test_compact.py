"""Index arithmetic of the compaction, against a loop over rows that takes its time."""

from collections.abc import Iterator

import pytest
import torch

from vlm_budget.engine.compact import Compaction, compact, packed_positions, untouched

LENGTHS = [1, 7, 63, 111, 577]
PADDINGS = pytest.mark.parametrize("right_padded", [False, True], ids=["left", "right"])


def ragged_keep(length: int, rows: int = 5) -> torch.Tensor:
    """[rows, length] flags from sparse to full, every row with a survivor."""
    density = torch.linspace(0.05, 1.0, rows)[:, None]
    keep = torch.rand(rows, length) < density
    keep[torch.arange(rows), torch.randint(length, (rows,))] = True
    return keep


def plans(right_padded: bool) -> Iterator[tuple[Compaction, torch.Tensor]]:
    for length in LENGTHS:
        keep = ragged_keep(length)
        yield compact(keep, int(keep.sum(1).max()), right_padded), keep


def poisoned(plan: Compaction, *trailing: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L, ...] values with NaN where a column was dropped, and the same values without."""
    clean = torch.randn(*plan.keep.shape, *trailing)
    dropped = ~plan.keep.reshape(*plan.keep.shape, *[1] * len(trailing))
    return clean.masked_fill(dropped, torch.nan), clean


@PADDINGS
def test_slots_hold_the_survivors_in_order_with_padding_on_its_side(right_padded: bool) -> None:
    for plan, keep in plans(right_padded):
        assert (plan.length, plan.slots) == (keep.shape[1], keep.sum(1).max())
        assert plan.keep is keep
        for row in range(len(keep)):
            survivors = keep[row].nonzero().flatten().tolist()
            free = plan.slots - len(survivors)
            flags = (
                [True] * len(survivors) + [False] * free if right_padded else [False] * free + [True] * len(survivors)
            )
            assert plan.valid[row].tolist() == flags
            assert plan.index[row][plan.valid[row]].tolist() == survivors
            assert plan.index[row].unique().numel() == plan.slots  # padding slots point at dropped columns


@PADDINGS
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_taking_columns_equals_indexing_row_by_row(right_padded: bool, trailing: tuple[int, ...]) -> None:
    for plan, keep in plans(right_padded):
        dirty, clean = poisoned(plan, *trailing)
        taken = plan.take(dirty)
        assert taken.shape == (len(keep), plan.slots, *trailing)
        for row in range(len(keep)):
            assert torch.equal(taken[row][plan.valid[row]], clean[row][keep[row]])


@PADDINGS
@pytest.mark.parametrize("leading", [(), (3,), (4,)])
def test_taking_positions_equals_indexing_row_by_row(right_padded: bool, leading: tuple[int, ...]) -> None:
    for plan, keep in plans(right_padded):
        positions = torch.randint(1, 9999, (*leading, *keep.shape))
        taken = plan.take_all(torch.zeros(*keep.shape, 1), positions).positions
        assert taken is not None and taken.shape == (*leading, len(keep), plan.slots)
        assert not taken[..., ~plan.valid].any()
        for row in range(len(keep)):
            assert torch.equal(taken[..., row, :][..., plan.valid[row]], positions[..., row, :][..., keep[row]])


@PADDINGS
def test_growing_repeats_the_last_kept_column_and_never_shows_a_padding_slot(right_padded: bool) -> None:
    for plan, keep in plans(right_padded):
        output = torch.randn(len(keep), plan.slots, 3).masked_fill(~plan.valid[..., None], torch.nan)
        grown = plan.grow(output)
        assert grown.shape == (len(keep), plan.length, 3)
        for row in range(len(keep)):
            slots = iter(output[row][plan.valid[row]])
            last = next(slots)
            started = False
            for column in range(plan.length):
                if keep[row, column]:
                    last = next(slots) if started else last
                    started = True
                assert torch.equal(grown[row, column], last)


@PADDINGS
def test_growing_what_was_taken_restores_kept_columns_exactly(right_padded: bool) -> None:
    for plan, keep in plans(right_padded):
        dirty, clean = poisoned(plan, 3)
        assert torch.equal(plan.grow(plan.take(dirty))[keep], clean[keep])


@PADDINGS
def test_keeping_everything_changes_nothing(right_padded: bool) -> None:
    for length in LENGTHS:
        plan = compact(torch.ones(2, length, dtype=torch.bool), length, right_padded)
        hidden = torch.randn(2, length, 3)
        assert torch.equal(plan.take(hidden), hidden) and torch.equal(plan.grow(hidden), hidden)
        assert plan.valid.all()


@PADDINGS
def test_a_row_that_loses_every_column_gets_only_padding_and_disturbs_no_other(right_padded: bool) -> None:
    keep = torch.tensor([[False] * 7, [False, True, True, False, True, False, False]])
    plan = compact(keep, 3, right_padded)
    assert plan.valid.tolist() == [[False] * 3, [True] * 3]
    hidden = torch.randn(2, 7, 3)
    grown = plan.grow(plan.take(hidden))
    assert grown.shape == hidden.shape
    assert torch.equal(grown[1], hidden[1, [1, 1, 2, 2, 4, 4, 4]])


@PADDINGS
def test_packed_positions_count_each_row_from_its_start(right_padded: bool) -> None:
    for plan, keep in plans(right_padded):
        start = torch.tensor([0, 3, 11, 100, 7])
        positions = packed_positions(plan, start)
        assert positions.shape == plan.index.shape
        for row in range(len(keep)):
            kept = int(keep[row].sum())
            assert positions[row][plan.valid[row]].tolist() == list(range(int(start[row]), int(start[row]) + kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.long, torch.bool])
def test_columns_keep_their_bits_in_every_dtype(dtype: torch.dtype) -> None:
    plan = compact(ragged_keep(63), 63, right_padded=False)
    values = torch.randint(2, (5, 63, 3)).to(dtype)
    taken = plan.take(values)
    assert taken.dtype == plan.grow(taken).dtype == dtype
    assert torch.equal(taken[4], values[4])  # the last row keeps all


@PADDINGS
def test_two_compactions_in_one_gather_and_grow_like_one_after_the_other(right_padded: bool) -> None:
    for first, _ in plans(right_padded):
        keep = first.valid & ((torch.rand_like(first.valid, dtype=torch.float) < 0.6) | (first.index == 0))
        keep[:, -1 if not right_padded else 0] = first.valid[:, -1 if not right_padded else 0]
        second = compact(keep, int(keep.sum(1).max()), right_padded)
        both, values = first.then(second), torch.randn(*first.keep.shape, 3)
        assert torch.equal(both.valid, second.valid) and both.length == first.length
        assert torch.equal(both.take(values)[both.valid], second.take(first.take(values))[second.valid])
        shrunk = both.take(values)
        for row in range(len(keep)):
            left = both.index[row][both.valid[row]].tolist()
            assert both.keep[row].nonzero().flatten().tolist() == left
            assert torch.equal(both.grow(shrunk)[row][left], values[row][left])


def test_columns_left_untouched_are_gathered_and_grown_to_themselves() -> None:
    valid = torch.tensor([[False, True, True], [True, True, True]])
    plan, values = untouched(valid), torch.randn(2, 3, 4)
    assert torch.equal(plan.take(values), values)
    assert torch.equal(plan.grow(values)[valid], values[valid])
