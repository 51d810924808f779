"""SVG2: blocks of clusters, what they cost, and what lasts from step to step."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch

from video_calls import (
    ODD,
    at_step,
    block_of,
    call_of,
    computed,
    dense_under,
    densest_row,
    planted,
    sample_of,
    video_density,
    video_mask,
)
from vlm_budget.errors import OptionError
from vlm_budget.video.dit.attend import attend, pairs
from vlm_budget.video.dit.call import Grid
from vlm_budget.video.dit.methods.svg2 import SVG2

CLOSE = {"atol": 1e-5, "rtol": 0.0}
CUTS = pytest.mark.parametrize(
    "cut", [{}, {"cut": "fixed", "block_size": 16}, {"cut": "fixed", "block_size": 24, "order": "axis"}], ids=str
)


def exact(call) -> torch.Tensor:
    logits = call.query.double() @ call.key.double().mT * call.scale
    return logits.softmax(-1) @ call.value.double()


@CUTS
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("rule", [{"density": 0.4}, {"top_p": 0.6}, {"top_p": 0.4, "floor": 0.3}], ids=str)
def test_it_equals_dense_attention_under_its_blocks(cut: dict, correction: bool, rule: dict) -> None:
    call = call_of(batch=2, text=5, first=2, valid=[5, 3])
    out, blocks = computed(SVG2(correction=correction, **rule, **cut), call)
    assert (blocks.mean_keys is not None) == correction
    assert torch.allclose(out.double(), dense_under(call, blocks)[0], **CLOSE)


@CUTS
@pytest.mark.parametrize("everything", [{"top_p": 1.0}, {"density": 1.0}], ids=str)
def test_everything_equals_dense_attention(cut: dict, everything: dict) -> None:
    call = call_of(batch=2)
    out, blocks = computed(SVG2(**everything, **cut), call)
    assert torch.allclose(out.double(), exact(call), **CLOSE)
    assert float(pairs(call, blocks)) == 1.0


@CUTS
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("grid", [ODD, Grid(4, 8, 8), Grid(1, 17, 13)], ids=str)
def test_no_row_computes_more_than_the_density_promises(cut: dict, correction: bool, grid: Grid) -> None:
    call = call_of(grid, heads=2)
    least = SVG2(correction=correction, **cut).least_density(grid)
    for density in (least, 0.3, 0.6, 0.95):
        _, blocks = computed(SVG2(density=density, correction=correction, **cut), call)
        assert densest_row(call, blocks) <= density + 1e-9
        assert float(pairs(call, blocks)) == pytest.approx(video_density(call, blocks), rel=1e-9)
    assert video_density(call, blocks) > 0.75


def test_the_promise_holds_where_all_keys_are_one_cluster() -> None:
    call = call_of()
    alike = at_step(call, 0, key=torch.ones_like(call.key), state={})
    for correction, density in product((False, True), (0.25, 0.5)):
        out, blocks = computed(SVG2(density=density, correction=correction), alike)
        assert densest_row(alike, blocks) <= density
        assert out.isfinite().all() and (out != 0).any(-1).all()


@CUTS
def test_a_row_without_correction_sees_at_least_the_floor(cut: dict) -> None:
    call = call_of(sharpness=4.0)
    for floor in (0.1, 0.35):
        _, blocks = computed(SVG2(top_p=0.05, floor=floor, correction=False, **cut), call)
        assert float(video_mask(call, blocks).double().mean(-1).min()) >= floor
    _, published = computed(SVG2(top_p=0.05, correction=False, **cut), call)
    assert float(video_mask(call, published).double().mean(-1).min()) >= 0.1


def test_planted_clusters_are_found_and_their_pairs_are_all_that_is_needed() -> None:
    call, group = planted(groups=6)
    method = SVG2(density=0.45, query_clusters=24, key_clusters=24, correction=False)
    out, blocks = computed(method, call)
    rows = block_of(blocks.query_order, blocks.query_sizes, call.grid.tokens)
    columns = block_of(blocks.key_order, blocks.key_sizes, call.grid.tokens)
    for head, labels in product(range(2), (rows, columns)):
        mixed = torch.stack([labels[0, head], group[head]], 1).unique(dim=0)
        assert len(mixed) == len(labels[0, head].unique())  # no block holds tokens of two groups
    assert (out.double() - exact(call)).norm() < 1e-3 * exact(call).norm()


def test_a_correction_brings_the_output_nearer() -> None:
    call = call_of(heads=4, sharpness=1.0)

    def error(**options: object) -> float:
        return float((computed(SVG2(**options), call)[0].double() - exact(call)).norm() / exact(call).norm())

    assert error(density=0.4) < 0.6 * error(density=0.4, correction=False)


@CUTS
def test_a_batch_equals_its_samples_from_step_to_step(cut: dict) -> None:
    call = call_of(batch=3)
    method = SVG2(density=0.4, reuse=2, sample=0.5, **cut)
    alone = [sample_of(call, sample) for sample in range(3)]
    for step in range(3):
        out = computed(method, at_step(call, step))[0]
        for sample, own in enumerate(alone):
            assert torch.allclose(computed(method, at_step(own, step))[0][0], out[sample], **CLOSE)


def test_states_are_apart_and_the_method_keeps_nothing() -> None:
    method = SVG2(density=0.4)
    first, second = call_of(seed=1), call_of(seed=2)
    want = computed(method, second)[0]
    computed(method, first)
    other = at_step(second, 0, state={})
    assert torch.equal(computed(method, other)[0], want)
    assert first.state["svg2"] is not other.state["svg2"]


def test_centroids_are_warm_from_step_to_step() -> None:
    call = call_of()
    warm, cold = SVG2(density=0.4, init_iterations=1, reuse=1), SVG2(density=0.4, init_iterations=5, reuse=1)
    for step in range(5):
        blocks = warm.blocks(at_step(call, step))
    want = cold.blocks(at_step(call, 0, state={}))
    assert torch.equal(blocks.query_order, want.query_order) and torch.equal(blocks.key_order, want.key_order)


@CUTS
def test_reuse_keeps_labels_for_some_steps_and_takes_means_of_the_steps_own_tokens(cut: dict) -> None:
    call, method = call_of(), SVG2(density=0.4, reuse=3, **cut)
    orders = []
    for step in range(5):
        noisy = at_step(call, step, key=call.key + step * 0.3 * torch.randn_like(call.key))
        out, blocks = computed(method, noisy)
        orders.append(blocks.key_order)
        assert torch.allclose(out.double(), dense_under(noisy, blocks)[0], **CLOSE)  # corrections of its own keys
    same = [torch.equal(one, two) for one, two in zip(orders, orders[1:], strict=False)]
    assert same == [True, True, False, True]


def test_where_nothing_moves_reuse_changes_nothing() -> None:
    call, _ = planted()
    outs = []
    for reuse in (1, 4):
        own, method = at_step(call, 0, state={}), SVG2(density=0.4, reuse=reuse, init_iterations=20)
        outs.append([computed(method, at_step(own, step))[0] for step in range(5)])
    for one, four in zip(*outs, strict=True):
        assert torch.allclose(one, four, **CLOSE)


def test_a_run_that_begins_again_clusters_again() -> None:
    call, method = call_of(), SVG2(density=0.4, reuse=50)
    method.blocks(at_step(call, 30))
    before = call.state["svg2"].step
    method.blocks(at_step(call, 2))  # nobody emptied the state
    assert (before, call.state["svg2"].step) == (30, 2)
    larger = call_of(Grid(6, 7, 9))
    method.blocks(at_step(larger, 3, state=call.state))
    assert call.state["svg2"].tokens == larger.grid.tokens


def test_only_reused_orders_are_remembered() -> None:
    for reuse, length in ((1, 0), (2, ODD.tokens)):
        call = call_of()
        SVG2(density=0.4, reuse=reuse).blocks(call)
        assert call.state["svg2"].query.order.shape[2] == call.state["svg2"].key.order.shape[2] == length


def test_a_second_call_in_one_step_finds_its_own_clusters_unless_they_are_reused() -> None:
    other = torch.randn_like(call_of().key)
    for reuse in (1, 2):
        call, method = call_of(), SVG2(density=0.4, reuse=reuse)
        first = method.blocks(call).key_order
        again = computed(method, at_step(call, 0, key=other))[1].key_order
        assert again.shape == first.shape and torch.equal(again, first) == (reuse == 2)


def test_seeds_differ_and_repeat() -> None:
    orders = [SVG2(density=0.4, seed=seed).blocks(call_of()).key_order for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])


def test_what_is_not_a_number_is_not_hidden() -> None:
    for name, correction in product(("query", "key"), (False, True)):
        broken = call_of()
        getattr(broken, name)[0, 0, 100] = torch.nan
        out = computed(SVG2(density=0.3, correction=correction), broken)[0]
        assert out[0, 0].isnan().any() and out[0, 1].isfinite().all()
    broken = call_of()
    broken.value[0, 0, 100] = torch.nan
    assert computed(SVG2(density=0.3), broken)[0][0, 0].isnan().any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_p": 0.0}, "top_p must be a number in (0, 1], got 0.0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"top_p": True}, "top_p must be"),
        ({"density": 0.0}, "density must be"),
        ({"density": "30%"}, "density must be"),
        ({"top_p": 0.9, "density": 0.3}, "give top_p or density"),
        ({"density": 0.4, "floor": 0.3}, "floor goes with top_p"),
        ({"top_p": 0.9, "floor": -0.1}, "floor must be"),
        ({"query_clusters": 0}, "query_clusters must be an int of at least 1"),
        ({"key_clusters": 5000}, "at most 2048"),
        ({"reuse": 0}, "reuse must be"),
        ({"iterations": 1.5}, "iterations must be"),
        ({"sample": 0}, "sample must be"),
        ({"cut": "tiles"}, "cut must be 'clusters' or 'fixed'"),
        ({"order": "random"}, "order must be"),
        ({"block_size": 0}, "block_size must be"),
        ({"correction": 1}, "correction must be"),
        ({"warmup": 1.1}, "warmup must be"),
        ({"dense_layers": -1}, "dense_layers must be"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict, words: str) -> None:
    with pytest.raises(OptionError) as error:
        SVG2(**options)
    assert words in str(error.value)


def test_a_density_below_the_minimum_names_the_minimum() -> None:
    method = SVG2(density=0.02)
    with pytest.raises(OptionError, match=r"density=0.02 is below the minimum of SVG2 on a grid of 5x7x9, which is"):
        method.blocks(call_of())
    said = float(str(error_of(method)).split("which is ")[1].split(". Ask")[0])
    SVG2(density=said).blocks(call_of())
    assert said == pytest.approx(method.least_density(ODD), rel=1e-3)


def test_without_any_density_it_is_a_quarter_or_the_smallest_that_can_be_kept() -> None:
    assert SVG2().promised(ODD) == max(0.25, SVG2().least_density(ODD))
    tiny = call_of(Grid(3, 6, 4))
    assert SVG2().least_density(tiny.grid) > 0.25
    _, blocks = computed(SVG2(), tiny)
    assert densest_row(tiny, blocks) <= SVG2().least_density(tiny.grid) and SVG2().overhead(tiny.grid, 16, 4) > 0


def error_of(method: SVG2) -> OptionError:
    with pytest.raises(OptionError) as error:
        method.blocks(call_of())
    return error.value


def test_more_clusters_than_tokens_are_refused() -> None:
    with pytest.raises(OptionError, match="key_clusters=400 is more than the 315 tokens"):
        SVG2(density=0.4, key_clusters=400).blocks(call_of())


def test_presets_are_about_the_published_numbers_of_clusters() -> None:
    published = {Grid(33, 45, 80): (400, 1000), Grid(21, 45, 80): (300, 1000), Grid(21, 30, 52): (200, 1000)}
    for grid, (query, key) in published.items():
        found = SVG2()._counts(grid)
        assert found[0] == pytest.approx(query, rel=0.07) and found[1] <= key + 2
    assert SVG2()._counts(Grid(33, 45, 80))[1] == pytest.approx(1000, rel=0.01)
    assert SVG2()._counts(Grid(12, 10, 10)) == (150, 63) and SVG2()._counts(ODD)[0] == 40
    assert SVG2()._counts(Grid(1, 1, 1)) == (1, 1)


def test_it_is_named_by_what_is_not_the_default() -> None:
    assert str(SVG2()) == "SVG2()"
    assert str(SVG2(density=0.3061805555, cut="fixed", reuse=4)) == "SVG2(density=0.3062, reuse=4, cut='fixed')"


def test_flops_of_clustering_by_hand() -> None:
    grid, width = Grid(4, 8, 8), 16
    tokens = grid.tokens
    method = SVG2(density=0.5, query_clusters=8, key_clusters=16, init_iterations=5, iterations=2, reuse=2)
    blocks = method.blocks(call_of(grid, width=width))
    once = tokens * width * (2 * 8 + 1) + tokens * width * (2 * 16 + 1)
    means = 3 * tokens * width
    products = 2 * 8 * blocks.key_sizes.shape[2] * width
    assert method.overhead(grid, width, 5) == (5 + 2 + 2) * once + 5 * (means + products)
    sampled = dataclasses.replace(method, sample=0.5)
    labels = 3 * 2 * tokens * width * (8 + 16)
    assert sampled.overhead(grid, width, 5) == 9 * once / 2 + labels + 5 * (means + products)
    assert method.overhead(grid, width, 0) == 0


def test_half_precision_and_other_scales() -> None:
    call = call_of(batch=2, text=3, dtype=torch.bfloat16)
    out, blocks = computed(SVG2(density=0.4), call)
    assert out.dtype == torch.bfloat16 and call.state["svg2"].key.centroids.dtype == torch.bfloat16
    as_single = at_step(call, 0, **{name: getattr(call, name).float() for name in ("query", "key", "value")})
    assert torch.allclose(out.double(), dense_under(as_single, blocks)[0], atol=3e-2)


def test_the_calls_tensors_are_left_as_they_are() -> None:
    call = call_of(text=4, first=4)
    before = [side.clone() for side in (call.query, call.key, call.value)]
    attend(call, SVG2(density=0.4).blocks(call))
    for side, want in zip((call.query, call.key, call.value), before, strict=True):
        assert torch.equal(side, want)
