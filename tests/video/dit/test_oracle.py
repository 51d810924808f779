"""The oracle: SVG2's clusters, by their true mass."""

from __future__ import annotations

import pytest
import torch

from video_calls import block_of, call_of, computed, dense_under, densest_row, video_mask
from vlm_budget.video.dit.methods import oracle as module
from vlm_budget.video.dit.methods.oracle import Oracle, block_mass
from vlm_budget.video.dit.methods.svg2 import SVG2
from vlm_budget.video.dit.selection import Rule, most_probable
from vlm_budget.video.dit.tiles import Cut


def attention(call) -> torch.Tensor:
    return (call.query.double() @ call.key.double().mT * call.scale).softmax(-1)


@pytest.mark.parametrize("entries", [1, 2**23], ids=["row by row", "at once"])
def test_the_mass_of_blocks_is_what_their_tokens_attend_to(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENTRIES", entries)
    call = call_of(batch=2)
    blocks = SVG2(density=0.4).blocks(call)
    query, key = (Cut(getattr(blocks, f"{side}_order"), getattr(blocks, f"{side}_sizes")) for side in ("query", "key"))
    rows, columns = (
        torch.nn.functional.one_hot(block_of(*cut[:2], call.grid.tokens), cut.sizes.shape[2]).double()
        for cut in (query, key)
    )
    want = rows.mT @ attention(call) @ columns
    assert torch.allclose(block_mass(call, query, key).double(), want, atol=1e-4)


@pytest.mark.parametrize("cut", ["clusters", "fixed"])
@pytest.mark.parametrize("correction", [False, True])
def test_it_equals_dense_attention_under_its_blocks_and_keeps_the_density(cut: str, correction: bool) -> None:
    call = call_of(batch=2)
    out, blocks = computed(Oracle(density=0.4, cut=cut, block_size=16, correction=correction), call)
    assert torch.allclose(out.double(), dense_under(call, blocks)[0], atol=1e-5)
    assert densest_row(call, blocks) <= 0.4


def test_top_p_keeps_the_true_mass_where_the_estimate_does_not() -> None:
    call = call_of(sharpness=3.0)

    def recall(method: SVG2) -> torch.Tensor:
        blocks = method.blocks(call)
        rows = block_of(blocks.query_order, blocks.query_sizes, call.grid.tokens)
        kept = (attention(call) * video_mask(call, blocks)).sum(-1)
        sums = torch.zeros(1, 2, blocks.query_sizes.shape[2], dtype=torch.float64).scatter_add_(2, rows, kept)
        return (sums / blocks.query_sizes.clamp(min=1))[blocks.query_sizes > 0]

    true, estimated = (recall(method(top_p=0.8, floor=0.0, correction=False)) for method in (Oracle, SVG2))
    assert float(true.min()) >= 0.8 - 1e-5 and float(estimated.min()) < 0.8


def test_its_choice_recalls_more_than_the_estimates_at_one_density() -> None:
    call = call_of(heads=4)

    def recall(method: type[SVG2]) -> float:
        blocks = method(density=0.3, correction=False).blocks(call)
        return float((attention(call) * video_mask(call, blocks)).sum(-1).mean())

    assert recall(Oracle) > recall(SVG2)


def test_top_p_of_one_and_what_is_not_a_number() -> None:
    call = call_of()
    out, _ = computed(Oracle(top_p=1.0), call)
    assert torch.allclose(out.double(), attention(call) @ call.value.double(), atol=1e-5)
    call.query[0, 0, 3] = torch.nan
    assert computed(Oracle(density=0.4), call)[0][0, 0].isnan().any()


def test_most_probable_by_hand() -> None:
    mass = torch.tensor([[[[0.1, 0.5, 0.0, 0.1, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]]]])
    sizes = torch.tensor([[[2, 3, 4, 0, 5]]], dtype=torch.int32)

    def kept(**rule: float) -> list[list[int]]:
        chosen = most_probable(mass, sizes, Rule(**rule))[0, 0]
        return [[place for place, taken in enumerate(row) if taken] for row in chosen.tolist()]

    assert kept(tokens=8) == [[1, 4], [0, 1]]
    assert kept(tokens=7) == [[1], [0, 1]]
    assert kept(tokens=1) == [[1], [0]]
    assert kept(top_p=0.5) == [[1], [0, 1]]  # of the mass of blocks with keys: 0.9 and 0.8
    assert kept(top_p=0.6) == [[1, 4], [0, 1, 2]]
    assert kept(top_p=0.5, floor=0.6) == [[0, 1, 4], [0, 1, 2]]
    assert kept(top_p=1.0) == [[0, 1, 2, 4], [0, 1, 2, 4]]
