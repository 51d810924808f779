"""Softmax rows of chosen queries: kernel and reference against softmax in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import decoder_contexts as make
import vlm_budget
from tiny_models import build
from vlm_budget import ops
from vlm_budget.decoder import received_from
from vlm_budget.engine import probes
from vlm_budget.errors import KernelInputError, KernelUnavailableError
from vlm_budget.ops import attention_rows, use
from vlm_budget.triton_kernels import _launch
from vlm_budget.triton_kernels import attention_rows as module
from vlm_budget.triton_kernels.attention_rows import attention_rows_reference, attention_rows_triton, specimens

SIZES = (1, 7, 63, 111, 577, 2881)
# Products of half precision numbers are exact in float32, so that only the sums round, whatever the inputs are.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
BOTH = pytest.mark.parametrize("run", [attention_rows_reference, attention_rows_triton])
INFINITY, NAN = float("inf"), float("nan")


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
    """[B, H, n, L] float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = torch.einsum("bhid,bhjd->bhij", query.double(), key) * scaling
    columns = torch.arange(key.shape[2])
    if first is not None:
        logits = logits.masked_fill(columns < first[:, None, :, None], -INFINITY)
    if stop is not None:
        logits = logits.masked_fill(columns >= stop[:, None, :, None], -INFINITY)
    if mask is not None:
        logits = logits.masked_fill(~mask, -INFINITY) if mask.dtype == torch.bool else logits + mask.double()
    return logits.softmax(-1).nan_to_num()


def reduced(rows: torch.Tensor, reduce: str) -> torch.Tensor:
    return {"none": rows, "mean": rows.mean(1), "sum": rows.sum(1), "max": rows.max(1).values}[reduce].float()


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 3e-6) -> None:
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, wanted.float(), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_kernel_equals_reference_equals_float64(length: int, dtype: torch.dtype) -> None:
    query, key = heads(1, 4, 1, 64, dtype), heads(1, 1 if length > 577 else 2, length, 64, dtype)
    for reduce in ("mean",) if length > 111 else ("mean", "sum", "max", "none"):  # the interpreter takes its time
        wanted = reduced(exactly(query, key, 0.125), reduce)
        for run in (attention_rows_reference, attention_rows_triton):
            close(run(query, key, 0.125, reduce=reduce), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 8, 32, 72, 80, 96, 128, 256, 300])
def test_every_width_of_a_head(width: int, dtype: torch.dtype) -> None:
    query, key = heads(1, 3, 1, width, dtype), heads(1, 1, 63, width, dtype)
    wanted = exactly(query, key, width**-0.5).mean(1)
    close(attention_rows_triton(query, key, width**-0.5), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("count", [(1, 1), (7, 1), (12, 12), (28, 4), (40, 8)], ids=str)
def test_any_number_of_heads(count: tuple[int, int]) -> None:
    query, key = heads(1, count[0], 2, 16), heads(1, count[1], 63, 16)
    for reduce in ("sum", "max"):
        close(attention_rows_triton(query, key, 0.3, reduce=reduce), reduced(exactly(query, key, 0.3), reduce), 1e-5)


@BOTH
@pytest.mark.parametrize("n", [1, 7, 63])
def test_many_queries(run: Any, n: int) -> None:
    query, key = heads(1, 6, n, 32), heads(1, 2, 63, 32)
    close(run(query, key, 0.2), exactly(query, key, 0.2).mean(1))


def test_queries_whose_scratch_memory_does_not_fit_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, stop = heads(2, 4, 5, 16), heads(2, 2, 63, 16), torch.randint(1, 64, (2, 5))
    mask = torch.rand(2, 1, 5, 63) > 0.2
    for limit in (1, 2 * 4 * 63 * 4 * 4):  # one query at a time; four, so that the last turn has one
        monkeypatch.setattr(module, "SCRATCH", limit)
        found = attention_rows_triton(query, key, 0.2, stop=stop, mask=mask)
        close(found, exactly(query, key, 0.2, stop=stop, mask=mask).mean(1))


@BOTH
@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.int32), (2, torch.int64)], ids=str)
def test_a_query_sees_from_its_first_key_to_its_stop(run: Any, dtype: torch.dtype, batch: int) -> None:
    query, key = heads(batch, 4, 7, 16), heads(batch, 2, 70, 16)
    first = torch.tensor([[0, 0, 5, 64, 69, 3, 70]]).to(dtype)
    stop = torch.tensor([[70, 1, 9, 66, 10**6, 3, 70]]).to(dtype).expand(batch, 7)
    for limits in ({"first": first}, {"stop": stop}, {"first": first, "stop": stop}):
        found = run(query, key, 0.25, reduce="none", **limits)
        close(found, exactly(query, key, 0.25, **limits))
    assert (found[:, :, 5:] == 0).all(), "nothing is between them"


