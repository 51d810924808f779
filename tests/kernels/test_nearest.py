"""Nearest tokens and owners: the kernels find what the references find, and the references what plain loops find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from vlm_budget import ops
from vlm_budget.errors import KernelInputError
from vlm_budget.triton_kernels import _launch
from vlm_budget.triton_kernels import nearest as module
from vlm_budget.triton_kernels._keys import aligned
from vlm_budget.triton_kernels.nearest import assign_triton, nearest_triton

SIZES = (1, 7, 63, 111, 577, 2881)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = pytest.mark.parametrize("which", ["reference", "triton"])
# Products of such keys are exact in every order of adding, so the two halves differ in the last steps only.
TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}


def draw(n: int, m: int, width: int = 48, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    keys = torch.randn(n, width, generator=generator).to(dtype)
    return keys, torch.randperm(n, generator=generator)[:m]


def tied(n: int, m: int, width: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of four entries of 1 or -1, so that all have length 2, and cosines are exact and often equal."""
    generator = torch.Generator().manual_seed(n)
    keys = torch.zeros(n, width)
    keys[:, :4] = torch.randint(0, 2, (n, 4), generator=generator) * 2.0 - 1
    return keys, torch.randperm(n, generator=generator)[:m]


def by_hand(
    keys: torch.Tensor, anchors: list[int], count: int, tokens: list[int], exclude_self: bool = False
) -> list[list[int]]:
    unit = normalize(keys.double(), dim=-1)
    rows = []
    for anchor in anchors:
        cosine = (unit @ unit[anchor]).tolist()
        ranked = sorted((t for t in tokens if not (exclude_self and t == anchor)), key=lambda t: -cosine[t])[:count]
        rows.append(ranked + [-1] * (count - len(ranked)))
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_kernel_equals_reference_equals_loop(n: int, dtype: torch.dtype) -> None:
    keys, anchors = draw(n, min(n, 5), dtype=dtype)
    count = min(n, 4)
    want = by_hand(keys, anchors.tolist(), count, list(range(n)), exclude_self=True)
    owner = by_hand(
        torch.cat([keys[anchors], keys]), list(range(len(anchors), len(anchors) + n)), 1, range(len(anchors))
    )
    for which in ("reference", "triton"):
        with ops.use(which):  # type: ignore[arg-type]
            index, similarity = ops.nearest(keys, anchors, count, exclude_self=True)
            owned = ops.assign(keys, anchors)
        assert index.tolist() == want
        cosine = (normalize(keys.double(), dim=-1)[anchors] @ normalize(keys.double(), dim=-1).T).float()
        cosine = torch.where(index < 0, -torch.inf, cosine.gather(1, index.clamp_min(0)))
        torch.testing.assert_close(similarity, cosine, **TOLERANCE)
        assert owned.tolist() == [one[0] for one in owner]


@BOTH
@pytest.mark.parametrize("n", [7, 111, 577])
def test_ties_go_to_the_lower_index(n: int, which: Any) -> None:
    keys, anchors = tied(n, 6)
    with ops.use(which):
        for exclude_self in (True, False):
            index, _ = ops.nearest(keys, anchors, 7, exclude_self=exclude_self)
            assert index.tolist() == by_hand(keys, anchors.tolist(), 7, list(range(n)), exclude_self)
        owner = ops.assign(keys, anchors)
    nearest_anchor = by_hand(torch.cat([keys[anchors], keys]), list(range(6, 6 + n)), 1, list(range(6)))
    want = [one[0] for one in nearest_anchor]
    for place, anchor in enumerate(anchors.tolist()):
        want[anchor] = place  # an anchor is its own, whoever else has its key
    assert owner.tolist() == want


@BOTH
def test_groups_do_not_see_each_other(which: Any) -> None:
    """Groups of any size, one empty, one without anchors, one with anchors and no tokens, in an order of their own."""
    keys, order = draw(111, 111)
    sizes, shares = [30, 0, 17, 40, 0], [20, 0, 0, 3, 2]
    among = order[: sum(sizes)]
    anchors = torch.cat([among[:20], among[50:53], order[100:102]])
    groups = [among[:30], among[:0], among[30:47], among[47:87], among[:0]]
    with ops.use(which):
        index, _ = ops.nearest(keys, anchors, 35, among=among, sizes=sizes, shares=shares, exclude_self=True)
        owner = ops.assign(keys, anchors, among=among, sizes=sizes, shares=shares)
    want, start = [], 0
    for tokens, share in zip(groups, shares, strict=True):
        want += by_hand(keys, anchors[start : start + share].tolist(), 35, tokens.tolist(), exclude_self=True)
        start += share
    assert index.tolist() == want
    unit = normalize(keys, dim=-1)
    for place, (token, own) in enumerate(zip(among.tolist(), owner.tolist(), strict=True)):
        first, last = (0, 20) if place < 30 else (20, 20) if place < 47 else (20, 23)
        assert own == (first + int((unit[anchors[first:last]] @ unit[token]).argmax()) if last > first else -1)


