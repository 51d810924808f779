"""Tokens in another order and back: both halves give plain indexing, and the way back gives what there was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm_budget import ops
from vlm_budget.errors import KernelInputError
from vlm_budget.triton_kernels import permute_tokens as module
from vlm_budget.triton_kernels._launch import recorded
from vlm_budget.triton_kernels.permute_tokens import permute_tokens_triton, require_orders, unpermute_tokens_triton

SIZES = (1, 7, 63, 111, 577)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("which", ["reference", "triton"])
SHARED = pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])


def draw(n: int, width: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Two samples of three heads."""
    return torch.randn(2, 3, n, width, generator=torch.Generator().manual_seed(n)).to(dtype)


def ordered(n: int, batch: int = 2, heads: int = 3, seed: int = 0) -> torch.Tensor:
    """Permutations, one for each."""
    generator = torch.Generator().manual_seed(n + seed)
    return torch.rand(batch, heads, n, generator=generator).argsort(-1).int()


def by_hand(tokens: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    order = order.long().expand(tokens.shape[:3])
    return torch.stack([torch.stack([tokens[b, h, order[b, h]] for h in range(3)]) for b in range(2)])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_there_and_back(n: int, dtype: torch.dtype, which: Any) -> None:
    """To the bit, also where it is not a number."""
    query, key = draw(n, dtype=dtype), draw(n, dtype=dtype) * 3
    query[0, 0, 0, :3] = torch.tensor([torch.nan, -torch.nan, -0.0], dtype=dtype)
    rows, columns = ordered(n), ordered(n, seed=1)
    with ops.use(which):
        taken = ops.permute_tokens([query, key, key + 1], [rows, columns, columns])
        for one, given, order in zip(taken, (query, key, key + 1), (rows, columns, columns), strict=True):
            assert one.is_contiguous() and one.dtype == dtype
            assert torch.equal(bits(one), bits(by_hand(given, order)))
            assert torch.equal(bits(ops.unpermute_tokens(one, order)), bits(given))


@BOTH
@SHARED
def test_samples_and_heads_may_share_an_order(batch: int, heads: int, which: Any) -> None:
    tokens, order = draw(111), ordered(111, batch, heads)
    with ops.use(which):
        (taken,) = ops.permute_tokens([tokens], [order])
        assert torch.equal(taken, by_hand(tokens, order))
        assert torch.equal(ops.unpermute_tokens(taken, order), tokens)


@BOTH
@pytest.mark.parametrize("width", [1, 16, 32, 64, 80, 96, 128, 300])
def test_heads_of_any_width(width: int, which: Any) -> None:
    tokens, order = draw(63, width, torch.bfloat16), ordered(63)
    with ops.use(which):
        (taken,) = ops.permute_tokens([tokens], [order])
        assert torch.equal(taken, by_hand(tokens, order))
        assert torch.equal(ops.unpermute_tokens(taken, order), tokens)


@BOTH
def test_strided_tokens(which: Any) -> None:
    """As attention has them: [B, L, H, D] transposed, parts of it, or channels apart; and orders of any strides."""
    tokens, order = draw(111, 64), ordered(111)
    strided = [
        tokens.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([tokens, tokens], -1)[..., :64],
        tokens.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    apart = torch.stack([order, order], -1)[..., 0]
    with ops.use(which):
        for one in ops.permute_tokens(strided, [order, apart, order]):
            assert torch.equal(one, by_hand(tokens, order)) and one.is_contiguous()
        for given in strided:
            assert torch.equal(by_hand(ops.unpermute_tokens(given, apart), order), tokens)


@BOTH
def test_what_comes_back_lies_as_the_next_layer_reads_it(which: Any) -> None:
    with ops.use(which):
        back = ops.unpermute_tokens(draw(111), ordered(111))
    assert back.shape == (2, 3, 111, 32)
    assert back.transpose(1, 2).is_contiguous()


@BOTH
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_tensors(count: int, which: Any) -> None:
    tensors = [draw(63) + place for place in range(count)]
    orders = [ordered(63, seed=place) for place in range(count)]
    with ops.use(which):
        taken = ops.permute_tokens(tensors, orders)
    assert len(taken) == count
    for one, given, order in zip(taken, tensors, orders, strict=True):
        assert torch.equal(one, by_hand(given, order))


def test_queries_keys_and_values_go_in_one_launch() -> None:
    with recorded() as made:
        permute_tokens_triton([draw(63)] * 3, [ordered(63)] * 3)
    assert len(made) == len(module._rows.configs)


@BOTH
def test_nothing_to_permute(which: Any) -> None:
    with ops.use(which):
        for shape in ((1, 2, 0, 32), (0, 2, 5, 32)):
            given, order = torch.zeros(shape), torch.zeros(1, 1, shape[2], dtype=torch.int32)
            assert ops.permute_tokens([given], [order])[0].shape == shape
            assert ops.unpermute_tokens(given, order).shape == shape


def test_every_configuration_copies_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, order = draw(111), ordered(111)
    for config in module._rows.configs:
        monkeypatch.setattr(module._rows, "configs", (config,))
        (taken,) = permute_tokens_triton([tokens], [order])
        assert torch.equal(taken, by_hand(tokens, order))
        assert torch.equal(unpermute_tokens_triton(taken, order), tokens)


def test_compile_traces_past_the_operations() -> None:
    tokens, order = draw(63), ordered(63)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def there_and_back(tokens: torch.Tensor) -> torch.Tensor:
        first, second = ops.permute_tokens([tokens * 1, tokens * 2], [order, order])
        return ops.unpermute_tokens(first + second, order).transpose(1, 2).flatten(2) + 0

    assert torch.equal(there_and_back(tokens), (tokens * 3).transpose(1, 2).flatten(2))


TOKENS, ORDER = torch.zeros(1, 2, 7, 32), torch.zeros(1, 2, 7, dtype=torch.int32)


@BOTH
@pytest.mark.parametrize(
    ("tensors", "orders", "message"),
    [
        ([], [], "at least one tensor, got none"),
        ([TOKENS], [ORDER, ORDER], "one order for every tensor, got 1 tensors, 2 orders"),
        ([TOKENS[0]], [ORDER], r"tensors\[0\] must have shape \[any, any, any, any\]"),
        ([TOKENS, TOKENS[:, :1]], [ORDER, ORDER], r"tensors\[1\] must have shape \[1, 2, 7, 32\]"),
        ([TOKENS, TOKENS.half()], [ORDER, ORDER], r"tensors\[1\] must be one of float32"),
        ([TOKENS], [ORDER.long()], r"orders\[0\] must be one of int32"),
        ([TOKENS], [ORDER[..., 1:]], r"orders\[0\] must have shape \[1 or 1, 2 or 1, 7\], got \[1, 2, 6\]"),
        ([TOKENS], [ORDER[0]], r"orders\[0\] must have shape"),
    ],
)
def test_bad_input_is_refused(
    tensors: list[torch.Tensor], orders: list[torch.Tensor], message: str, which: Any
) -> None:
    with ops.use(which), pytest.raises(KernelInputError, match=message):
        ops.permute_tokens(tensors, orders)
    if len(tensors) == len(orders) == 1:
        with ops.use(which), pytest.raises(KernelInputError, match=message):
            ops.unpermute_tokens(tensors[0], orders[0])


def test_both_halves_refuse_several_devices() -> None:
    with pytest.raises(KernelInputError, match=r"one device, got .*orders\[0\] on meta"):
        require_orders([TOKENS], [ORDER.to("meta")])


def test_the_kernels_say_what_they_cannot_take() -> None:
    for tokens, message in (
        (TOKENS.double(), "tensor must be one of float32, bfloat16, float16"),
        (TOKENS[..., ::2], "contiguous along its last dimension"),
        (torch.zeros(1, 2, 7, 1025), "up to 1024 channels, got 1025"),
    ):
        with pytest.raises(KernelInputError, match=message):
            permute_tokens_triton([tokens], [ORDER])
        with pytest.raises(KernelInputError, match=message):
            unpermute_tokens_triton(tokens, ORDER)
