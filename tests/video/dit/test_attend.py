"""A call computed by its blocks equals dense attention under the mask of tokens that they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pretend_device import PretendDevice
from video_calls import SMALL, at_step, block_of, computed, dense_under, sample_of, token_mask
from video_calls import call_of as call_on
from vlm_budget.video.dit import attend as module
from vlm_budget.video.dit import tiles
from vlm_budget.video.dit.attend import attend, pairs
from vlm_budget.video.dit.call import Blocks, Call, Grid
from vlm_budget.video.dit.method import SparseAttention
from vlm_budget.video.dit.methods.block_topk import BlockTopK
from vlm_budget.video.dit.methods.radial import Radial
from vlm_budget.video.dit.methods.sliding_tile import SlidingTile
from vlm_budget.video.dit.methods.svg1 import SVG1
from vlm_budget.video.dit.methods.svg2 import SVG2
from vlm_budget.video.dit.tiles import Cut, cubes, fixed_blocks

CLOSE = {"atol": 1e-5, "rtol": 0.0}
LAYOUTS = {
    "video alone": {},
    "text behind": {"text": 5},
    "text first": {"text": 5, "first": 5},
    "text on both sides": {"text": 5, "first": 2},
    "padding behind": {"text": 6, "valid": [6, 3]},
    "padding behind, empty rows": {"text": 6, "valid": [1, 4], "empty_rows": True},
    "padding among text first": {"text": 6, "first": 6, "valid": [2, 5]},
    "padding on both sides, empty rows": {"text": 7, "first": 3, "valid": [2, 6], "empty_rows": True},
    "padding alone": {"text": 4, "valid": [0, 0], "empty_rows": True},
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def call_of(grid: Grid = SMALL, **layout: Any) -> Call:
    return call_on(grid, **layout)


def random_blocks(call: Call, correction: bool = False, shared: bool = False, share: float = 0.4) -> Blocks:
    """Blocks of every size, empty ones among them, some rows with all blocks dropped where a correction counts them."""
    generator = torch.Generator().manual_seed(7)
    batch, heads = (1, 1) if shared else call.query.shape[:2]
    tokens = call.grid.tokens

    def side(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        orders, sizes = [], []
        for _ in range(batch * heads):
            label = torch.randint(0, count - 1, (tokens,), generator=generator)  # the last block is empty
            orders.append(torch.randperm(tokens, generator=generator))
            sizes.append(torch.bincount(label, minlength=count))
        return (torch.stack(made).int().view(batch, heads, -1) for made in (orders, sizes))

    (query_order, query_sizes), (key_order, key_sizes) = side(6), side(9)
    kept = torch.rand(batch, heads, 6, 9, generator=generator) < share
    if not correction:
        kept[..., 0] = True
    blocks = Blocks(query_order, query_sizes, key_order, key_sizes, kept)
    if not correction:
        return blocks
    label = block_of(key_order, key_sizes, tokens).expand(*call.query.shape[:2], tokens)
    member = torch.nn.functional.one_hot(label, 9).float()
    count = member.sum(2).clamp(min=1)[..., None]
    return replace(blocks, mean_keys=member.mT @ call.keys / count, mean_values=member.mT @ call.values / count)


@EVERY_LAYOUT
@pytest.mark.parametrize("correction", [False, True], ids=["plain", "corrected"])
@pytest.mark.parametrize("shared", [False, True], ids=["own maps", "one map"])
def test_it_equals_dense_attention_under_the_mask(layout: dict, correction: bool, shared: bool) -> None:
    call = call_of(batch=2, **layout)
    blocks = random_blocks(call, correction, shared)
    out, lse = attend(call, blocks)
    want, want_lse = dense_under(call, blocks)
    assert out.shape == call.query.shape and out.dtype == call.query.dtype
    assert torch.allclose(out.double(), want, **CLOSE)
    assert torch.allclose(lse.double(), want_lse, **CLOSE)


@pytest.mark.parametrize("layout", [{}, LAYOUTS["text first"], LAYOUTS["padding on both sides, empty rows"]], ids=str)
def test_orders_are_optional_on_either_side(layout: dict) -> None:
    call = call_of(batch=2, **layout)
    cut, plain = cubes(call.grid, (2, 3, 4)), fixed_blocks(call.grid.tokens, 50)
    for query, key in ((cut, plain), (plain, cut), (plain, plain), (cut, cut)):
        kept = torch.rand(1, 1, query.sizes.shape[2], key.sizes.shape[2]) < 0.5
        kept[..., 0] = True
        blocks = Blocks(query.order, query.sizes, key.order, key.sizes, kept, tile=key.tile)
        assert torch.allclose(attend(call, blocks)[0].double(), dense_under(call, blocks)[0], **CLOSE)


def test_padding_gets_zeros_where_rows_are_empty_and_attends_to_all_that_is_valid_elsewhere() -> None:
    call = call_of(batch=2, text=6, valid=[6, 2], empty_rows=True)
    blocks = random_blocks(call)
    out, lse = attend(call, blocks)
    padding = slice(call.grid.tokens + 2, None)
    assert (out[1, :, padding] == 0).all() and (lse[1, :, padding] == -torch.inf).all()
    seeing, _ = attend(replace(call, empty_rows=False), blocks)
    valid = call.valid[:, None, None].expand(2, 1, out.shape[2], out.shape[2])
    dense = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, valid, scale=call.scale)
    assert torch.allclose(seeing[1, :, padding], dense[1, :, padding], **CLOSE)


def test_what_padding_holds_is_never_read() -> None:
    call = call_of(batch=2, text=6, first=3, valid=[4, 1], empty_rows=True)
    blocks = random_blocks(call, correction=True)
    out, _ = attend(call, blocks)
    poisoned = at_step(call, 0, **{name: getattr(call, name).clone() for name in ("query", "key", "value")})
    for side in (poisoned.query, poisoned.key, poisoned.value):
        side.transpose(1, 2)[~call.valid] = torch.nan
    assert torch.equal(attend(poisoned, blocks)[0], out)


def test_a_batch_equals_its_samples() -> None:
    call = call_of(batch=3, text=6, valid=[6, 1, 3])
    blocks = random_blocks(call, correction=True)
    out, _ = attend(call, blocks)
    for sample in range(3):
        own = {name: getattr(blocks, name)[sample : sample + 1] for name in vars(blocks) if name != "tile"}
        assert torch.allclose(attend(sample_of(call, sample), Blocks(**own))[0][0], out[sample], **CLOSE)


def test_strided_tensors_of_half_precision_are_taken_as_they_are() -> None:
    full = call_of(batch=2, text=5, valid=[5, 2])
    blocks = random_blocks(full)
    strided = {name: getattr(full, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("query", "key")}
    assert torch.allclose(attend(at_step(full, 0, **strided), blocks)[0], attend(full, blocks)[0], **CLOSE)
    half = {name: getattr(full, name).bfloat16() for name in ("query", "key", "value")}
    out, lse = attend(at_step(full, 0, **half), blocks)
    want = dense_under(at_step(full, 0, **{name: side.float() for name, side in half.items()}), blocks)[0]
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.allclose(out.double(), want, atol=2e-2)


@EVERY_LAYOUT
@pytest.mark.parametrize("correction", [False, True], ids=["plain", "corrected"])
def test_pairs_are_the_share_of_valid_pairs_that_are_computed(
    layout: dict, correction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = call_of(batch=2, **layout)
    blocks = random_blocks(call, correction)
    valid = torch.ones(2, call.query.shape[2], dtype=torch.bool) if call.valid is None else call.valid
    pair = valid[:, None, :, None] & valid[:, None, None]
    counted = int((token_mask(call, blocks) & pair).sum()) + correction * 2 * 2 * call.grid.tokens * 9
    found = pairs(call, blocks)
    assert found.dtype == torch.float64 and found.ndim == 0
    assert float(found) == pytest.approx(counted / (2 * int(pair.sum())), rel=1e-12)
    monkeypatch.setattr(module, "ENTRIES", 1)  # head by head
    assert torch.equal(pairs(call, blocks), found)


def test_one_token_and_one_block() -> None:
    call = call_of(Grid(1, 1, 1), text=1)
    cut = Cut(None, torch.ones(1, 1, 1, dtype=torch.int32))
    blocks = Blocks(None, cut.sizes, None, cut.sizes, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    assert torch.allclose(attend(call, blocks)[0].double(), dense_under(call, blocks)[0], **CLOSE)
    assert float(pairs(call, blocks)) == 1


SPARSE = {
    "svg2": SVG2(density=0.5, reuse=2),
    "svg2 fixed": SVG2(density=0.5, cut="fixed", block_size=16, sample=0.5, reuse=1),
    "svg2 top-p": SVG2(top_p=0.7, correction=False),
    "svg1": SVG1(density=0.5, block_size=16),
    "radial": Radial(density=0.6, block_size=16),
    "sliding tile": SlidingTile(density=0.5, extent=(2, 3, 4)),
    "block top-k": BlockTopK(density=0.6, extent=(2, 3, 4), correction=True),
}


@pytest.mark.parametrize("method", SPARSE.values(), ids=SPARSE)
def test_the_host_does_not_wait_for_the_device(method: SparseAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_BUDGET_KERNELS", "reference")
    call = call_of(batch=2, text=5, first=2, valid=[5, 3])
    want = [computed(method, at_step(call, step))[0] for step in range(3)]
    outs = []
    try:
        with PretendDevice(("vlm_budget", __name__)) as device, torch.no_grad():
            moved = {name: getattr(call, name).to("cuda") for name in ("query", "key", "value", "valid")}
            there = at_step(call, 0, **moved, state={})
            for step in range(3):
                now = at_step(there, step)
                with device.watch() as found:
                    out, blocks = computed(method, now)
                    share = pairs(now, blocks)
                outs.append(out.cpu())
                assert not [wait for wait in found if not wait.by.reference], found
            assert 0 < float(share) < 1
    finally:
        tiles._per_grid.cache_clear()  # tensors of a device that is no more
    for out, wanted in zip(outs, want, strict=True):
        assert torch.allclose(out, wanted, **CLOSE)
