"""What an account collects of the calls of a run."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from host_waits import ALWAYS, INDEXING
from vlm_budget.errors import PatchError
from vlm_budget.video.dit.account import FIRST_LAYERS, SHORT, WARMUP, Account, RunInfo, sample_rows, sampled_steps
from vlm_budget.video.dit.call import Blocks, Call, Grid, Moment

GRID = Grid(3, 5, 7)
TOKENS = GRID.tokens


def run_info(**changes: object) -> RunInfo:
    return replace(RunInfo(method="svg2()", model="WanTransformer3DModel", grid=GRID, layers=4, steps=6), **changes)


def call_of(text: int = 0, first: int = 0, heads: int = 4, padding: int = 0, step: int = 0, layer: int = 0) -> Call:
    generator = torch.Generator().manual_seed(layer)
    query, key, value = torch.randn(3, 2, heads, TOKENS + text, 16, generator=generator).mul(1.5)
    valid = None
    if padding:
        valid = torch.ones(2, TOKENS + text, dtype=torch.bool)
        valid[1, -padding:] = False
    return Call(query, key, value, GRID, first, valid, False, 0.25, Moment(step, 6, layer, 4))


def blocks_of(call: Call, density: float = 0.4, alike: bool = False) -> Blocks:
    """Random orders, sizes and pairs of blocks, some of them empty."""
    generator = torch.Generator().manual_seed(1)
    batch, heads = (1, 1) if alike else call.query.shape[:2]
    orders = [
        torch.stack([torch.randperm(TOKENS, generator=generator) for _ in range(batch * heads)]).view(batch, heads, -1)
        for _ in range(2)
    ]
    query_sizes, key_sizes = torch.tensor([40, 0, 50, TOKENS - 90]), torch.tensor([30, 20, 0, 25, TOKENS - 75])
    kept = torch.rand(batch, heads, 4, 5, generator=generator) < density
    kept[..., 0] = True
    sizes = [side.int().expand(batch, heads, -1) for side in (query_sizes, key_sizes)]
    return Blocks(orders[0].int(), sizes[0], orders[1].int(), sizes[1], kept)


def mask_of(call: Call, blocks: Blocks) -> torch.Tensor:
    """[B, H, L, L] of computed pairs, by the definition of blocks, with loops."""
    batch, heads, length, _ = call.query.shape
    mask = torch.ones(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            i, j = min(b, len(blocks.kept) - 1), min(h, blocks.kept.shape[1] - 1)
            label = []
            for order, sizes in ((blocks.query_order, blocks.query_sizes), (blocks.key_order, blocks.key_sizes)):
                own = torch.empty(TOKENS, dtype=torch.long)
                own[order[i, j].long()] = torch.repeat_interleave(torch.arange(sizes.shape[2]), sizes[i, j].long())
                label.append(own)
            mask[b, h, call.video, call.video] = blocks.kept[i, j][label[0]][:, label[1]]
    return mask if call.valid is None else mask & call.valid[:, None, None]


def attention(call: Call, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    logits = call.scale * call.query.double() @ call.key.double().transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    weights = logits.softmax(-1)
    return weights @ call.value.double(), weights


@pytest.mark.parametrize(
    ("text", "first", "padding", "alike"), [(0, 0, 0, False), (9, 0, 4, False), (9, 9, 0, True), (300, 0, 7, False)]
)
def test_error_and_recall_of_all_rows_are_those_of_the_definition(
    text: int, first: int, padding: int, alike: bool
) -> None:
    call = call_of(text, first, padding=padding)
    blocks = blocks_of(call, alike=alike)
    everyone = None if call.valid is None else call.valid[:, None, None].expand(-1, 4, TOKENS + text, -1)
    dense, weights = attention(call, everyone)
    mask = mask_of(call, blocks)
    out, _ = attention(call, mask)
    found = sample_rows(call, blocks, out.float(), rows=TOKENS, heads=4)
    dense, out = dense[:, :, call.video], out[:, :, call.video]
    torch.testing.assert_close(found.error.double(), (out - dense).norm() / dense.norm(), atol=1e-5, rtol=1e-4)
    recall = (weights * mask).sum(-1)[:, :, call.video].mean()
    torch.testing.assert_close(found.recall.double(), recall, atol=1e-5, rtol=1e-4)


def test_a_few_rows_are_close_to_all_of_them() -> None:
    call = call_of()
    blocks = blocks_of(call)
    out = attention(call, mask_of(call, blocks))[0].float()
    few, many = sample_rows(call, blocks, out, 16, 4), sample_rows(call, blocks, out, TOKENS, 4)
    assert few.error != many.error
    torch.testing.assert_close(few.error, many.error, rtol=0.25, atol=0)
    torch.testing.assert_close(few.recall, many.recall, rtol=0.25, atol=0)


def test_dense_output_has_no_error() -> None:
    call = call_of(text=5)
    found = sample_rows(call, blocks_of(call, density=2.0), attention(call, None)[0].float())
    assert found.error < 1e-6
    assert abs(found.recall - 1) < 1e-6


def test_density_is_the_mean_over_calls_with_dense_ones_counted_whole() -> None:
    account = Account(rows=0)
    account.begin(run_info(warmup_steps=2))
    for step in range(6):
        for layer in range(4):
            for branch in range(2):
                moment = Moment(step, 6, layer, 4, branch)
                if step < 2:
                    account.dense(moment, WARMUP)
                elif layer == 0:
                    account.dense(moment, FIRST_LAYERS)
                else:
                    call = replace(call_of(), moment=moment)
                    account.sparse(call, blocks_of(call), call.query, torch.tensor(0.2 + 0.1 * branch))
    report = account.report()
    assert (report.calls, report.sparse_calls) == (48, 24)
    assert report.sparse_density == pytest.approx(0.25)
    assert report.density == pytest.approx((24 + 24 * 0.25) / 48)
    assert report.densities[0] == (1.0,) * 4
    assert report.densities[3] == pytest.approx((1.0, 0.25, 0.25, 0.25))
    assert report.step_densities == pytest.approx((1, 1, *[0.4375] * 4))
    assert report.layer_densities == pytest.approx((1.0, *[0.5] * 3))
    told = {entry.why: (entry.calls, entry.steps, entry.layers) for entry in report.dense}
    assert told == {WARMUP: (16, (0, 1), (0, 1, 2, 3)), FIRST_LAYERS: (8, (2, 3, 4, 5), (0,))}
    assert report.error is None
    assert report.warnings == ()


def test_rows_are_sampled_at_a_few_steps_and_in_the_first_branch_only() -> None:
    account = Account(rows=4, heads=2, steps=2)
    account.begin(run_info(warmup_steps=1))
    for step in range(1, 6):
        for layer in range(2):
            for branch in range(2):
                call = replace(call_of(), moment=Moment(step, 6, layer, 4, branch))
                out = attention(call, None)[0].float() * (1.5 if layer else 1.0)
                account.sparse(call, blocks_of(call, 2.0), out, torch.tensor(1.0))
    report = account.report()
    assert report.sampled_rows == 4 * 2 * (2 * 2)  # two steps, two layers
    errors = dict(report.errors)
    assert errors[0] == pytest.approx(0, abs=1e-6)
    assert errors[1] == pytest.approx(0.5, abs=1e-6)
    assert report.error == pytest.approx(0.25, abs=1e-6)
    assert report.recall == pytest.approx(1)


@pytest.mark.parametrize(
    ("first", "steps", "wanted", "sampled"),
    [(0, 20, 3, [0, 10, 19]), (2, 20, 3, [2, 10, 19]), (2, None, 3, [2, 3, 4]), (0, 1, 3, [0]), (3, 4, 1, [3])],
)
def test_sampled_steps_lie_among_the_sparse_ones(
    first: int, steps: int | None, wanted: int, sampled: list[int]
) -> None:
    assert sampled_steps(first, steps, wanted) == sampled


def test_a_run_in_which_nothing_was_sparse_says_so_and_why() -> None:
    account = Account()
    account.begin(run_info())
    account.dense(Moment(0, 6, 0, 4), SHORT)
    account.warn("105 tokens are below the break-even length")
    account.warn("105 tokens are below the break-even length")
    report = account.report()
    assert report.density == 1.0
    assert report.sparse_density is None
    first, second = report.warnings
    assert first == "105 tokens are below the break-even length"
    assert "nothing ran sparse" in second
    assert SHORT in second


def test_a_promise_that_is_missed_is_told_and_one_that_is_kept_is_not() -> None:
    for density, told in ((0.27, True), (0.25, False), (0.2, False)):
        account = Account(rows=0)
        account.begin(run_info(promised=0.25))
        call = call_of()
        account.sparse(call, blocks_of(call), call.query, torch.tensor(density))
        assert any("promised" in warning for warning in account.report().warnings) == told


def test_a_new_run_forgets_the_last_one_but_for_lasting_warnings() -> None:
    account = Account(rows=0)
    account.begin(run_info())
    account.dense(Moment(0, 6, 0, 4), WARMUP)
    account.warn("gone")
    account.warn("stays", lasting=True)
    account.begin(run_info())
    with pytest.raises(PatchError, match="nothing to report"):
        account.report()
    call = call_of()
    account.sparse(call, blocks_of(call), call.query, 0.5)
    report = account.report()
    assert report.calls == 1
    assert report.warnings == ("stays",)


class Silent(TorchDispatchMode):
    """Refuses operators for which the host would wait on a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in ALWAYS, f"{name} waits for the device"
        assert name not in INDEXING, f"{name} waits for a mask's size"
        return func(*args, **(kwargs or {}))