MASKS = {
    "padding": lambda: torch.rand(2, 1, 1, 70) > 0.5,
    "expanded padding": lambda: (torch.rand(2, 1, 1, 70) > 0.5).expand(2, 4, 5, 70),
    "per query": lambda: torch.rand(2, 1, 5, 70) > 0.5,
    "per head": lambda: torch.rand(1, 4, 5, 70) > 0.5,
    "cut out of a longer one": lambda: (torch.rand(2, 1, 9, 90) > 0.5)[:, :, 2:7, :70],
    "columns outside": lambda: (torch.rand(2, 4, 70, 5) > 0.5).transpose(2, 3),
    "addends": lambda: torch.randn(2, 1, 5, 70),
    "addends per head": lambda: torch.randn(2, 4, 1, 70).bfloat16(),
    "additive": lambda: torch.zeros(2, 1, 5, 70).masked_fill(torch.rand(2, 1, 5, 70) > 0.5, -INFINITY),
    "lowest": lambda: torch.zeros(2, 1, 5, 70).masked_fill(
        torch.rand(2, 1, 5, 70) > 0.5, torch.finfo(torch.float32).min
    ),
}


@BOTH
@pytest.mark.parametrize("form", MASKS)
def test_masks_of_every_form(run: Any, form: str) -> None:
    query, key, mask = heads(2, 4, 5, 16), heads(2, 2, 70, 16), MASKS[form]()
    close(run(query, key, 0.25, mask=mask, reduce="none"), exactly(query, key, 0.25, mask=mask))
    stop = torch.tensor([[10, 64, 65, 0, 70]])
    close(run(query, key, 0.25, stop=stop, mask=mask), exactly(query, key, 0.25, stop=stop, mask=mask).mean(1))


@BOTH
def test_rows_that_see_nothing_are_zero(run: Any) -> None:
    query, key = heads(2, 4, 3, 16), heads(2, 4, 63, 16)
    mask = torch.ones(2, 1, 3, 63, dtype=torch.bool)
    mask[1, :, 1] = False
    for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -INFINITY)):
        found = run(query, key, 0.25, mask=form, reduce="none")
        assert (found[1, :, 1] == 0).all()
        torch.testing.assert_close(found.sum(-1), mask[..., 0].expand(2, 4, 3).float())


@BOTH
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e9, -65504.0])
def test_the_lowest_addend_on_all_keys_hides_none_of_them(run: Any, value: float) -> None:
    """It is added as models add it, in float32 before anything else is multiplied: what that leaves of logits, decides.

    Whole numbers, so that all else is exact.
    """
    query, key = (torch.randint(-2, 3, (1, 2, length, 16)).float() for length in (3, 300))
    mask = torch.zeros(1, 1, 3, 300)
    mask[..., :2, :] = value
    found = run(query, key, 0.25, mask=mask, reduce="none")
    close(found, (query @ key.transpose(2, 3) * 0.25 + mask).double().softmax(-1))
    if value < -1e6:
        torch.testing.assert_close(found[:, :, :2], torch.full((1, 2, 2, 300), 1 / 300))
    stop = torch.full((1, 3), 70)
    close(run(query, key, 0.25, stop=stop, mask=mask, reduce="none")[..., :70].sum(-1), torch.ones(1, 2, 3))


