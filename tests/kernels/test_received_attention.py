"""The attention that keys receive: kernel and reference against the softmax map in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm_budget.engine import probes
from vlm_budget.errors import KernelInputError
from vlm_budget.ops import received_attention, use
from vlm_budget.triton_kernels import _launch
from vlm_budget.triton_kernels import received_attention as module
from vlm_budget.triton_kernels.received_attention import (
    received_attention_reference,
    received_attention_triton,
    specimens,
)

SIZES = (1, 7, 63, 111, 577, 2881)
# Relative to the mean that a key receives, 1 / L. Products of half precision numbers are exact in float32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}
BOTH = pytest.mark.parametrize("run", [received_attention_reference, received_attention_triton])
INFINITY, NAN = float("inf"), float("nan")
LOWEST = (torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e9, -65504.0)


def heads(batch: int, count: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[batch, count, length, width] as models make it: a transposed view."""
    return torch.randn(batch, length, count, width).to(dtype).transpose(1, 2)


def exactly(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    first: torch.Tensor | None = None,
    stop: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, L] float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = torch.einsum("bhid,bhjd->bhij", query.double(), key) * scaling
    columns = torch.arange(key.shape[2])
    if first is not None:
        logits = logits.masked_fill(columns < first[:, None, :, None], -INFINITY)
    if stop is not None:
        logits = logits.masked_fill(columns >= stop[:, None, :, None], -INFINITY)
    if mask is not None:
        logits = logits.masked_fill(~mask, -INFINITY) if mask.dtype == torch.bool else logits + mask.double()
    return logits.softmax(-1).nan_to_num().mean((1, 2))


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, wanted.float(), atol=tolerance / found.shape[1], rtol=1e-5)


def whole(batch: int, count: int, length: int, width: int) -> torch.Tensor:
    """[batch, count, length, width] whole numbers, whose products no order of addition rounds."""
    return torch.randint(-2, 3, (batch, length, count, width)).float().transpose(1, 2)


def in_float32(
    query: torch.Tensor, key: torch.Tensor, scaling: float, mask: torch.Tensor, stop: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, L] float64, of addends on logits that are rounded to float32, as models add them."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = (query @ key.transpose(-1, -2) * scaling + mask.float()).double()
    if stop is not None:
        logits = logits.masked_fill(torch.arange(key.shape[2]) >= stop[:, None, :, None], -INFINITY)
    return logits.softmax(-1).mean((1, 2))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_kernel_equals_reference_equals_float64(length: int, dtype: torch.dtype) -> None:
    count, n = ((1, 1), 111) if length > 577 else ((2, 1), length)  # the interpreter takes its time
    query, key = heads(1, count[0], n, 64, dtype), heads(1, count[1], length, 64, dtype)
    wanted = exactly(query, key, 0.125)
    for run in (received_attention_reference, received_attention_triton):
        close(run(query, key, 0.125), wanted, TOLERANCE[dtype])
        close(run(query, key, 0.125, reduce="sum"), wanted * n, TOLERANCE[dtype] * n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 8, 32, 72, 80, 96, 128, 256, 300])
def test_every_width_of_a_head(width: int, dtype: torch.dtype) -> None:
    query, key = heads(1, 2, 7, width, dtype), heads(1, 1, 63, width, dtype)
    close(received_attention_triton(query, key, width**-0.5), exactly(query, key, width**-0.5), TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [(1, 63), (7, 200), (2881, 7), (130, 1)], ids=str)
def test_other_numbers_of_queries_than_keys(lengths: tuple[int, int]) -> None:
    query, key = heads(2, 2, lengths[0], 16), heads(2, 2, lengths[1], 16)
    close(received_attention_triton(query, key, 0.25), exactly(query, key, 0.25))
    total = received_attention_triton(query, key, 0.25, reduce="sum").sum(-1)
    torch.testing.assert_close(total, torch.full((2,), float(lengths[0])))


