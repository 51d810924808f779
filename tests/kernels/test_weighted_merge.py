"""Mixtures of tokens: the kernels sum what the references sum, and the references what the matrix of weights says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import synthetic_items as make
import tiny_models
import vlm_budget
from vlm_budget import ops
from vlm_budget.errors import KernelInputError
from vlm_budget.pruner import Pruner
from vlm_budget.pruners.cls_topk import ClsTopK
from vlm_budget.pruners.prumerge import PruMerge, PruMergePlus
from vlm_budget.pruners.token_transforming import TokenTransforming, transform_matrix
from vlm_budget.pruners.visionzip import VisionZip
from vlm_budget.triton_kernels import _launch
from vlm_budget.triton_kernels import softmax_merge as softmax
from vlm_budget.triton_kernels.softmax_merge import softmax_merge_reference
from vlm_budget.triton_kernels.weighted_merge import (
    _sums,
    assigned_merge_triton,
    softmax_merge_triton,
    weighted_merge_triton,
)

SIZES = (1, 7, 63, 111, 577, 2881)
TOLERANCE = {
    torch.float32: {"atol": 2e-6, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1e-2, "rtol": 1e-2},  # one rounding of the sum, of eight bits
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
BOTH = pytest.mark.parametrize("which", ["reference", "triton"])


def draw(n: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, width, generator=generator).to(dtype), generator


def listed(values: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Through the matrix of weights, in float64."""
    matrix = torch.zeros(len(index), len(values) + 1, dtype=torch.float64)
    matrix.scatter_add_(1, index % (len(values) + 1), weights.double())
    return (matrix[:, :-1] @ values.double()).float()


@BOTH
@DTYPES
@pytest.mark.parametrize("n", SIZES)
def test_sums_of_listed_tokens(n: int, dtype: torch.dtype, which: Any) -> None:
    values, generator = draw(n, 70, dtype)
    for listed_each in (0, 1, 33):
        index = torch.randint(-1, n, (5, listed_each), generator=generator)
        index[:1] = -1  # one mixture of nothing
        weights = torch.rand(index.shape, generator=generator) / max(listed_each, 1)
        with ops.use(which):
            found = ops.weighted_merge(values, index, weights)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), listed(values, index, weights), **TOLERANCE[dtype])


@BOTH
@DTYPES
@pytest.mark.parametrize("n", SIZES)
def test_sums_of_those_that_belong_to_an_owner(n: int, dtype: torch.dtype, which: Any) -> None:
    values, generator = draw(n, 70, dtype)
    among = torch.randperm(n, generator=generator)[: max(n - 3, 1)]
    owner = torch.randint(-1, 4, among.shape, generator=generator)
    owner[owner == 2] = 0  # owner 2 has none
    weights = torch.rand(among.shape, generator=generator) / n
    want = torch.zeros(5, 70, dtype=torch.float64)
    for token, own, weight in zip(among.tolist(), owner.tolist(), weights.tolist(), strict=True):
        if own >= 0:
            want[own] += weight * values[token].double()
    with ops.use(which):
        found = ops.assigned_merge(values, owner, weights, 5, among=among)
    assert found.dtype == dtype and found[2].eq(0).all() and found[4].eq(0).all()
    torch.testing.assert_close(found.float(), want.float(), **TOLERANCE[dtype])


@BOTH
@DTYPES
@pytest.mark.parametrize(("n", "anchors", "temperature"), [(1, 1, 0.1), (7, 7, 1e-6), (63, 5, 0.1), (577, 17, 2.0)])
def test_softmax_is_the_matrix(n: int, anchors: int, temperature: float, dtype: torch.dtype, which: Any) -> None:
    values, generator = draw(n, 130, dtype)
    keys = torch.randn(n, 33, generator=generator).to(dtype)
    chosen = torch.randperm(n, generator=generator)[:anchors]
    matrix = transform_matrix(keys, chosen, temperature=temperature, top=None, self_weight=0.25)
    with ops.use(which):
        found = ops.softmax_merge(values, keys, chosen, temperature, self_weight=0.25)
    torch.testing.assert_close(found.float(), matrix @ values.float(), **TOLERANCE[dtype])