@BOTH
@pytest.mark.parametrize("far", [2**31, 2**32 + 3, 2**63 - 1])
def test_limits_beyond_32_bits_are_beyond_all_keys(run: Any, far: int) -> None:
    query, key, near = heads(1, 2, 2, 16), heads(1, 1, 70, 16), torch.tensor([[5, 69]])
    for limits in (
        {"stop": torch.tensor([[far, 9]])},
        {"first": torch.tensor([[-far, 9]]), "stop": near},
        {"first": torch.tensor([[far, 9]])},
        {"first": near, "stop": torch.tensor([[-far, far]])},
    ):
        close(run(query, key, 0.25, reduce="none", **limits), exactly(query, key, 0.25, **limits))


@BOTH
def test_integers_are_no_mask_and_no_heads_have_no_mean(run: Any) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8):
        with pytest.raises(KernelInputError, match="mask must be one of bool"):
            run(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), 0.5, mask=torch.ones(2, 1, 3, 9, dtype=dtype))
    for reduce in ("mean", "sum", "max", "none"):
        with pytest.raises(KernelInputError, match="at least one head"):
            run(torch.randn(2, 0, 3, 8), torch.randn(2, 2, 9, 8), 0.5, reduce=reduce)


@BOTH
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_rows_with_infinity_or_nan_are_zero_and_what_is_not_seen_does_no_harm(run: Any, value: float) -> None:
    query, key = heads(1, 2, 2, 16).abs(), heads(1, 2, 70, 16)
    key[0, 1, 66] = value
    stop = torch.tensor([[70, 66]])
    found = run(query, key, 0.25, stop=stop, reduce="none")
    assert (found[0, 1, 0] == 0).all(), "it is seen"
    close(found[0, 0], exactly(query, key, 0.25, stop=stop)[0, 0])
    torch.testing.assert_close(found[0, 1, 1].sum(), torch.tensor(1.0))


@BOTH
def test_extreme_logits(run: Any) -> None:
    query, key = heads(1, 2, 1, 16) * 300, heads(1, 2, 111, 16) * 300
    close(run(query, key, 1.0), exactly(query, key, 1.0).mean(1))
    close(run(query, key, -1.0), exactly(query, key, -1.0).mean(1))


@BOTH
def test_nothing_in_nothing_out(run: Any) -> None:
    assert run(torch.randn(2, 4, 0, 8), torch.randn(2, 2, 7, 8), 0.5).shape == (2, 0, 7)
    assert run(torch.randn(2, 4, 3, 8), torch.randn(2, 2, 0, 8), 0.5).shape == (2, 3, 0)
    assert run(torch.randn(0, 4, 3, 8), torch.randn(0, 2, 7, 8), 0.5, reduce="none").shape == (0, 4, 3, 7)


def test_views_of_any_stride() -> None:
    whole = torch.randn(2, 70, 3, 5, 24)
    for query, key in (
        (whole[:, :2, 0, :4, :16].transpose(1, 2), whole[:, :, 1, :2, 8:].transpose(1, 2)),  # rows aligned, or not
        (whole[:, 3:5, 0, :4, 3:20].transpose(1, 2), whole[:, ::3, 1, :1, 7:].transpose(1, 2)),
        (whole[:1, :2, 0, :4, :16].transpose(1, 2).expand(2, 4, 2, 16), whole[:, :, 1, :2, 8:].transpose(1, 2)),
    ):
        close(attention_rows_triton(query, key, 0.25), exactly(query, key, 0.25).mean(1))


