"""Maps of blocks: kernel, reference and a plain loop keep the same blocks, and what is planted is found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vlm_budget import ops
from vlm_budget.errors import KernelInputError
from vlm_budget.triton_kernels.block_map import block_map_reference, block_map_triton

BOTH = pytest.mark.parametrize("run", [block_map_reference, block_map_triton])
RULES = [
    {"top_p": 0.9},
    {"top_p": 0.3, "floor": 0.5},
    {"top_p": 1.0},
    {"density": 0.25},
    {"density": 1.0},
    {"density": 0.001},
]


def draw(rows: int, columns: int, heads: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + columns)
    query = 2 * torch.randn(2, heads, rows, 16, generator=generator)
    key = 2 * torch.randn(2, heads, columns, 16, generator=generator)
    return query, key, torch.randint(0, 9, (2, heads, columns), generator=generator).int()


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    sizes: torch.Tensor,
    top_p: float | None = None,
    density: float | None = None,
    floor: float = 0.0,
) -> torch.Tensor:
    kept = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
    sizes = sizes.expand(*query.shape[:2], -1)
    for place in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        own = sizes[place[0], place[1]].tolist()
        logits = (key[place[0], place[1]].double() @ query[tuple(place)].double()) * 0.25
        weights = [n * math.exp(logit) for n, logit in zip(own, logits.tolist(), strict=True)]
        mass, keys = 0.0, 0
        for rank, block in enumerate(sorted(range(len(own)), key=lambda block: -weights[block])):
            if not own[block]:
                continue
            if density is not None:
                stays = rank == 0 or keys + own[block] <= density * sum(own)
            else:
                assert top_p is not None
                stays = mass < top_p * sum(weights) or keys < floor * sum(own)
            if not stays:
                break
            kept[(*place, block)] = True
            mass, keys = mass + weights[block], keys + own[block]
    return kept


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("columns", [1, 33, 70])
def test_kernel_equals_reference_equals_loop(columns: int, rule: dict[str, float]) -> None:
    query, key, sizes = draw(2, columns)
    wanted = by_hand(query, key, sizes, **rule)
    assert torch.equal(block_map_reference(query, key, sizes, 0.25, **rule), wanted)
    assert torch.equal(block_map_triton(query, key, sizes, 0.25, **rule), wanted)


@BOTH
@pytest.mark.parametrize("shared", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("rule", [RULES[1], RULES[3]], ids=str)
def test_samples_and_heads_may_share_sizes(run: Any, shared: tuple[int, int], rule: dict[str, float]) -> None:
    query, key, sizes = draw(1, 33)
    sizes = sizes[: shared[0], : shared[1]]
    whole = run(query, key, sizes.expand(2, 2, -1).contiguous(), 0.25, **rule)
    assert torch.equal(run(query, key, sizes, 0.25, **rule), whole)


@BOTH
def test_ties_go_to_the_lower_index(run: Any) -> None:
    query, key = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 10, 4)
    sizes = torch.full((1, 1, 10), 5, dtype=torch.int32)
    for share in (0.1, 0.3, 0.7):
        want = torch.arange(10) < round(10 * share)
        assert torch.equal(run(query, key, sizes, 1.0, density=share).flatten(), want)
        assert torch.equal(run(query, key, sizes, 1.0, top_p=share).flatten(), want)
        assert torch.equal(run(query, key, sizes, 1.0, top_p=0.01, floor=share).flatten(), want)


@BOTH
def test_a_mass_of_one_keeps_every_block_with_keys_however_small_its_mass(run: Any) -> None:
    query, key, sizes = draw(5, 33)
    kept = run(300 * query, key, sizes, 1.0, top_p=1.0)
    assert torch.equal(kept, (sizes > 0)[:, :, None].expand_as(kept))


@BOTH
def test_planted_blocks_are_found(run: Any) -> None:
    """Every query mean lies beside the keys of three blocks."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    planted = torch.zeros(1, 2, 5, 33, dtype=torch.bool)
    for head in range(2):
        for row in range(5):
            planted[0, head, row, torch.randperm(33, generator=generator)[:3]] = True
    # One direction per row; the key of a block is the sum over the rows that it was planted for.
    query = 20 * directions[:5].expand(1, 2, 5, 16)
    key = planted.float().transpose(-1, -2) @ directions[:5]
    sizes = torch.full((1, 1, 33), 4, dtype=torch.int32)
    assert torch.equal(run(query, key, sizes, 1.0, top_p=0.99), planted)
    assert torch.equal(run(query, key, sizes, 1.0, density=3 / 33), planted)


