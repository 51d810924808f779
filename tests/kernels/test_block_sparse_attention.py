"""Sparse attention: both halves give dense attention under the expanded map, whatever the sizes of the blocks are."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from vlm_budget import ops
from vlm_budget.errors import KernelInputError, KernelUnavailableError, MissingExtraError
from vlm_budget.ops import flash_blocks
from vlm_budget.triton_kernels import _launch
from vlm_budget.triton_kernels import block_sparse_attention as module
from vlm_budget.triton_kernels.block_sparse_attention import (
    block_sparse_attention_reference,
    block_sparse_attention_triton,
    turns_of,
)
from vlm_budget.triton_kernels.tile_list import (
    SHIFT,
    query_tiles,
    slots_for,
    tile_list_reference,
    tile_list_triton,
)

BOTH = pytest.mark.parametrize("run", [block_sparse_attention_reference, block_sparse_attention_triton])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SCALE = 0.2
Given = dict[str, torch.Tensor]


def draw(
    query_sizes: list[list[int]],
    key_sizes: list[list[int]],
    *,
    head: int = 16,
    heads: int = 2,
    dtype: torch.dtype = torch.float32,
    share: float = 0.5,
    corrected: int | None = None,
    beyond: int = 0,
) -> Given:
    """One sample; heads have sizes of their own, or share one list of them. Some rows and keys belong to no block."""
    generator = torch.Generator().manual_seed(len(query_sizes[0]) + len(key_sizes[0]) + head)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(1, heads, *shape, generator=generator)

    rows, keys = (max(map(sum, sizes)) + beyond for sizes in (query_sizes, key_sizes))
    blocks = len(key_sizes[0])
    given = {name: numbers(size, head).to(dtype) for name, size in (("query", rows), ("key", keys), ("value", keys))}
    given["query_sizes"], given["key_sizes"] = (torch.tensor([sizes]).int() for sizes in (query_sizes, key_sizes))
    given["kept"] = torch.rand(1, heads, len(query_sizes[0]), blocks, generator=generator) < share
    if corrected is not None:
        given["mean_keys"], given["mean_values"] = (numbers(corrected, head) for _ in range(2))
    return given


def exactly(given: Given, scale: float = SCALE) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention in float64 under the expanded map, means as further columns."""
    query, key, value = (given[name].double() for name in ("query", "key", "value"))
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):

            def own(name: str, b: int = b, h: int = h) -> torch.Tensor:
                part = given[name]
                return part[min(b, part.shape[0] - 1), min(h, part.shape[1] - 1)]

            row_of, key_of = (
                torch.arange(len(sizes)).repeat_interleave(sizes.long())
                for sizes in (own("query_sizes"), own("key_sizes"))
            )
            seen = own("kept")[row_of]
            logits = (query[b, h, : len(row_of)] @ key[b, h, : len(key_of)].T) * scale
            logits, values = logits.masked_fill(~seen[:, key_of], -torch.inf), value[b, h, : len(key_of)]
            if "mean_keys" in given:
                means = own("mean_keys").double()
                counted = (query[b, h, : len(row_of)] @ means.T) * scale
                counted = counted + own("key_sizes")[: len(means)].double().log()
                logits = torch.cat([logits, counted.masked_fill(seen[:, : len(means)], -torch.inf)], 1)
                values = torch.cat([values, own("mean_values").double()])
            lse[b, h, : len(row_of)] = logits.logsumexp(-1)
            out[b, h, : len(row_of)] = logits.softmax(-1).nan_to_num() @ values
    return out, lse


def close(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor], within: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=within, rtol=within)


ROWS = [[5, 0, 70, 1], [33, 33, 0, 10]]
KEYS = [[40, 0, 71, 3, 30], [7, 64, 1, 0, 72]]