def test_rows_far_apart_are_addressed() -> None:
    """Offsets are 64-bit: the second prompt's keys begin beyond 2**31 elements, and its flags do, too."""
    stride = 2**31 + 64
    key = torch.empty(stride + 1024, dtype=torch.bfloat16).as_strided((2, 1, 63, 16), (stride, 16, 16, 1))
    mask = torch.empty(stride + 64, dtype=torch.bool).as_strided((2, 1, 1, 63), (stride, 0, 0, 1))
    key.copy_(torch.randn(key.shape)), mask.copy_(torch.rand(mask.shape) > 0.5)
    query = heads(2, 2, 1, 16, torch.bfloat16)
    close(attention_rows_triton(query, key, 0.25, mask=mask), exactly(query, key, 0.25, mask=mask).mean(1))


GOOD: dict[str, Any] = {"query": torch.randn(2, 4, 3, 8), "key": torch.randn(2, 2, 9, 8), "scaling": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": GOOD["query"].double()}, "query must be one of float32"),
        ({"key": GOOD["key"].to(torch.int8)}, "key must be one of float32"),
        ({"key": torch.randn(2, 2, 8, 9).transpose(2, 3)}, "contiguous along its last"),
        ({"key": GOOD["key"].to("meta")}, "one device"),
        ({"stop": torch.zeros(2, 3, dtype=torch.int32, device="meta")}, "one device"),
        ({"key": torch.randn(2, 3, 9, 8)}, "multiple of key heads, got 4 for 3"),
        ({"key": torch.randn(2, 2, 9, 7)}, "must"),
        ({"key": torch.randn(1, 2, 9, 8)}, "must"),
        ({"key": torch.randn(2, 9, 8)}, "must"),
        ({"stop": torch.zeros(2, 4, dtype=torch.int32)}, r"stop must have shape \[2 or 1, 3\], got \[2, 4\]"),
        ({"first": torch.zeros(3, dtype=torch.int32)}, r"first must have shape"),
        ({"first": torch.zeros(2, 3)}, "first must be one of int32"),
        ({"mask": torch.zeros(2, 1, 3, 9, dtype=torch.long)}, "mask must be one of bool"),
        ({"mask": torch.zeros(2, 1, 3, 8)}, r"mask must broadcast to \[2, 4, 3, 9\]"),
        ({"key": torch.zeros(2, 2, 1, 8).expand(2, 2, 2**31, 8)}, "32 bits"),
        ({"reduce": "median"}, "reduce must be one of mean, sum, max, none, got 'median'"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with use("triton"), pytest.raises(KernelInputError, match=message):
        attention_rows(**{**GOOD, **change})


def test_the_kernel_asked_for_by_name_runs_or_raises() -> None:
    on_meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in GOOD.items()}
    with pytest.raises(KernelUnavailableError, match="live on meta"):
        attention_rows_triton(**on_meta)


def test_queries_and_keys_of_two_types_meet_in_the_wider() -> None:
    query, key = heads(1, 2, 1, 16), heads(1, 2, 63, 16, torch.bfloat16)
    close(attention_rows_triton(query, key, 0.25), exactly(query, key, 0.25).mean(1))


@pytest.mark.parametrize("reduce", ["mean", "none"])
@pytest.mark.parametrize("which", ["reference", "triton"])
def test_compile_traces_past_the_operation_and_gradients_stop_at_it(which: Any, reduce: Any) -> None:
    query, key = heads(2, 4, 2, 8).requires_grad_(), heads(2, 2, 63, 8)
    stop = torch.full((1, 2), 50)

    @torch.compile(backend="eager", fullgraph=True)
    def scores(query: torch.Tensor) -> torch.Tensor:
        return attention_rows(query * 2, key, 0.25, stop=stop, reduce=reduce) + 0

    with use(which):
        found = scores(query)
    assert not found.requires_grad
    close(found, reduced(exactly(query.detach() * 2, key, 0.25, stop=stop), reduce))


def test_the_operator_is_what_torch_expects() -> None:
    inputs = (GOOD["query"].transpose(1, 2), torch.randn(2, 1, 9, 8), 0.5, None, torch.full((1, 4), 5), None, "max")
    torch.library.opcheck(torch.ops.vlm_budget.attention_rows.default, inputs)


def test_the_host_reads_nothing_from_the_device() -> None:
    """Everything up to the launches runs on tensors without values."""
    query, key = torch.empty(2, 4, 9, 72, device="meta"), torch.empty(2, 2, 577, 72, device="meta")
    limit = torch.empty(1, 9, dtype=torch.int64, device="meta")
    mask = torch.empty(2, 1, 1, 577, dtype=torch.bool, device="meta")
    with _launch.recorded() as launches:
        assert attention_rows_triton(query, key, 0.5, limit, limit, mask).shape == (2, 9, 577)
    assert len(launches) == 2


def test_lengths_are_not_compiled_in() -> None:
    """Another resolution uses the same kernels."""
    compiled = []
    for length in (63, 577, 2880):
        with _launch.recorded() as launches:
            attention_rows_triton(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, length, 64), 0.5)
        fixed = [{name: value for name, value in one.arguments.items() if name.isupper()} for one in launches]
        compiled.append(fixed)
        assert all(set(one.kernel.sizes) >= {"n", "keys", "key_blocks", "heads"} for one in launches)
    assert compiled[0] == compiled[1] == compiled[2]