@BOTH
def test_softmax_over_some_with_keys_of_another_dtype(which: Any) -> None:
    values, generator = draw(111, 20, torch.bfloat16)
    keys = torch.randn(111, 16, generator=generator)
    among = torch.randperm(111, generator=generator)[:71]
    matrix = transform_matrix(keys[among], torch.arange(9), temperature=0.3, top=None)
    with ops.use(which):
        found = ops.softmax_merge(values, keys, among[:9], 0.3, among=among)
        assert ops.softmax_merge(values, keys, among[:0], 0.3).shape == (0, 20)
    torch.testing.assert_close(found.float(), matrix @ values[among].float(), **TOLERANCE[torch.bfloat16])


def test_the_reference_in_pieces_mixes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, _ = draw(63, 5)
    whole = ops.softmax_merge(values, values, torch.arange(9), 0.3)
    monkeypatch.setattr("vlm_budget.triton_kernels.softmax_merge.ENTRIES", 130)
    torch.testing.assert_close(ops.softmax_merge(values, values, torch.arange(9), 0.3), whole)


@DTYPES
def test_strips_of_anchors_mix_the_same_with_each_cosine_made_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, generator = draw(150, 200, dtype)
    keys, anchors = torch.randn(150, 40, generator=generator).to(dtype), torch.arange(130)
    given = keys, anchors, 0.3, torch.arange(150), 0.25
    whole = softmax_merge_triton(values, *given)
    monkeypatch.setattr(softmax, "SCRATCH", 1)
    assert softmax_merge_triton(values, *given).equal(whole)
    with _launch.recorded() as made:
        softmax_merge_triton(values, *given)
    made = [launch.arguments for launch in made]
    assert [each["count"] for each in made] == [64, 64, 64, 64, 2, 2]  # cosines and mixtures of three strips
    assert all(each["shares"].shape == (64, 256) for each in made)
    torch.testing.assert_close(whole.float(), softmax_merge_reference(values, *given).float(), **TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("width", "key_width"), [(1, 17), (20, 1), (48, 48)])
def test_softmax_launches_get_rows_that_begin_at_multiples_of_sixteen(
    width: int, key_width: int, dtype: torch.dtype
) -> None:
    wide, _ = draw(70, 80, dtype)
    values, keys, rows = wide[:, 1 : width + 1], wide[:, 3 : key_width + 3], torch.arange(-1, 70)[1:]
    given = values, keys, torch.arange(6)[1:], 0.3, rows, 0.25
    with _launch.recorded() as made:
        softmax_merge_triton(*given)
    for launch in made:
        assert all(value.data_ptr() % 16 == 0 for value in launch.arguments.values() if torch.is_tensor(value))
        assert all(launch.arguments[name] % 16 == 0 for name in ("width", "stride"))
    found = softmax_merge_triton(*given)
    assert found.shape == (5, width) and found.is_contiguous()
    torch.testing.assert_close(found.float(), softmax_merge_reference(*given).float(), **TOLERANCE[dtype])


@BOTH
def test_softmax_of_keys_whose_length_overflows_is_that_of_zeros(which: Any) -> None:
    values, keys = torch.arange(3.0)[:, None], torch.tensor([[3e19, 0.0], [0.0, 1.0], [1.0, 0.0]])
    with ops.use(which):
        found = ops.softmax_merge(values, keys, torch.tensor([0, 1]), 1e-3)
    torch.testing.assert_close(found[:, 0], torch.tensor([1.0, 1.0]))


@BOTH
def test_softmax_of_zero_keys_and_equal_keys(which: Any) -> None:
    values = torch.arange(4.0)[:, None].expand(4, 3).contiguous()
    keys = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    with ops.use(which):
        found = ops.softmax_merge(values, keys, torch.tensor([0, 1]), 1e-3)
    torch.testing.assert_close(found[:, 0], torch.tensor([1.5, 1.5]))  # like all; like the two of its direction


@BOTH
def test_what_is_not_listed_is_not_read(which: Any) -> None:
    values = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0], [torch.nan, torch.inf]])
    nan = torch.tensor(torch.nan)
    with ops.use(which):
        found = ops.weighted_merge(values, torch.tensor([[-1, 1], [-1, -1]]), torch.tensor([[nan, 2.0], [nan, nan]]))
        assert found.tolist() == [[2, 4], [0, 0]]
        found = ops.assigned_merge(values, torch.tensor([-1, 1, -1]), torch.tensor([nan, 2.0, nan]), 2)
        assert found.tolist() == [[0, 0], [2, 4]]
        assert ops.weighted_merge(values[:0], torch.full((2, 1), -1), torch.ones(2, 1)).tolist() == [[0, 0], [0, 0]]
        assert ops.weighted_merge(values, torch.zeros(0, 3).long(), torch.zeros(0, 3)).shape == (0, 2)
        assert ops.assigned_merge(values, torch.zeros(3).long(), torch.ones(3), 0).shape == (0, 2)