@BOTH
@pytest.mark.parametrize("corrected", [None, 4])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_dense_attention_under_the_expanded_map(run: Any, dtype: torch.dtype, corrected: int | None) -> None:
    """Uneven blocks, empty ones, text behind the video that has no mean, and rows and keys that belong to no block."""
    given = draw(ROWS, KEYS, dtype=dtype, corrected=corrected, beyond=3)
    given["key"][:, :, max(map(sum, KEYS)) :] = torch.nan
    given["value"][:, :, max(map(sum, KEYS)) :] = torch.nan
    found = run(**given, scale=SCALE)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert (found[0][:, :, -3:] == 0).all() and (found[1][:, :, -3:] == -torch.inf).all()
    close(found, exactly(given), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("head", "dtype"),
    [(32, torch.bfloat16), (64, torch.float16), (72, torch.bfloat16), (96, torch.bfloat16), (128, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("corrected", [None, 2])
def test_kernel_takes_heads_of_any_width(head: int, dtype: torch.dtype, corrected: int | None) -> None:
    given = draw([[30, 70]], [[50, 0, 73]], head=head, dtype=dtype, corrected=corrected)
    found = block_sparse_attention_triton(**given, scale=head**-0.5)
    close(found, exactly(given, head**-0.5), TOLERANCE[dtype])


@BOTH
@pytest.mark.parametrize("sizes", [[[1]], [[0]], [[64]], [[129]]], ids=str)
def test_one_cluster_is_dense_attention(run: Any, sizes: list[list[int]]) -> None:
    given = draw(sizes, sizes, share=1.1, beyond=1)
    close(run(**given, scale=SCALE), exactly(given), 1e-5)


@BOTH
def test_rows_that_see_nothing_are_zeros_and_their_means_count_where_they_are_given(run: Any) -> None:
    given = draw([[20, 9]], [[30, 40]], corrected=2)
    given["kept"][:, :, 1] = False
    close(run(**given, scale=SCALE), exactly(given), 1e-5)
    del given["mean_keys"], given["mean_values"]
    out, lse = run(**given, scale=SCALE)
    assert (out[:, :, 20:] == 0).all() and (lse[:, :, 20:] == -torch.inf).all()
    given["kept"][:] = False
    out, lse = run(**given, scale=SCALE)
    assert (out == 0).all() and (lse == -torch.inf).all()


@BOTH
def test_samples_and_heads_may_share_maps_and_sizes(run: Any) -> None:
    given = draw([[20, 9]], [[30, 11]])
    for name in ("query", "key", "value"):
        given[name] = torch.cat([given[name], given[name].flip(2)])
    for kept in (given["kept"][:, :1], given["kept"], torch.cat([given["kept"][:, :1], ~given["kept"][:, :1]])):
        given["kept"] = kept
        close(run(**given, scale=SCALE), exactly(given), 1e-5)
    given["key_sizes"] = torch.tensor([[[30, 11]], [[2, 39]]]).int()
    given["kept"] = given["kept"].transpose(2, 3).contiguous().transpose(2, 3)
    close(run(**given, scale=SCALE), exactly(given), 1e-5)


@BOTH
def test_inputs_may_lie_with_heads_behind_tokens(run: Any) -> None:
    given = draw([[20, 9]], [[30, 11]], corrected=2)
    wanted = exactly(given)
    for name in ("query", "key", "value"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    close(run(**given, scale=SCALE), wanted, 1e-5)
    given["query"] = torch.cat([given["query"], given["query"]], -1)[..., :16]
    close(run(**given, scale=SCALE), wanted, 1e-5)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_blocks_of_one_size_are_a_hint_and_descriptors_another_way_to_read(tma: bool) -> None:
    given = draw([[128, 20]], [[128, 128, 20, 7]], dtype=torch.float16, head=32, heads=1, share=0.7)
    plain = block_sparse_attention_triton(**given, scale=SCALE)
    hinted = block_sparse_attention_triton(**given, scale=SCALE, tile=128, tma=tma)
    assert all(torch.equal(one, other) for one, other in zip(plain, hinted, strict=True))
    close(hinted, exactly(given), TOLERANCE[torch.float16])


def test_the_reference_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(ROWS, KEYS, corrected=4)
    monkeypatch.setattr(module, "ENTRIES", 300)
    close(block_sparse_attention_reference(**given, scale=SCALE), exactly(given), 1e-5)


def test_large_logits_do_not_overflow() -> None:
    given = draw([[20]], [[30, 20]], corrected=2)
    given["query"] *= 200
    for run in (block_sparse_attention_reference, block_sparse_attention_triton):
        close(run(**given, scale=SCALE), exactly(given), 1e-3)


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8, 1.1])
def test_lists_hold_the_runs_of_kept_blocks_and_nothing_else(size: int, share: float, monkeypatch: Any) -> None:
    """Also where a program does not see all key blocks at once, and where blocks claim more keys than there are."""
    monkeypatch.setattr("vlm_budget.triton_kernels.tile_list.CHUNK", 16)
    generator = torch.Generator().manual_seed(size)
    sizes = torch.randint(0, 30, (1, 1, 35), generator=generator).int()
    kept = torch.rand(1, 2, 2, 35, generator=generator) < share
    keys = int(sizes.sum()) - 9
    wanted, counts = tile_list_reference(sizes, kept, keys, size)
    found, found_counts = tile_list_triton(sizes, kept, keys, size)
    assert torch.equal(found_counts, counts)
    place = torch.arange(found.shape[-1])
    used = (place < counts[..., :1]) | (place >= found.shape[-1] - counts[..., 1:])
    assert torch.equal(found[used], wanted[used])
    block_of = torch.arange(35).repeat_interleave(sizes[0, 0].long())[:keys]
    for head in range(2):
        for row in range(2):
            tiles = found[0, head, row][used[0, head, row]].tolist()
            seen = sorted(at for tile in tiles for at in range(tile // SHIFT, tile // SHIFT + tile % SHIFT))
            assert seen == kept[0, head, row][block_of].nonzero().flatten().tolist()
    assert counts.sum(-1).max() < slots_for(keys, 35, size)
    if share > 1:
        assert counts[..., 1].max() <= 1, "blocks side by side are one run, with one tail"


def test_every_row_is_in_one_tile_and_the_blocks_with_most_work_come_first() -> None:
    sizes = torch.tensor([[[5, 0, 70, 1, 32]]])
    begins = sizes.cumsum(-1) - sizes
    work = torch.tensor([[[3, 9, 1, 7, 0], [1, 1, 1, 1, 1]]])
    first, packed = query_tiles(begins, sizes, work, 32, 10)
    assert first.shape == packed.shape == (1, 2, 10)
    for head in range(2):
        tiles = list(zip(first[0, head].tolist(), packed[0, head].tolist(), strict=True))
        real = [(at, tile // SHIFT, tile % SHIFT) for at, tile in tiles if tile]
        assert sorted(row for at, _, rows in real for row in range(at, at + rows)) == list(range(108))
        spent = [int(work[0, head, block]) for _, block, _ in real]
        assert spent == sorted(spent, reverse=True)


HUNYUAN = {"query": (1, 24, 119_056, 128), "keys": 119_056, "kept": (1, 24, 401, 1001)}


def test_the_workspace_of_hunyuan_video_is_at_most_64_megabytes() -> None:
    turns = turns_of(**HUNYUAN, corrected=1000)
    assert turns.bytes <= 64 * 2**20
    assert turns.heads == 12 and turns.blocks == 401, "two turns, of whole heads"
    assert turns_of((2, 40, 75_600, 128), 75_600, (2, 40, 300, 1000)).bytes <= 64 * 2**20
    assert turns_of((2, 40, 75_600, 128), 75_600, (2, 40, 300, 1124), corrected=1124).bytes <= 64 * 2**20
    # One sample's lists would not fit: some query blocks at a time.
    longest = turns_of((1, 1, 2**20, 128), 2**20, (1, 1, 4097, 4097))
    assert longest.bytes <= 64 * 2**20 and 1 <= longest.blocks < 4097


def test_what_is_launched_takes_what_was_said() -> None:
    """At the real shape, with tensors of no memory and lists as they are allocated."""
    rows = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16).expand(*HUNYUAN["query"])
    sizes, kept = torch.full((1, 24, 401), 296), torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(*HUNYUAN["kept"])
    keys = torch.full((1, 24, 1001), 118)
    with _launch.recorded() as made:
        block_sparse_attention_triton(rows, rows, rows, sizes.int(), keys.int(), kept, 0.1)
    turns = turns_of(**HUNYUAN)
    tiles = [launch.arguments for launch in made if "firsts" in launch.arguments]
    assert {arguments["heads"] for arguments in tiles} == {turns.heads}
    for arguments in tiles:
        held = [arguments[name] for name in ("lists", "counts", "firsts", "packed")]
        assert sum(tensor.numel() * tensor.element_size() for tensor in held) <= turns.bytes <= 64 * 2**20


@pytest.mark.parametrize(("room", "parts"), [(1800, (1, 4)), (1100, (1, 3)), (1, (1, 1))])
def test_turns_give_the_same_bits(room: int, parts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(ROWS, KEYS, corrected=4, beyond=2, dtype=torch.float16)
    whole = block_sparse_attention_triton(**given, scale=SCALE)
    monkeypatch.setattr(module, "WORKSPACE", room)
    turns = turns_of((1, 2, 78, 16), 148, (1, 2, 4, 5), corrected=4)
    assert (turns.heads, turns.blocks) == parts
    parted = block_sparse_attention_triton(**given, scale=SCALE)
    assert all(torch.equal(one, other) for one, other in zip(whole, parted, strict=True))


# --- the public operation --------------------------------------------------------------------------------------------


def test_the_public_operation_chooses_a_half_and_is_traced_past() -> None:
    given = draw([[20, 9]], [[30, 11]], corrected=2)
    wanted = exactly(given)
    with ops.use("triton"):
        close(ops.block_sparse_attention(**given, scale=SCALE), wanted, 1e-5)
    close(ops.block_sparse_attention(**given, scale=SCALE, backend="tma"), wanted, 1e-5)

    @torch.compile(backend="eager", fullgraph=True)
    def found(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = ops.block_sparse_attention(**{**given, "query": query * 1}, scale=SCALE)
        return out + 0, lse + 0

    close(found(given["query"]), wanted, 1e-5)
    inputs = (*(given[name] for name in list(given)[:6]), SCALE, None, None, None, False)
    torch.library.opcheck(torch.ops.vlm_budget.block_sparse_attention.default, inputs)


def test_heads_too_wide_for_the_kernel_take_the_reference_unless_it_is_named() -> None:
    given = draw([[20]], [[30]], head=160, share=1.1)
    close(ops.block_sparse_attention(**given, scale=SCALE), exactly(given), 1e-5)
    with ops.use("triton"), pytest.raises(KernelInputError, match="up to 128 channels, got 160"):
        ops.block_sparse_attention(**given, scale=SCALE)


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 2, 29, 16).int()}, "query must be one of"),
        ({"key": torch.zeros(1, 2, 41, 16).half()}, "key must be one of float32, got torch.float16"),
        ({"value": torch.zeros(1, 2, 40, 16)}, r"value must have shape \[1, 2, 41, 16\]"),
        ({"query_sizes": torch.zeros(1, 1, 2)}, "query_sizes must be one of int32"),
        ({"key_sizes": torch.zeros(1, 3, 2).int()}, "key_sizes must have shape"),
        ({"kept": torch.zeros(1, 2, 2, 3, dtype=torch.bool)}, r"kept must have shape \[any, any, 2, 2\]"),
        ({"kept": torch.zeros(1, 3, 2, 2, dtype=torch.bool)}, "kept must be of batch 1 or 1 and heads 2 or 1"),
        ({"kept": torch.zeros(1, 2, 2, 2)}, "kept must be one of bool"),
        ({"mean_keys": torch.zeros(1, 2, 2, 16)}, "come together"),
        ({"mean_keys": torch.zeros(1, 2, 3, 16), "mean_values": torch.zeros(1, 2, 3, 16)}, "at most one mean"),
        ({"scale": -1.0}, "scale must be finite and not negative"),
        ({"scale": math.nan}, "scale must be finite"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"backend": "fa3"}, "backend must be one of auto, tma, fa4"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str, which: Any) -> None:
    with ops.use(which), pytest.raises(KernelInputError, match=message):
        ops.block_sparse_attention(**{**draw([[20, 9]], [[30, 11]]), "scale": SCALE, **change})


# --- FlashAttention-4 ------------------------------------------------------------------------------------------------


class StandIn:
    """What FlashAttention-4 does, by plain attention; rows that see nothing get what must not be used."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> Any:
        self.calls.append(SimpleNamespace(query=query, key=key, **named))
        assert named["block_size"] == (128, 128) and named["return_lse"]
        assert not named["mask_block_cnt"].any() and named["full_block_idx"].dtype == torch.int32
        count, index = named["full_block_cnt"], named["full_block_idx"]
        listed = torch.arange(index.shape[-1]) < count[..., None]
        kept = torch.zeros(index.shape, dtype=torch.bool).scatter_(-1, index.long(), listed)
        seen = kept.repeat_interleave(128, -1).repeat_interleave(128, -2)
        query, key, value = (one.transpose(1, 2).float() for one in (query, key, value))
        logits = (query @ key.transpose(-1, -2) * named["softmax_scale"]).masked_fill(~seen, -torch.inf)
        return (logits.softmax(-1) @ value).transpose(1, 2).half(), logits.logsumexp(-1).nan_to_num(neginf=7.0)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in, installed = StandIn(), ModuleType("flash_attn.cute")
    installed.flash_attn_func = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", installed)
    monkeypatch.setattr(flash_blocks, "_hopper", lambda device: True)
    return stand_in


@pytest.mark.parametrize("corrected", [None, 4])
def test_flash_attention_takes_whole_tiles_and_ours_the_rest(flash: StandIn, corrected: int | None) -> None:
    """With a part of a tile and text behind the video, on both sides, and a row of tiles that drops all others."""
    given = draw([[128, 128, 50, 9]], [[128, 128, 128, 30, 9]], dtype=torch.float16, corrected=corrected, share=0.6)
    given["kept"][0, 0, 1, :3] = False
    found = ops.block_sparse_attention(**given, scale=SCALE, tile=128, backend="fa4")
    (call,) = flash.calls
    assert call.query.shape[1] == 256 and call.key.shape[1] == 384
    assert found[0].dtype == torch.float16
    close(found, exactly(given), TOLERANCE[torch.float16])


def test_too_few_blocks_for_flash_attention_are_ours(flash: StandIn) -> None:
    given = draw([[128, 9]], [[128, 9]], dtype=torch.float16, share=1.1)
    close(ops.block_sparse_attention(**given, scale=SCALE, tile=128, backend="fa4"), exactly(given), 2e-3)
    assert not flash.calls


def test_flash_attention_that_cannot_run_is_told_of(flash: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw([[20, 9]], [[30, 11]], dtype=torch.float16)
    named = {"scale": SCALE, "backend": "fa4"}
    with pytest.raises(KernelInputError, match="blocks of tile=128, got tile=64"):
        ops.block_sparse_attention(**given, **named, tile=64)
    with pytest.raises(KernelInputError, match="takes bfloat16 and float16"):
        ops.block_sparse_attention(**draw([[20, 9]], [[30, 11]]), **named, tile=128)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(flash_attn_func=flash))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with pytest.raises(KernelUnavailableError, match="Hopper"):
        ops.block_sparse_attention(**given, **named, tile=128)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match="pip install flash-attn-4"):
        ops.block_sparse_attention(**given, **named, tile=128)
