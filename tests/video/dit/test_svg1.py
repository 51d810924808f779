"""SVG: every head is spatial or temporal, as sampled rows tell."""

from __future__ import annotations

import pytest
import torch

from video_calls import at_step, call_of, computed, dense_under, sample_of, video_density, video_mask
from vlm_budget.errors import OptionError
from vlm_budget.video.dit.call import Call, Grid, Moment
from vlm_budget.video.dit.methods.svg1 import SVG1

GRID = Grid(6, 5, 7)


def planted_heads(batch: int = 1) -> Call:
    """The first head attends within a frame, the second along time at one place; the next sample's the other way."""
    generator = torch.Generator().manual_seed(0)
    token = torch.arange(GRID.tokens)
    marks = [torch.nn.functional.one_hot(label, GRID.frame).float() for label in (token // 35, token % 35)]
    samples = [torch.stack(marks if sample % 2 == 0 else marks[::-1]) for sample in range(batch)]
    key = torch.stack(samples) * 4
    value = torch.randn(key.shape, generator=generator)
    return Call(key.clone(), key, value, GRID, 0, None, False, 1.0, Moment(0, 20, 0, 4))


def test_planted_heads_are_told_apart_and_lose_little() -> None:
    call = planted_heads(batch=2)
    out, blocks = computed(SVG1(block_size=7, density=0.5), call)
    as_they_come = torch.arange(GRID.tokens)
    spatial = (blocks.query_order == as_they_come).all(-1)
    assert spatial.tolist() == [[True, False], [False, True]]
    dense = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value, scale=1.0)
    assert float((out - dense).norm() / dense.norm()) < 0.05
    random = call_of(GRID, batch=2, width=35)
    mixed = at_step(random, 0, query=call.query.flip(1), key=call.key.flip(1))
    flipped = SVG1(block_size=7, density=0.5).blocks(mixed)
    assert (flipped.query_order == as_they_come).all(-1).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("block_size", [7, 16, 500])
def test_it_equals_dense_attention_under_its_blocks(block_size: int) -> None:
    call = call_of(GRID, batch=2, text=5, valid=[5, 2])
    method = SVG1(block_size=block_size, density=max(0.4, SVG1(block_size=block_size).least_density(GRID)))
    out, blocks = computed(method, call)
    assert torch.allclose(out.double(), dense_under(call, blocks)[0], atol=1e-5)


def test_a_temporal_head_has_a_band_in_token_major_order() -> None:
    call = planted_heads()
    mask = video_mask(call, SVG1(block_size=6, density=0.3).blocks(call))[0]
    by_place = mask[1].view(6, 35, 6, 35).permute(1, 0, 3, 2).reshape(210, 210)
    assert torch.equal(by_place, mask[0])
    block = torch.arange(210) // 6
    band = (block[:, None] - block).abs()[mask[0]].max()
    assert torch.equal(mask[0], (block[:, None] - block).abs() <= band)


def test_a_density_is_kept_and_the_next_wider_band_would_break_it() -> None:
    call = call_of(GRID)
    for density in (SVG1(block_size=8).least_density(GRID), 0.2, 0.5, 0.9):
        blocks = SVG1(block_size=8, density=density).blocks(call)
        assert video_density(call, blocks) <= density + 1e-12
        assert video_density(call, blocks) > density - 2 * 8 / GRID.tokens


def test_a_batch_equals_its_samples_and_choices_last_as_long_as_they_are_reused() -> None:
    call, method = planted_heads(batch=2), SVG1(block_size=7, density=0.5, reuse=2)
    out = computed(method, call)[0]
    for sample in range(2):
        assert torch.allclose(computed(method, sample_of(call, sample))[0][0], out[sample], atol=1e-5)
    turned = at_step(call, 1, query=call.query.flip(1), key=call.key.flip(1))
    first = method.blocks(at_step(call, 0)).query_order
    assert torch.equal(method.blocks(turned).query_order, first)
    assert not torch.equal(method.blocks(at_step(turned, 2)).query_order, first)
    assert method.overhead(GRID, 16, 3) == 2 * 64 * GRID.tokens * 16 * 8


def test_bad_options_are_refused_and_everything_is_dense() -> None:
    assert SVG1(density=1.0).blocks(call_of(GRID)).kept.all()
    for options in ({"rows": 0}, {"block_size": 0}, {"reuse": 0}, {"seed": -1}):
        with pytest.raises(OptionError, match=f"{next(iter(options))} must be"):
            SVG1(**options)
    with pytest.raises(OptionError, match="below the minimum of SVG1"):
        SVG1(density=0.2).blocks(call_of(GRID))