@BOTH
def test_a_density_is_a_promise_and_the_best_block_is_always_kept(run: Any) -> None:
    query, key, sizes = draw(3, 33, seed=5)
    scores = (query @ key.transpose(-1, -2)) * 0.25 + sizes.float().log()[:, :, None]
    for density in (0.01, 0.3):
        kept = run(query, key, sizes, 0.25, density=density)
        keys = (kept * sizes[:, :, None]).sum(-1)
        assert ((keys <= density * sizes.sum(-1)[..., None]) | (kept.sum(-1) == 1)).all()
        assert kept.gather(-1, scores.argmax(-1, keepdim=True)).all()


@BOTH
def test_what_is_not_a_number_comes_last_and_no_keys_are_no_blocks(run: Any) -> None:
    query, key, sizes = draw(2, 7)
    sizes[:] = 2
    key[:, :, 3] = torch.nan
    key[:, :, 5] = torch.inf
    query[0, 0, 1] = torch.nan
    kept = run(query.abs(), key, sizes, 0.25, top_p=0.999999)
    assert not kept[1, :, :, 3].any() and kept[1, :, :, 5].all() and kept.any(-1).all()
    assert run(query.abs(), key, sizes, 0.25, top_p=1.0).all()
    for rule in (RULES[1], RULES[3]):
        assert not run(query, key, torch.zeros_like(sizes), 0.25, **rule).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_means_of_half_precision_are_taken_as_they_are(dtype: torch.dtype) -> None:
    query, key, sizes = draw(3, 33)
    query, key = query.to(dtype), key.to(dtype)
    wanted = block_map_reference(query.float(), key.float(), sizes, 0.25, top_p=0.8)
    assert torch.equal(block_map_reference(query, key, sizes, 0.25, top_p=0.8), wanted)
    assert torch.equal(block_map_triton(query, key, sizes, 0.25, top_p=0.8), wanted)


def test_the_public_operation_chooses_a_half_and_is_traced_past() -> None:
    query, key, sizes = draw(3, 33)
    wanted = block_map_reference(query, key, sizes, 0.25, top_p=0.8)
    for which in ("reference", "triton"):
        with ops.use(which):  # type: ignore[arg-type]
            assert torch.equal(ops.block_map(query, key, sizes, 0.25, top_p=0.8), wanted)

    @torch.compile(backend="eager", fullgraph=True)
    def found(query: torch.Tensor) -> torch.Tensor:
        return ops.block_map(query * 1, key, sizes, 0.25, top_p=0.8) & True

    assert torch.equal(found(query), wanted)
    torch.library.opcheck(torch.ops.vlm_budget.block_map.default, (query, key, sizes, 0.25, None, 0.5, 0.0))


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": None}, "either top_p or density, got top_p=None"),
        ({"density": 0.5}, "either top_p or density"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": math.nan}, "top_p must be above 0"),
        ({"top_p": None, "density": 1.5}, "density must be above 0 and at most 1, got 1.5"),
        ({"floor": -0.1}, "floor must lie between 0 and 1"),
        ({"top_p": None, "density": 0.5, "floor": 0.1}, "floor .* goes with top_p"),
        ({"key_means": torch.zeros(2, 2, 4, 8)}, r"key_means must have shape \[2, 2, any, 16\]"),
        ({"key_means": torch.zeros(2, 2, 4097, 16)}, "key_sizes must have shape|between 1 and 4096"),
        ({"key_sizes": torch.zeros(2, 2, 4)}, "key_sizes must be one of int32"),
        ({"key_sizes": torch.zeros(3, 2, 4).int()}, r"key_sizes must have shape \[2 or 1, 2 or 1, 4\]"),
        ({"query_means": torch.zeros(2, 2, 3, 16).int()}, "query_means must be one of"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, which: Any) -> None:
    query, key, sizes = draw(3, 4)
    given = {"query_means": query, "key_means": key, "key_sizes": sizes, "scale": 1.0, "top_p": 0.5, **change}
    with ops.use(which), pytest.raises(KernelInputError, match=message):
        ops.block_map(**given)