def test_specimens_cover_every_element_type() -> None:
    with _launch.recorded() as launches:
        for _, call in specimens():
            call()
    seen = {(one.arguments["query"].dtype, one.arguments["HEAD"]) for one in launches if "query" in one.arguments}
    assert seen == {(dtype, width) for dtype in TOLERANCE for width in (64, 72, 80, 128)}


@pytest.mark.parametrize("given", [False, True], ids=["causal", "visible"])
def test_methods_inside_the_language_model_see_the_same_attention_with_kernels(given: bool) -> None:
    ctx = make.context(["ab", 9, "c", 7, "defgh"], order=1)
    if given:
        visible = torch.rand(len(ctx.hidden), len(ctx.hidden)) > 0.3
        ctx = replace(ctx, captured=replace(ctx.captured, visible=visible))
    for rows in (ctx.last, ctx.readers):
        with use("reference"):
            map_of, scores = ctx.attention(rows), received_from(ctx, rows)
        with use("triton"):
            torch.testing.assert_close(ctx.attention(rows), map_of, atol=3e-6, rtol=1e-5)
            torch.testing.assert_close(received_from(ctx, rows), scores, atol=3e-6, rtol=1e-5)


# --- in patched models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), [("llava", "hired"), ("llava", "prumerge"), ("qwen2_5_vl", "fastv")])
def test_a_patched_model_scores_the_same_with_kernels(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build(name)
    ran: list[str] = []
    launch = _launch.Kernel.launch
    monkeypatch.setattr(_launch.Kernel, "launch", lambda self, *a, **k: ran.append(self.name) or launch(self, *a, **k))
    found = {}
    for which in ("reference", "triton"):
        ran.clear()
        with ops.use(which), torch.no_grad(), vlm_budget.patch(tiny.model, method, 0.8):
            found[which] = tiny.model(**tiny.clone()).logits
        assert ("_block_softmax" in ran) == (which == "triton")
    torch.testing.assert_close(found["triton"], found["reference"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", [None, "padding", "square", "additive"])
def test_a_probe_shows_the_same_rows_with_kernels(form: str | None, causal: bool) -> None:
    query, key = heads(2, 4, 63, 16), heads(2, 2, 63, 16)
    flat = torch.ones(2, 63, dtype=torch.long)
    flat[1, :20] = 0
    square = flat.bool()[:, None, None, :].expand(2, 1, 63, 63)
    masks = {"padding": flat, "square": square, "additive": torch.zeros(square.shape).masked_fill(~square, -INFINITY)}
    rows = {}
    for which in ("reference", "triton"):
        sink = probes.AttentionSink(("cls", "last", "received", "joint_cls"))
        sink.start()
        with use(which):
            sink.record(query, key, masks.get(form or ""), 0.25, None, causal)
        rows[which] = sink.stop()
    for kind, (wanted,) in rows["reference"].items():
        close(rows["triton"][kind][0], wanted)