def ranges(kind: str, n: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    columns = torch.arange(n, dtype=torch.int32)
    if kind == "causal":
        return None, columns[None] + 1
    if kind == "window":
        return (columns - 40)[None], (columns + 41)[None]
    if kind == "packed":
        ends = torch.tensor([0, 1, 70, 70, 71, 190, n], dtype=torch.int32)
        place = torch.searchsorted(ends, columns, right=True)
        return ends[place - 1][None], ends[place][None]
    if kind == "later":
        return columns[None], None
    first = torch.randint(0, n, (2, n))  # in no order; many see nothing
    return first, first + torch.randint(-3, 90, (2, n))


@BOTH
@pytest.mark.parametrize("kind", ["causal", "window", "packed", "later", "any"])
def test_queries_see_from_their_first_key_to_their_stop(run: Any, kind: str) -> None:
    query, key = heads(2, 1, 260, 16, torch.bfloat16), heads(2, 1, 260, 16, torch.bfloat16)
    first, stop = ranges(kind, 260)
    close(run(query, key, 0.25, first, stop), exactly(query, key, 0.25, first, stop), 1e-3)


def test_blocks_that_limits_part_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = heads(1, 1, 640, 16, torch.bfloat16), heads(1, 1, 640, 16, torch.bfloat16)
    products: list[int] = []
    real = module.products
    monkeypatch.setattr(module, "products", lambda *args: products.append(1) or real(*args))
    counts = {}
    for kind in ("all", "causal", "window"):
        products.clear()
        first, stop = ranges(kind, 640) if kind != "all" else (None, None)
        close(received_attention_triton(query, key, 0.25, first, stop), exactly(query, key, 0.25, first, stop), 1e-3)
        counts[kind] = len(products)
    if counts["all"] == 0:
        pytest.skip("this interpreter binds device functions before they can be counted")
    assert counts["all"] == 2 * 5 * 10
    assert counts["causal"] == 2 * (2 + 4 + 6 + 8 + 10)
    assert counts["window"] < 50


MASKS = {
    "padding": lambda: torch.rand(2, 1, 1, 130) > 0.5,
    "per query": lambda: torch.rand(2, 1, 70, 130) > 0.5,
    "per head": lambda: torch.rand(1, 2, 70, 130) > 0.5,
    "addends": lambda: torch.randn(2, 1, 70, 130).bfloat16(),
    "lowest": lambda: torch.zeros(2, 1, 70, 130).masked_fill(
        torch.rand(2, 1, 70, 130) > 0.5, torch.finfo(torch.float32).min
    ),
}


@BOTH
@pytest.mark.parametrize("form", MASKS)
def test_masks_of_every_form(run: Any, form: str) -> None:
    query, key, mask = heads(2, 2, 70, 16), heads(2, 1, 130, 16), MASKS[form]()
    stop = torch.arange(60, 130)[None]
    close(run(query, key, 0.25, mask=mask, stop=stop), exactly(query, key, 0.25, mask=mask, stop=stop))


@BOTH
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_rows_that_are_empty_or_hold_nan_or_infinity_give_nothing(run: Any, value: float) -> None:
    query, key = heads(1, 1, 63, 16).abs(), heads(1, 1, 70, 16)
    key[0, 0, 66] = value
    stop = torch.cat([torch.full((40,), 60), torch.full((3,), 70), torch.zeros(20)]).int()[None]
    found = run(query, key, 0.25, stop=stop)
    close(found[:, :60], exactly(query[:, :, :40], key[:, :, :60], 0.25) * 40 / 63)
    assert (found[:, 60:] == 0).all()


@BOTH
@pytest.mark.parametrize("value", LOWEST, ids=str)
def test_rows_that_a_mask_lowers_as_a_whole_give_as_much_as_others(run: Any, value: float) -> None:
    """Rows of padding: what the mask adds is so large that a logarithm beside it is lost."""
    query, key = whole(1, 2, 70, 16), whole(1, 1, 130, 16)
    mask = torch.zeros(1, 1, 70, 130)
    mask[..., :5, :], mask[..., 60:, 100:] = value, value
    stop = torch.arange(61, 131)[None]
    for limits in ({}, {"stop": stop}):
        for form in (mask, mask.bfloat16()) if value > -3.39e38 else (mask,):
            close(run(query, key, 0.25, mask=form, **limits), in_float32(query, key, 0.25, form, **limits))
            total = run(query, key, 0.25, mask=form, reduce="sum", **limits).sum()
            torch.testing.assert_close(total, torch.tensor(70.0))


@BOTH
@pytest.mark.parametrize("scaling", [1e3, -1e5, 3e30])
def test_huge_logits_share_as_small_ones_do(run: Any, scaling: float) -> None:
    query, key = whole(1, 2, 70, 16), whole(1, 1, 130, 16)
    close(run(query, key, scaling), exactly(query, key, scaling))


@BOTH
@pytest.mark.parametrize("far", [2**31, 2**32 + 3, 2**63 - 1])
def test_limits_beyond_32_bits_are_beyond_all_keys(run: Any, far: int) -> None:
    query, key = heads(1, 1, 70, 16), heads(1, 1, 130, 16)
    near = torch.arange(60, 130)[None]
    for limits in (
        {"stop": torch.full_like(near, far)},
        {"first": near, "stop": torch.full_like(near, far)},
        {"first": torch.full_like(near, -far), "stop": near},
        {"first": torch.where(near % 2 == 0, near, far)},
        {"stop": torch.where(near % 2 == 0, near, -far)},
    ):
        close(run(query, key, 0.25, **limits), exactly(query, key, 0.25, **limits))


@BOTH
def test_nothing_in_nothing_out(run: Any) -> None:
    assert torch.equal(run(torch.randn(2, 4, 0, 8), torch.randn(2, 2, 7, 8), 0.5), torch.zeros(2, 7))
    assert run(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 0, 8), 0.5).shape == (2, 0)
    assert run(torch.randn(0, 4, 3, 8), torch.randn(0, 2, 7, 8), 0.5).shape == (0, 7)