def test_rows_far_apart_are_addressed() -> None:
    """Two rows, 2**31 elements apart; memory between them is never touched."""
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16).as_strided((2, 16), (2**31, 1))
    far.copy_(torch.eye(16)[:2])
    both = torch.arange(2)
    assert weighted_merge_triton(far, both[:, None], torch.ones(2, 1)).equal(far)
    assert assigned_merge_triton(far, both, torch.ones(2), 2, both).equal(far)
    assert softmax_merge_triton(far, far, both, 1e-3, both, 0.0).equal(far)
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16).as_strided((3, 16), (2**30, 1))
    far.copy_(torch.eye(16)[:3])
    every = torch.arange(3)
    assert softmax_merge_triton(far, far, every, 1e-3, every, 0.0).equal(far)


def test_outputs_far_apart_are_addressed() -> None:
    """The second of two rows of 2**31 - 1 channels, of which only the first sixteen are summed."""
    width, index = 2**31 - 1, torch.tensor([[0], [1]])
    out, values = torch.empty(width + 16, dtype=torch.bfloat16), torch.eye(16, dtype=torch.bfloat16)[:2].contiguous()
    _sums.launch(
        (2, 1), values, index, torch.ones(2, 1), None, None, out, 1, 1, width, values.stride(0), ROWS=8, CHANNELS=16
    )
    assert out[width : width + 16].equal(values[1])


@BOTH
def test_gradients_are_those_of_the_matrix(which: Any) -> None:
    values, generator = draw(63, 6)
    keys, anchors = torch.randn(63, 8, generator=generator), torch.arange(4)
    index = torch.randint(-1, 63, (4, 5), generator=generator)
    weights, owned = torch.rand(4, 5, generator=generator), torch.rand(63, generator=generator)
    owner = torch.randint(-1, 4, (63,), generator=generator)
    matrix = torch.zeros(4, 64).scatter_add_(1, index % 64, weights)[:, :-1]
    by_owner = torch.zeros(5, 63).scatter_(0, (owner % 5)[None], owned[None])[:4]
    softmax = transform_matrix(keys, anchors, top=None)
    upstream = torch.randn(4, 6, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (values, weights, owned)]
    with ops.use(which):
        found = [
            ops.weighted_merge(values, index, weights),
            ops.assigned_merge(values, owner, owned, 4),
            ops.softmax_merge(values, keys, anchors, 0.1),
        ]
    for mixed, dense in zip(found, (matrix, by_owner, softmax), strict=True):
        (gradient,) = torch.autograd.grad(mixed, values, upstream, retain_graph=True)
        torch.testing.assert_close(gradient, dense.T @ upstream, **TOLERANCE[torch.float32])
    share = values.detach() @ upstream.T  # [63, 4]
    want = torch.where(index < 0, 0.0, share.T.gather(1, index.clamp_min(0)))
    torch.testing.assert_close(torch.autograd.grad(found[0], leaves[1], upstream)[0], want)
    want = torch.where(owner < 0, 0.0, share.gather(1, owner.clamp_min(0)[:, None])[:, 0])
    torch.testing.assert_close(torch.autograd.grad(found[1], leaves[2], upstream)[0], want)