@BOTH
def test_nothing_to_take_and_all_to_take(which: Any) -> None:
    keys, anchors = draw(7, 3)
    with ops.use(which):
        index, similarity = ops.nearest(keys, anchors, 0)
        assert index.shape == similarity.shape == (3, 0)
        assert ops.nearest(keys, anchors[:0], 5)[0].shape == (0, 5)
        index, _ = ops.nearest(keys, anchors, 7)
        assert index.tolist() == by_hand(keys, anchors.tolist(), 7, list(range(7)))
        index, similarity = ops.nearest(keys, anchors, 9, exclude_self=True)
        assert index[:, 6:].eq(-1).all() and similarity[:, 6:].eq(-torch.inf).all() and index[:, :6].ge(0).all()
        index, similarity = ops.nearest(keys, anchors, 2, among=anchors[:0])
        assert index.eq(-1).all() and similarity.eq(-torch.inf).all()
        assert ops.assign(keys, anchors[:0]).tolist() == [-1] * 7
        assert ops.assign(keys, anchors, among=anchors[:0]).shape == (0,)


@BOTH
def test_zero_keys_are_equally_far_and_broken_keys_near_to_none(which: Any) -> None:
    keys = torch.eye(5)
    keys[2] = 0
    keys[3] = torch.nan
    with ops.use(which):
        index, similarity = ops.nearest(keys, torch.tensor([0, 2, 3]), 5)
        assert index.tolist() == [[0, 1, 2, 4, -1], [0, 1, 2, 4, -1], [-1] * 5]
        assert similarity[:2, :4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
        assert ops.assign(keys, torch.tensor([1, 0, 4])).tolist() == [1, 0, 0, 0, 2]
        assert ops.assign(keys, torch.tensor([1, 3])).tolist() == [0, 0, 0, 1, 0]


def test_references_in_pieces_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, anchors = tied(111, 9)
    groups = {"sizes": [60, 51], "shares": [4, 5], "among": torch.arange(111), "anchors": anchors.sort().values}
    whole = *ops.nearest(keys, count=5, **groups), ops.assign(keys, **groups)
    monkeypatch.setattr("vlm_budget.triton_kernels.nearest.ENTRIES", 130)
    pieces = *ops.nearest(keys, count=5, **groups), ops.assign(keys, **groups)
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)


def test_more_neighbours_than_the_kernel_takes_are_sorted_unless_it_is_named() -> None:
    keys, anchors = draw(111, 2)
    assert ops.nearest(keys, anchors, 100)[0].tolist() == by_hand(keys, anchors.tolist(), 100, list(range(111)))
    with ops.use("triton"), pytest.raises(KernelInputError, match="up to 64 neighbours, got count=65"):
        ops.nearest(keys, anchors, 65)


def test_wide_keys_of_any_stride() -> None:
    keys, anchors = draw(63, 5, width=1283)
    rows = keys[::3, :1280]
    anchors = torch.tensor([4, 0, 20])
    assert nearest_triton(rows, anchors, 3, torch.arange(21), [21], [3], True)[0].tolist() == by_hand(
        rows, anchors.tolist(), 3, list(range(21)), exclude_self=True
    )


def test_rows_far_apart_are_addressed() -> None:
    """Two rows, 2**31 elements apart; memory between them is never touched."""
    whole = torch.empty(2**31 + 16, dtype=torch.bfloat16)
    far = whole.as_strided((2, 16), (2**31, 1))
    far.copy_(torch.eye(16)[:2])
    both = torch.arange(2)
    lengths = torch.linalg.vector_norm(far, dim=-1, dtype=torch.float32)
    assert lengths.tolist() == [1, 1]
    assert nearest_triton(far, both, 1, both, [2], [2], False)[0].tolist() == [[0], [1]]
    assert assign_triton(far, both, both, [2], [2]).tolist() == [0, 1]


def test_a_stride_of_32_bits_may_lead_further() -> None:
    """Three rows, 2**30 elements apart, read where they lie."""
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16).as_strided((3, 16), (2**30, 1))
    far.copy_(torch.eye(16)[:3])
    assert aligned(far) is far
    every = torch.arange(3)
    assert nearest_triton(far, every, 1, every, [3], [3], False)[0].tolist() == [[0], [1], [2]]
    assert assign_triton(far, every, every, [3], [3]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [0, 1, 17, 48])
def test_launches_get_rows_that_begin_at_multiples_of_sixteen(width: int, dtype: torch.dtype) -> None:
    """Also where the rows, the anchors or the tokens are part of something wider, or begin anywhere."""
    wide, _ = draw(70, 0, width + 3, dtype)
    keys, tokens, anchors = wide[:, 1 : width + 1], torch.arange(-1, 70)[1:], torch.arange(-1, 11)[1:]
    for given in (keys, keys.clone(), wide[:, :width]):
        with _launch.recorded() as made:
            nearest_triton(given, anchors, 2, tokens, [70], [11], False)
            assign_triton(given, anchors, tokens, [70], [11])
        for launch in made:
            assert all(value.data_ptr() % 16 == 0 for value in launch.arguments.values() if torch.is_tensor(value))
            assert all(launch.arguments.get(name, 16) % 16 == 0 for name in ("width", "stride"))
        with ops.use("triton"):
            found = *ops.nearest(given, anchors, 2, among=tokens), ops.assign(given, anchors, among=tokens)
        want = *ops.nearest(given, anchors, 2, among=tokens), ops.assign(given, anchors, among=tokens)
        if width != 1:  # the cosines of single numbers differ by what they were rounded to
            assert found[0].equal(want[0]) and found[2].equal(want[2])
        torch.testing.assert_close(found[1], want[1], **TOLERANCE)