def test_views_of_any_stride() -> None:
    whole = torch.randn(2, 70, 3, 5, 24)
    for query, key in (
        (whole[:, :9, 0, :4, :16].transpose(1, 2), whole[:, :, 1, :2, 8:].transpose(1, 2)),
        (whole[:, 3:9, 0, :4, 3:20].transpose(1, 2), whole[:, ::3, 1, :1, 7:].transpose(1, 2)),
    ):
        close(received_attention_triton(query, key, 0.25), exactly(query, key, 0.25))


def test_rows_far_apart_are_addressed() -> None:
    """Offsets are 64-bit: the second prompt begins beyond 2**31 elements."""
    stride = 2**31 + 64
    both = [torch.empty(stride + 1024, dtype=torch.bfloat16) for _ in range(2)]
    query, key = (one.as_strided((2, 1, 63, 16), (stride, 16, 16, 1)) for one in both)
    query.copy_(torch.randn(query.shape)), key.copy_(torch.randn(key.shape))
    close(received_attention_triton(query, key, 0.25), exactly(query, key, 0.25))


@BOTH
def test_integers_are_no_mask_and_no_heads_have_no_mean(run: Any) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8):
        with pytest.raises(KernelInputError, match="mask must be one of bool"):
            run(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), 0.5, mask=torch.ones(2, 1, 3, 9, dtype=dtype))
    for n in (3, 0):
        with pytest.raises(KernelInputError, match="at least one head"):
            run(torch.randn(2, 0, n, 8), torch.randn(2, 2, 9, 8), 0.5)


GOOD: dict[str, Any] = {"query": torch.randn(2, 4, 3, 8), "key": torch.randn(2, 2, 9, 8), "scaling": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": GOOD["query"].double()}, "query must be one of float32"),
        ({"key": torch.randn(2, 2, 8, 9).transpose(2, 3)}, "contiguous along its last"),
        ({"key": GOOD["key"].to("meta")}, "one device"),
        ({"key": torch.randn(2, 3, 9, 8)}, "multiple of key heads, got 4 for 3"),
        ({"key": torch.randn(2, 2, 9, 7)}, "must"),
        ({"stop": torch.zeros(2, 4, dtype=torch.int32)}, r"stop must have shape \[2 or 1, 3\], got \[2, 4\]"),
        ({"first": torch.zeros(2, 3)}, "first must be one of int32"),
        ({"mask": torch.zeros(2, 1, 3, 8)}, r"mask must broadcast to \[2, 4, 3, 9\]"),
        ({"key": torch.zeros(2, 2, 1, 8).expand(2, 2, 2**31, 8)}, "32 bits"),
        ({"reduce": "max"}, "reduce must be one of mean, sum, got 'max'"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with use("triton"), pytest.raises(KernelInputError, match=message):
        received_attention(**{**GOOD, **change})


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_compile_traces_past_the_operation_and_gradients_stop_at_it(which: Any) -> None:
    query, key = heads(2, 4, 7, 8).requires_grad_(), heads(2, 2, 63, 8)

    @torch.compile(backend="eager", fullgraph=True)
    def scores(query: torch.Tensor) -> torch.Tensor:
        return received_attention(query * 2, key, 0.25) + 0

    with use(which):
        found = scores(query)
    assert not found.requires_grad
    close(found, exactly(query.detach() * 2, key, 0.25))


def test_the_operator_is_what_torch_expects() -> None:
    inputs = (GOOD["query"].transpose(1, 2), torch.randn(2, 1, 9, 8), 0.5, None, torch.full((1, 4), 5), None, "sum")
    torch.library.opcheck(torch.ops.vlm_budget.received_attention.default, inputs)


def test_the_host_reads_nothing_and_memory_grows_with_the_length() -> None:
    """Everything up to the launches runs on tensors without values."""
    query, key = torch.empty(2, 4, 2880, 72, device="meta"), torch.empty(2, 2, 2880, 72, device="meta")
    limit = torch.empty(1, 2880, dtype=torch.int64, device="meta")
    with _launch.recorded() as launches:
        assert received_attention_triton(query, key, 0.5, limit, limit).shape == (2, 2880)
    assert len(launches) == 2
    made = [launches[1].arguments[name] for name in ("peaks", "scales", "begins", "ends", "sums")]
    assert max(tensor.numel() for tensor in made) <= 2 * 4 * 2880


def test_specimens_cover_every_element_type() -> None:
    with _launch.recorded() as launches:
        for _, call in specimens():
            call()
    seen = {(one.arguments["query"].dtype, one.arguments["HEAD"]) for one in launches}
    assert {width for _, width in seen} == {64, 72, 80, 128} and {dtype for dtype, _ in seen} == set(TOLERANCE)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_scored_apart_with_kernels(causal: bool) -> None:
    query, key = heads(1, 2, 111, 16), heads(1, 1, 111, 16)
    ends = torch.tensor([0, 1, 1, 70, 111], dtype=torch.int32)
    rows = {}
    for which in ("reference", "triton"):
        sink = probes.AttentionSink(("received",))
        sink.start()
        with use(which):
            sink.record(query, key, None, 0.25, ends, causal)
        (rows[which],) = sink.stop()["received"]
    torch.testing.assert_close(rows["triton"], rows["reference"], atol=1e-6, rtol=1e-5)