def test_compile_traces_past_the_operations() -> None:
    values, _ = draw(63, 6)
    anchors, owner = torch.arange(4), torch.arange(63) % 4

    @torch.compile(backend="eager", fullgraph=True)
    def mixed(values: torch.Tensor) -> torch.Tensor:
        lists = ops.weighted_merge(values, anchors[:, None], torch.ones(4, 1))
        return (
            lists + ops.assigned_merge(values, owner, torch.ones(63), 4) + ops.softmax_merge(values, values, anchors, 1)
        )

    want = values[:4] + torch.stack([values[own::4].sum(0) for own in range(4)])
    want = want + transform_matrix(values, anchors, temperature=1, top=None) @ values
    torch.testing.assert_close(mixed(values), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 3, dtype=torch.float64)}, "values must be one of float32"),
        ({"values": torch.zeros(4, 3, dtype=torch.int8)}, "values must be one of float32"),
        ({"values": torch.zeros(3, 4).T}, "contiguous along its last dimension"),
        ({"values": torch.zeros(12)}, "values must have shape"),
        ({"values": torch.zeros(1).expand(2**31, 1)}, "32 bits"),
        ({"values": torch.zeros(4, 3, device="meta")}, "one device"),
        ({"weights": torch.zeros(4, 1, dtype=torch.float16)}, "weights must be one of float32"),
        ({"index": torch.zeros(4, 1, dtype=torch.int32)}, "must be one of int64"),
        ({"index": torch.zeros(4, 2, dtype=torch.long)}, r"must have shape \[4"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"values": torch.zeros(4, 3), "index": torch.zeros(4, 1).long(), "weights": torch.zeros(4, 1), **change}
    values, index, weights = given["values"], given["index"], given["weights"]
    with pytest.raises(KernelInputError, match=message):
        weighted_merge_triton(values, index, weights)
    if "index" not in change:
        flat = index.flatten()
        with pytest.raises(KernelInputError, match=message):
            assigned_merge_triton(values, flat, weights.flatten(), 4, flat)
    if "values" in change:
        with pytest.raises(KernelInputError, match=message):
            softmax_merge_triton(values, torch.zeros(4, 3), torch.arange(2), 0.1, torch.arange(4), 0.0)


def test_what_the_host_knows_is_checked() -> None:
    values, index = torch.zeros(4, 3), torch.zeros(2, 1).long()
    with pytest.raises(KernelInputError, match=r"index and weights \[m, t\], got \[4, 3\], \[2, 1\], \[2, 2\]"):
        ops.weighted_merge(values, index, torch.zeros(2, 2))
    with pytest.raises(KernelInputError, match="one number per token"):
        ops.assigned_merge(values, torch.zeros(3).long(), torch.zeros(4), 2)
    with pytest.raises(KernelInputError, match="count must be at least 0"):
        ops.assigned_merge(values, torch.zeros(4).long(), torch.zeros(4), -1)
    with pytest.raises(KernelInputError, match="temperature must be above 0, got 0"):
        ops.softmax_merge(values, values, index[:, 0], 0)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(KernelInputError, match="temperature must be above 0"):
            softmax_merge_triton(values, values, index[:, 0], temperature, torch.arange(4), 0.0)
    with pytest.raises(KernelInputError, match="among is empty"):
        ops.softmax_merge(values, values, index[:, 0], 1, among=index[:0, 0])
    with pytest.raises(KernelInputError, match=r"keys \[n, C\]"):
        ops.softmax_merge(values, values[:3], index[:, 0], 1)


# --- the methods that merge ------------------------------------------------------------------------------------------

METHODS: list[Pruner] = [
    PruMerge(neighbours=5),
    PruMergePlus(neighbours=5),
    VisionZip(),
    ClsTopK(merge=TokenTransforming(top=5)),
    ClsTopK(merge=TokenTransforming(top=None, self_weight=0.3)),
    ClsTopK(merge=TokenTransforming(exclusive=True, self_weight=0.3)),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_merge_alike_with_kernels(method: Pruner) -> None:
    item = make.anyres(1, 2, side=5, pad=(1, 0))
    ctx = make.context(item, make.random_attention(method, item))
    selections = []
    for which in ("reference", "triton"):
        with ops.use(which):  # type: ignore[arg-type]
            selections.append(method.select(replace(ctx), 13))
    want, found = selections
    assert torch.equal(found.keep, want.keep)
    torch.testing.assert_close(found.values, want.values)


@pytest.mark.parametrize("method", [PruMerge(neighbours=5), VisionZip(contextual=0.5)], ids=str)
def test_a_patched_model_says_the_same_with_kernels(method: Pruner) -> None:
    tiny = tiny_models.build("llava")
    logits = []
    with vlm_budget.patch(tiny.model, method, 0.4), torch.no_grad():
        for which in ("reference", "triton"):
            with ops.use(which):  # type: ignore[arg-type]
                logits.append(tiny.model(**tiny.clone()).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
