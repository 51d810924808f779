"""The cache that is long outside and short inside: real ``DynamicCache`` objects that answer in two coordinates.

Three prompt rows of 11 columns lost 4 visual tokens each; what is left are 7 columns, of which the last 2 came after
the last dropped one.
"""

import copy
import pickle
from inspect import signature
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from vlm_budget import PatchError
from vlm_budget.engine import cache as module
from vlm_budget.engine.cache import CacheState, LayerGroup, VirtualLength, cache_state, set_cache_state

ROWS, LAYERS, PHYSICAL, DROPPED, TAIL = 3, 2, 7, 4, 2
VIRTUAL = PHYSICAL + DROPPED
COLUMNS = torch.arange(PHYSICAL) + torch.arange(ROWS)[:, None]  # each row lost others
ZERO_IS_A_LENGTH = "max_length" in signature(DynamicCache.crop).parameters  # transformers 4.x


def grow(cache: Any, columns: int) -> None:
    for layer in range(LAYERS):
        cache.update(torch.randn(ROWS, 2, columns, 5), torch.randn(ROWS, 2, columns, 5), layer)


@pytest.fixture
def cache() -> Any:
    cache = DynamicCache()
    grow(cache, PHYSICAL)
    valid = torch.ones(ROWS, PHYSICAL, dtype=torch.bool)
    valid[1, :1] = valid[2, :3] = False
    set_cache_state(cache, CacheState(DROPPED, valid, COLUMNS, torch.tensor([4, 3, 1]), torch.tensor(TAIL)))
    return cache


def decode(cache: Any, columns: int = 1) -> None:
    """What the engine does around a call of the language model."""
    state = cache_state(cache)
    set_cache_state(cache, CacheState(**{**vars(state), "physical": True}))
    grow(cache, columns)
    set_cache_state(cache, state)  # type: ignore[arg-type]


def tensors(cache: Any) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def columns(cache: Any) -> set[int]:
    return {tensor.shape[2] for tensor in tensors(cache)}


def test_the_length_is_the_callers_outside_and_its_own_inside(cache: Any) -> None:
    state = cache_state(cache)
    assert state is not None and (state.physical_length, state.virtual_length) == (PHYSICAL, VIRTUAL)
    assert [cache.get_seq_length(), cache.get_seq_length(1)] == [VIRTUAL, VIRTUAL]
    set_cache_state(cache, CacheState(**{**vars(state), "physical": True}))
    assert [cache.get_seq_length(), cache.get_seq_length(1)] == [PHYSICAL, PHYSICAL]


def test_decoded_tokens_count_once_in_both_coordinates(cache: Any) -> None:
    decode(cache)
    decode(cache, 3)
    assert cache.get_seq_length() == VIRTUAL + 4 and columns(cache) == {PHYSICAL + 4}


@pytest.mark.parametrize("query", [1, 5])
def test_masks_made_outside_are_as_wide_as_the_caller_thinks(cache: Any, query: int) -> None:
    # transformers 4.x passes the new positions, 5 their number
    asked = torch.arange(query) if "cache_position" in signature(DynamicCache.get_mask_sizes).parameters else query
    assert cache.get_mask_sizes(asked, 0) == (VIRTUAL + query, 0)
    set_cache_state(cache, CacheState(**{**vars(cache_state(cache)), "physical": True}))
    assert cache.get_mask_sizes(asked, 0) == (PHYSICAL + query, 0)


def test_the_cache_stays_of_its_class_and_the_class_stays_as_it_is(cache: Any) -> None:
    assert isinstance(cache, DynamicCache) and isinstance(cache, VirtualLength)
    assert type(cache).__name__ == "VirtualDynamicCache"
    fresh = DynamicCache()
    assert type(fresh) is DynamicCache and cache_state(fresh) is None and fresh.get_seq_length() == 0
    assert not any(
        hasattr(value, "__module__") and "vlm_budget" in value.__module__ for value in vars(DynamicCache).values()
    )


def test_a_second_compaction_keeps_the_class(cache: Any) -> None:
    first = type(cache)
    set_cache_state(
        cache, CacheState(9, torch.ones(ROWS, 3, dtype=torch.bool), COLUMNS[:, :3], torch.zeros(ROWS), torch.tensor(0))
    )
    assert type(cache) is first and cache.get_seq_length() == PHYSICAL + 9


def test_growing_it_without_the_patch_is_refused_and_changes_nothing(cache: Any) -> None:
    before = [tensor.clone() for tensor in tensors(cache)]
    with pytest.raises(PatchError, match="used without the patch.*Patch the model again, or start from a new cache"):
        grow(cache, 1)
    assert all(torch.equal(a, b) for a, b in zip(tensors(cache), before, strict=True))


