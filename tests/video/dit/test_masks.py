"""Masks of padding are read whatever their form; masks that say more are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vlm_budget.errors import PatchError, VideoAttentionError
from vlm_budget.video.dit.masks import KeyMask, MaskReader

VIDEO = slice(0, 5)
KEYS = torch.tensor([[True] * 7 + [False], [True] * 5 + [False, True, False]])
PAIRS = KEYS[:, None] & KEYS[:, :, None]


def added(shown: torch.Tensor, low: float = -math.inf, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, low)


def read(mask: Any, batch: int = 2, video: slice = VIDEO) -> tuple[torch.Tensor | None, bool]:
    return MaskReader().read(mask, batch, KEYS.shape[1], video)


def test_no_mask_is_no_padding() -> None:
    assert read(None) == (None, False)


@pytest.mark.parametrize(
    "mask",
    [
        KEYS[:, None, None],
        added(KEYS)[:, None, None],
        added(KEYS, -10000.0)[:, None, None],
        added(KEYS, torch.finfo(torch.bfloat16).min, torch.bfloat16)[:, None, None],
        KEYS[:, None, None].expand(2, 1, 8, 8),
        added(KEYS)[:, None, None].expand(2, 1, 8, 8),
    ],
)
def test_masks_of_keys_are_read(mask: torch.Tensor) -> None:
    valid, empty_rows = read(mask)
    assert valid is not None and torch.equal(valid, KEYS)
    assert not empty_rows


@pytest.mark.parametrize("mask", [PAIRS[:, None], added(PAIRS)[:, None]])
def test_masks_of_pairs_of_valid_tokens_are_read(mask: torch.Tensor) -> None:
    valid, empty_rows = read(mask)
    assert valid is not None and torch.equal(valid, KEYS)
    assert empty_rows


def test_one_mask_serves_a_whole_batch() -> None:
    valid, _ = read(KEYS[:1, None, None], batch=3)
    assert valid is not None and torch.equal(valid, KEYS[:1].expand(3, 8))


def test_large_masks_of_pairs_are_compared_in_parts() -> None:
    keys = torch.ones(1, 2500, dtype=torch.bool)
    keys[:, 2400:] = False
    pairs = keys[:, None] & keys[:, :, None]
    valid, empty_rows = MaskReader().read(pairs[:, None], 1, 2500, slice(0, 2000))
    assert valid is not None and torch.equal(valid, keys)
    assert empty_rows
    pairs[0, 2300, 10] = False
    with pytest.raises(VideoAttentionError, match="single pairs"):
        MaskReader().read(pairs[:, None], 1, 2500, slice(0, 2000))


@pytest.mark.parametrize(
    "mask",
    [
        KEYS,
        KEYS[:, None],
        KEYS[:, None, None, :4],
        KEYS[:, None, None].expand(2, 3, 1, 8),
        KEYS[:, None, None].expand(2, 1, 4, 8),
        KEYS[:1, None, None].expand(3, 1, 1, 8),
        KEYS[:, None, None].long(),
        added(KEYS, -3.0)[:, None, None],
        added(KEYS, 1.0)[:, None, None],
        added(KEYS, math.nan)[:, None, None],
        torch.ones(8, 8).tril().bool()[None, None],
        "causal",
        [[True]],
    ],
)
def test_other_masks_are_refused(mask: Any) -> None:
    with pytest.raises(VideoAttentionError, match="Known masks are"):
        read(mask)


@pytest.mark.parametrize("mask", [KEYS[:, None, None], added(KEYS)[:, None, None], PAIRS[:, None]])
def test_video_tokens_that_are_hidden_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(VideoAttentionError, match="hides tokens of the video"):
        read(mask, video=slice(1, 6))


def test_a_mask_is_read_once_for_all_layers() -> None:
    reader, mask = MaskReader(), added(KEYS)[:, None, None]
    first = reader.read(mask, 2, 8, VIDEO)
    assert reader.read(mask, 2, 8, VIDEO) is first
    assert reader.read(mask.clone(), 2, 8, VIDEO) is not first
    mask.fill_(1.0)  # which is refused
    with pytest.raises(VideoAttentionError):
        reader.read(mask, 2, 8, VIDEO)


def test_a_stand_in_goes_the_way_of_the_tensor_and_holds_no_pairs() -> None:
    """The operations by which HunyuanVideo-1.5's processor makes its mask."""
    text = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def pairs_of(mask: Any) -> Any:
        mask = F.pad(mask, (5, 0), value=True).bool()
        rows = mask.view(2, 1, 1, 8).repeat(1, 1, 8, 1)
        return (rows & rows.transpose(2, 3)).bool()

    lent = pairs_of(KeyMask.of_text(text))
    expected, _ = read(pairs_of(text))
    assert lent.shape == pairs_of(text).shape and lent.ndim == 4
    valid, empty_rows = read(lent)
    assert valid is not None and expected is not None and torch.equal(valid, expected)
    assert empty_rows
    assert lent.keys.numel() == 16


@pytest.mark.parametrize(
    "way",
    [
        lambda mask: mask.float(),
        lambda mask: mask | mask,
        lambda mask: torch.cat([mask, mask]),
        lambda mask: mask[:, None],
        lambda mask: mask.view(2, 3, 1),
        lambda mask: F.pad(mask, (0, 5), value=True),
        lambda mask: F.pad(mask, (5, 0)),
        lambda mask: mask & mask,
        lambda mask: mask.repeat(1, 2),
        lambda mask: mask.transpose(0, 1),
        lambda mask: read(mask),
    ],
)
def test_a_stand_in_that_is_used_otherwise_says_so(way: Any) -> None:
    with pytest.raises((PatchError, TypeError), match="not known here|unsupported operand|not subscriptable"):
        way(KeyMask.of_text(torch.ones(2, 3)))