def test_taking_note_of_calls_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    account = Account(rows=4, heads=2, steps=2)
    call = call_of(text=9, padding=4)
    blocks, density = blocks_of(call), torch.tensor(0.3)
    with Silent(), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("tolist waits for the device"))
        account.begin(run_info())
        account.dense(call.moment, WARMUP)
        account.sparse(call, blocks, call.query, density)
    assert account.report().error is not None
    with pytest.raises(AssertionError, match="waits for the device"), Silent():
        density.item()


def test_an_account_without_a_run_has_nothing_to_report() -> None:
    with pytest.raises(PatchError, match="nothing to report"):
        Account().report()


def test_calls_of_single_samples_weigh_as_much_as_the_layer_they_make() -> None:
    account = Account(rows=0)
    account.begin(run_info(steps=2, layers=1))
    account.dense(Moment(0, 2, 0, 1), WARMUP)
    for part, density in enumerate((0.2, 0.4, 0.6)):
        call = replace(call_of(), moment=Moment(1, 2, 0, 1, part=part))
        account.sparse(call, blocks_of(call), call.query, density)
    report = account.report()
    assert report.density == pytest.approx(0.7)
    assert report.sparse_density == pytest.approx(0.4)
    assert (report.calls, report.sparse_calls) == (2, 1)