def test_a_single_group_is_launched_without_a_table_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, anchors = draw(63, 5)
    copied: list[str] = []
    monkeypatch.setattr(module.torch, "tensor", lambda *given, **named: copied.append("a list of the host"))
    with ops.use("triton"):
        ops.nearest(keys, anchors, 3)
        ops.assign(keys, anchors)
        assert copied == []
        with pytest.raises(AttributeError):  # groups do need one: the double gives nothing to copy
            ops.nearest(keys, anchors, 3, sizes=[60, 3], shares=[3, 2])
    assert copied == ["a list of the host"]


@BOTH
def test_keys_whose_length_overflows_are_equally_far_and_infinite_ones_near_to_none(which: Any) -> None:
    keys = torch.eye(5)
    keys[1] *= 3e19
    keys[3, 0] = torch.inf
    with ops.use(which):
        index, similarity = ops.nearest(keys, torch.tensor([0, 1, 3]), 5)
        assert ops.assign(keys, torch.tensor([0, 1])).tolist() == [0, 1, 0, 0, 0]
    assert index.tolist() == [[0, 1, 2, 4, -1], [0, 1, 2, 4, -1], [-1] * 5]
    assert similarity[:2, :4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


def test_compile_traces_past_the_operations() -> None:
    keys, anchors = draw(63, 5)

    @torch.compile(backend="eager", fullgraph=True)
    def found(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.nearest(keys * 2, anchors, 3)[0] + 0, ops.assign(keys * 2, anchors) + 0

    index, owner = found(keys)
    assert torch.equal(index, ops.nearest(keys, anchors, 3)[0])
    assert torch.equal(owner, ops.assign(keys, anchors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(4, 3, dtype=torch.float64)}, "keys must be one of float32"),
        ({"keys": torch.zeros(4, 3, dtype=torch.int8)}, "keys must be one of float32"),
        ({"keys": torch.zeros(3, 4).T}, "contiguous along its last dimension"),
        ({"keys": torch.zeros(12)}, r"keys must have shape \[any, any\]"),
        ({"anchors": torch.zeros(1, dtype=torch.int32)}, "anchors must be one of int64"),
        ({"anchors": torch.zeros(2, dtype=torch.long)}, r"anchors must have shape \[1\]"),
        ({"among": torch.arange(4, device="meta")}, "one device"),
        ({"among": torch.arange(8)[::2]}, "contiguous"),
        ({"keys": torch.zeros(1).expand(2**31, 1)}, "32 bits"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    keys = torch.zeros(4, 3)
    given = {"keys": keys, "anchors": torch.zeros(1, dtype=torch.long), "among": torch.arange(4), **change}
    with pytest.raises(KernelInputError, match=message):
        assign_triton(**given, sizes=[4], shares=[1])
    with pytest.raises(KernelInputError, match=message):
        nearest_triton(**given, count=1, sizes=[4], shares=[1], exclude_self=False)


@pytest.mark.parametrize(("sizes", "shares"), [([4], [1, 0]), ([5, -1], [1, 0]), ([2, 2], [2, -1])])
def test_kernels_refuse_groups_that_do_not_match(sizes: list[int], shares: list[int]) -> None:
    keys, anchors, among = torch.zeros(4, 3), torch.zeros(1, dtype=torch.long), torch.arange(4)
    with pytest.raises(KernelInputError, match="same groups, by counts of at least 0"):
        nearest_triton(keys, anchors, 1, among, sizes, shares, False)
    with pytest.raises(KernelInputError, match="same groups, by counts of at least 0"):
        assign_triton(keys, anchors, among, sizes, shares)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"sizes": [4]}, "come together"),
        ({"sizes": [3], "shares": [1]}, r"sizes must be at least 0 and sum to 4, got \[3\]"),
        ({"sizes": [5, -1], "shares": [1, 0]}, "sizes must be at least 0"),
        ({"sizes": [4], "shares": [2]}, "shares must be at least 0 and sum to 1"),
        ({"sizes": [2, 2], "shares": [1]}, "same groups"),
        ({"keys": torch.zeros(4)}, r"keys must be \[n, C\]"),
    ],
)
def test_groups_the_host_knows_are_checked(change: dict[str, Any], message: str) -> None:
    given = {"keys": torch.zeros(4, 3), "anchors": torch.zeros(1, dtype=torch.long), "count": 1, **change}
    with pytest.raises(KernelInputError, match=message):
        ops.nearest(**given)