@pytest.mark.parametrize(
    ("name", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_keys_and_records_follow_the_rows(cache: Any, name: str, argument: Any, rows: list[int]) -> None:
    before, state = tensors(cache), cache_state(cache)
    assert state is not None
    getattr(cache, name)(argument)
    after = cache_state(cache)
    assert after is not None
    assert all(torch.equal(a, b[rows]) for a, b in zip(tensors(cache), before, strict=True))
    for name in ("valid", "columns", "shift"):
        assert torch.equal(getattr(after, name), getattr(state, name)[rows])
    assert (after.delta, after.tail, cache.get_seq_length()) == (DROPPED, TAIL, VIRTUAL)


@pytest.mark.parametrize("drop", [1, TAIL])
def test_columns_after_the_last_dropped_one_can_be_cropped(cache: Any, drop: int) -> None:
    before, state = tensors(cache), cache_state(cache)
    cache.crop(-drop)
    after = cache_state(cache)
    assert state is not None and after is not None
    assert cache.get_seq_length() == VIRTUAL - drop
    assert all(torch.equal(a, b[:, :, :-drop]) for a, b in zip(tensors(cache), before, strict=True))
    assert torch.equal(after.valid, state.valid[:, :-drop]) and after.tail == TAIL - drop
    assert torch.equal(after.columns, state.columns[:, :-drop])
    assert after.virtual_length == VIRTUAL - drop


@pytest.mark.parametrize("crop", [-TAIL - 1, -PHYSICAL, -999, VIRTUAL - TAIL - 1, 1])
def test_cropping_into_dropped_columns_is_refused_and_changes_nothing(cache: Any, crop: int) -> None:
    before = cache_state(cache)
    with pytest.raises(PatchError, match="cannot crop .* dropped visual tokens lie among them. Start from a new cache"):
        cache.crop(crop)
    assert cache_state(cache) is before and cache.get_seq_length() == VIRTUAL and columns(cache) == {PHYSICAL}


def test_what_was_cropped_cannot_be_cropped_again(cache: Any) -> None:
    cache.crop(-TAIL)
    with pytest.raises(PatchError, match="cannot crop the last 1 tokens"):
        cache.crop(-1)


def test_a_length_to_crop_to_is_in_the_callers_coordinates(cache: Any) -> None:
    decode(cache, 3)
    cache.crop(VIRTUAL + 1)
    assert cache.get_seq_length() == VIRTUAL + 1 and columns(cache) == {PHYSICAL + 1}
    cache.crop(VIRTUAL - 1)
    assert cache.get_seq_length() == VIRTUAL - 1 and columns(cache) == {PHYSICAL - 1}
    cache.crop(VIRTUAL + 5)  # longer than it is: nothing to forget
    assert cache.get_seq_length() == VIRTUAL - 1


def test_rejected_drafts_of_assisted_decoding_can_be_cropped_round_after_round(cache: Any) -> None:
    for accepted in (3, 0, 2, 5):
        length = cache.get_seq_length()
        decode(cache, 5)
        # A round that accepts every draft crops nothing, and transformers 5 still says so.
        cache.crop(length + accepted if ZERO_IS_A_LENGTH else -(5 - accepted))
        assert cache.get_seq_length() == length + accepted
    assert cache.get_seq_length() == VIRTUAL + 10 and columns(cache) == {PHYSICAL + 10}


def test_cropping_by_zero_means_what_it_means_to_the_installed_transformers(cache: Any) -> None:
    if ZERO_IS_A_LENGTH:
        with pytest.raises(PatchError, match="cannot crop"):
            cache.crop(0)
    else:
        cache.crop(0)
    assert cache.get_seq_length() == VIRTUAL and columns(cache) == {PHYSICAL}


def test_a_reset_cache_is_an_empty_one_that_anybody_may_fill(cache: Any) -> None:
    cache.reset()
    assert cache_state(cache) is None
    fresh = DynamicCache()
    grow(fresh, PHYSICAL)
    fresh.reset()
    length = fresh.get_seq_length()  # transformers 4.x zeroes the columns, 5 forgets them
    assert cache.get_seq_length() == length
    grow(cache, 1)
    assert cache.get_seq_length() == length + 1


def copies() -> list[Any]:
    return [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]


@pytest.mark.parametrize("duplicate", copies(), ids=["deepcopy", "pickle"])
def test_a_copy_holds_the_same_and_lives_its_own_life(cache: Any, duplicate: Any) -> None:
    other = duplicate(cache)
    assert type(other) is type(cache) and other.get_seq_length() == VIRTUAL
    assert all(torch.equal(a, b) and a is not b for a, b in zip(tensors(other), tensors(cache), strict=True))
    mine, its = cache_state(cache), cache_state(other)
    assert mine is not None and its is not None and its.valid is not mine.valid
    assert torch.equal(its.valid, mine.valid) and torch.equal(its.shift, mine.shift)
    decode(other)
    other.batch_select_indices(torch.tensor([2]))
    assert cache.get_seq_length() == VIRTUAL and cache_state(cache) is mine
    with pytest.raises(PatchError):
        grow(other, 1)


def test_a_shallow_copy_shares_its_tensors(cache: Any) -> None:
    other = copy.copy(cache)
    assert other.layers is cache.layers and other.get_seq_length() == VIRTUAL


def test_a_pickled_cache_opens_in_a_process_that_never_pruned(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = pickle.dumps(cache)
    monkeypatch.setattr(module, "_CLASSES", {})
    other = pickle.loads(stored)
    assert isinstance(other, DynamicCache) and other.get_seq_length() == VIRTUAL


def test_a_cache_that_was_never_pruned_behaves_as_before() -> None:
    cache = DynamicCache()
    grow(cache, PHYSICAL)
    module._virtualise(cache)
    grow(cache, 2)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert cache.get_seq_length() == PHYSICAL + 1 and cache_state(cache) is None


# --- layers that hold fewer columns than layer 0 ---------------------------------------------------------------------


@pytest.fixture
def uneven() -> Any:
    """Layer 1 lost two columns more, the one at 1 and one of those before the last two."""
    cache = DynamicCache()
    shape = (ROWS, 2, PHYSICAL, 5)
    cache.update(torch.randn(shape), torch.randn(shape), 0)
    cache.update(torch.randn(shape)[:, :, 2:], torch.randn(shape)[:, :, 2:], 1)
    valid = torch.ones(ROWS, PHYSICAL, dtype=torch.bool)
    index = torch.tensor([0, 2, 3, 5, 6]).expand(ROWS, -1) + torch.zeros(ROWS, 1, dtype=torch.long)
    group = LayerGroup(1, valid[:, 2:], index, torch.arange(ROWS), full=True)
    state = CacheState(DROPPED, valid, COLUMNS, torch.zeros(ROWS), torch.tensor(TAIL), groups=(group,))
    set_cache_state(cache, state)
    return cache


def test_every_layer_is_as_long_as_the_caller_thinks_outside_and_as_it_is_inside(uneven: Any) -> None:
    query = torch.arange(1) if "cache_position" in signature(DynamicCache.get_mask_sizes).parameters else 1
    assert [uneven.get_seq_length(layer) for layer in (0, 1)] == [VIRTUAL, VIRTUAL]
    assert [uneven.get_mask_sizes(query, layer) for layer in (0, 1)] == [(VIRTUAL + 1, 0)] * 2
    set_cache_state(uneven, CacheState(**{**vars(cache_state(uneven)), "physical": True}))
    assert [uneven.get_seq_length(layer) for layer in (0, 1)] == [PHYSICAL, PHYSICAL - 2]
    assert [uneven.get_mask_sizes(query, layer) for layer in (0, 1)] == [(PHYSICAL + 1, 0), (PHYSICAL - 1, 0)]


def test_a_layer_belongs_to_the_last_group_that_starts_above_it(uneven: Any) -> None:
    state = cache_state(uneven)
    assert state is not None
    (group,) = state.groups
    later = LayerGroup(3, group.valid[:, :1], group.index[:, :1], group.shift, full=True)
    state = CacheState(**{**vars(state), "groups": (group, later)})
    assert [state.group(layer) for layer in range(5)] == [None, group, group, later, later]
    assert [state.missing(layer) for layer in range(5)] == [0, 2, 2, 6, 6]


@pytest.mark.parametrize(
    ("name", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_records_of_groups_follow_the_rows(uneven: Any, name: str, argument: Any, rows: list[int]) -> None:
    before = cache_state(uneven)
    getattr(uneven, name)(argument)
    after = cache_state(uneven)
    assert before is not None and after is not None
    for part in ("valid", "index", "shift"):
        assert torch.equal(getattr(after.groups[0], part), getattr(before.groups[0], part)[rows])


def test_cropping_takes_the_same_columns_off_every_layer(uneven: Any) -> None:
    before = tensors(uneven)
    uneven.crop(-TAIL)
    assert all(torch.equal(a, b[:, :, :-TAIL]) for a, b in zip(tensors(uneven), before, strict=True))
    state = cache_state(uneven)
    assert state is not None and state.missing(1) == 2
    assert state.groups[0].index.tolist() == [[0, 2, 3]] * ROWS
    with pytest.raises(PatchError, match="dropped visual tokens"):
        uneven.crop(-1)


@pytest.mark.parametrize("duplicate", copies(), ids=["deepcopy", "pickle"])
def test_copies_hold_their_groups(uneven: Any, duplicate: Any) -> None:
    other = cache_state(duplicate(uneven))
    assert other is not None and other.groups[0].index.tolist() == [[0, 2, 3, 5, 6]] * ROWS
