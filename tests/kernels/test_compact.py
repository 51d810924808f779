"""Compaction: the kernels give the bits of the references, and the references those of plain indexing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlm_budget import ops
from vlm_budget.errors import KernelInputError, KernelUnavailableError
from vlm_budget.triton_kernels._launch import recorded
from vlm_budget.triton_kernels.compact import (
    compact_reference,
    compact_triton,
    compaction_index_reference,
    compaction_index_triton,
    take_columns_reference,
    take_columns_triton,
)

SIZES = (1, 7, 63, 111, 577, 2881)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
PADDINGS = pytest.mark.parametrize("right_padded", [False, True], ids=["left", "right"])
INDEXES = pytest.mark.parametrize("index_of", [compaction_index_reference, compaction_index_triton])
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, with numbers where numbers are; torch's own gather does not keep the bits of what is none."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def ragged(length: int) -> torch.Tensor:
    """[4, length] flags: none, few, most, all."""
    return torch.rand(4, length) < torch.tensor([[0.0], [0.2], [0.8], [1.1]])


def sorted_index(keep: torch.Tensor, slots: int, right_padded: bool) -> tuple[torch.Tensor, ...]:
    """What a stable sort of the flags gives, and what a dropped column repeats."""
    order = keep.to(torch.uint8).argsort(dim=1, stable=True, descending=right_padded)
    index = order[:, :slots] if right_padded else order[:, keep.shape[1] - slots :]
    valid = keep.gather(1, index)
    return index, valid, (keep.cumsum(1) - 1).clamp_min(0) + valid.long().argmax(1, keepdim=True)


@PADDINGS
@INDEXES
@pytest.mark.parametrize("length", [*SIZES, 2048, 4097])
def test_the_index_is_that_of_a_stable_sort(index_of: Callable[..., Any], length: int, right_padded: bool) -> None:
    keep = ragged(length)
    few = keep[:2]
    for flags, slots in ((keep, length), (few, max(1, int(few.sum(1).max()))), (few, length)):
        expected = sorted_index(flags, slots, right_padded)
        for found, wanted in zip(index_of(flags, slots, right_padded), expected, strict=True):
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@PADDINGS
@INDEXES
def test_rows_without_columns_and_calls_without_slots(index_of: Callable[..., Any], right_padded: bool) -> None:
    for rows, length, slots in ((2, 0, 0), (0, 3, 2), (2, 3, 0)):
        index, valid, source = index_of(torch.zeros(rows, length, dtype=torch.bool), slots, right_padded)
        assert index.shape == valid.shape == (rows, slots) and not source.any() and source.shape == (rows, length)


@PADDINGS
def test_more_survivors_than_promised_stay_within_the_slots(right_padded: bool) -> None:
    keep = torch.ones(2, 63, dtype=torch.bool)
    found, expected = (run(keep, 7, right_padded) for run in (compaction_index_triton, compaction_index_reference))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert int(found[2].max()) == 6


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_every_element_type_keeps_its_bits(dtype: torch.dtype) -> None:
    values = torch.randint(0, 256, (2, 63, 24), dtype=torch.uint8).view(dtype) if dtype != torch.bool else ragged(96)
    values = values if values.ndim == 3 else values.view(2, 64, 3)
    index = torch.randint(values.shape[1], (2, 11))
    found, whole = take_columns_triton(values, index), BITS[dtype.itemsize]
    assert found.dtype == dtype
    assert torch.equal(found.view(whole), values.view(whole)[torch.arange(2)[:, None], index])
    assert same(found, take_columns_reference(values, index))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_columns_are_taken_and_grown_as_by_indexing(length: int, dtype: torch.dtype) -> None:
    keep, rows = ragged(length)[1:3], torch.arange(2)[:, None]
    index, _, source = compaction_index_reference(keep, length, False)
    for width in (5, 48):
        values = torch.randn(2, length, width).to(dtype)
        taken = take_columns_triton(values, index)
        assert same(taken, values[rows, index])
        assert same(take_columns_triton(taken, source), taken[rows, source])


@pytest.mark.parametrize("width", [511, 512, 896, 1100])
def test_rows_wider_than_a_tile(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values, index = torch.randn(2, 13, width).to(dtype), torch.randint(13, (2, 9))
        assert same(take_columns_triton(values, index), take_columns_reference(values, index))


@pytest.mark.usefixtures("kernels")
def test_trailing_dimensions_and_strided_rows_are_taken() -> None:
    index = torch.randint(7, (2, 5))
    for values in (
        torch.randn(2, 7),
        torch.randn(2, 7, 3, 4),
        torch.randn(2, 3, 7).mT,
        torch.randn(7, 3, 2).permute(2, 0, 1),
    ):
        assert same(ops.take_columns(values, index), values[torch.arange(2)[:, None], index])
    expanded = torch.randn(1, 7, 3).expand(2, -1, -1)
    assert same(ops.take_columns(expanded, index), expanded[torch.arange(2)[:, None], index])
    assert ops.take_columns(torch.randn(2, 7, 0), index).shape == (2, 5, 0)
    assert ops.take_columns(torch.randn(2, 7, 3), index[:, :0]).shape == (2, 0, 3)


def call(length: int, dtype: torch.dtype = torch.float32, axes: int = 3, levels: int = 3, width: int = 8) -> list[Any]:
    """Arguments of a call; dropped columns hold no numbers."""
    keep = ragged(length)[:3]
    index, valid, _ = compaction_index_reference(keep, max(1, int(keep.sum(1).max())), False)
    visual = torch.rand(3, length) < 0.6
    embeds = torch.randn(3, length, width).to(dtype).masked_fill(~keep[..., None], torch.nan)
    positions = torch.randint(9999, (axes, 3, length)) if axes else None
    deepstack = [torch.randn(int(visual.sum()), width).to(dtype) for _ in range(levels)]
    for level in deepstack:
        level[~keep[visual]] = torch.nan
    return [
        embeds,
        index,
        valid,
        keep,
        positions,
        visual if levels or axes else None,
        deepstack,
        int((visual & keep).sum()),
    ]


def step_by_step(
    embeds: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor,
    keep: torch.Tensor,
    positions: torch.Tensor | None,
    visual: torch.Tensor | None,
    deepstack: list[torch.Tensor],
    rows: int,
) -> list[torch.Tensor]:
    """What plain torch gives, one tensor after the other."""
    taken = [embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))]
    if positions is not None:
        taken.append(positions.gather(-1, index.expand(*positions.shape[:-1], -1)) * valid)
    if visual is not None:
        taken.append(visual.gather(1, index) & valid)
        taken += [level[keep[visual]] for level in deepstack]
    return taken


@pytest.mark.parametrize("run", [compact_reference, compact_triton])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_a_call_is_compacted_as_tensor_by_tensor(run: Callable[..., Any], length: int, dtype: torch.dtype) -> None:
    arguments = call(length, dtype)
    found, expected = run(*arguments), step_by_step(*arguments)
    assert len(found) == len(expected) == 6
    assert all(same(*pair) for pair in zip(found, expected, strict=True))
    valid = arguments[2]
    assert not found[0][valid].isnan().any() and not any(level.isnan().any() for level in found[3:])


@pytest.mark.parametrize("run", [compact_reference, compact_triton])
@pytest.mark.parametrize(("axes", "levels"), [(0, 0), (1, 0), (4, 0), (0, 1), (1, 2), (3, 4), (4, 5)])
def test_any_number_of_axes_and_levels(run: Callable[..., Any], axes: int, levels: int) -> None:
    for width in (5, 600):
        arguments = call(63, axes=axes, levels=levels, width=width)
        expected = step_by_step(*arguments)
        found = run(*arguments)
        assert len(found) == len(expected) == 1 + bool(axes) + bool(axes or levels) + levels
        assert all(same(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("run", [compact_reference, compact_triton])
def test_no_visual_column_is_kept_or_all_are(run: Callable[..., Any]) -> None:
    arguments = call(63)
    embeds, keep, visual = arguments[0], arguments[3], arguments[5]
    for kept in (keep & ~visual, torch.ones_like(keep)):
        index, valid, _ = compaction_index_reference(kept, 63, True)
        given = [embeds, index, valid, kept, *arguments[4:7], int((visual & kept).sum())]
        assert all(same(*pair) for pair in zip(run(*given), step_by_step(*given), strict=True))


def test_levels_of_another_type_and_width_than_the_embeddings() -> None:
    arguments = call(111, torch.bfloat16)
    arguments[6] = [torch.randn(len(level), 700) for level in arguments[6]]
    found, expected = compact_triton(*arguments), step_by_step(*arguments)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_positions_that_rows_share() -> None:
    arguments = call(63)
    arguments[4] = torch.arange(63)[None, None].expand(1, 3, -1)
    found, expected = compact_triton(*arguments), step_by_step(*arguments)
    assert all(same(*pair) for pair in zip(found, expected, strict=True))


def test_a_wrong_number_of_rows_is_told_on_the_host_and_harmless_on_the_device() -> None:
    *arguments, rows = call(63)
    expected = step_by_step(*arguments, rows)[3:]
    for wrong in (rows - 3, len(arguments[-1][0]), 0):
        with pytest.raises(KernelInputError, match=f"{wrong} visual columns were said to be kept, and {rows} are"):
            compact_reference(*arguments, wrong)
        for level, whole in zip(compact_triton(*arguments, wrong)[3:], expected, strict=True):
            assert len(level) == wrong
            assert same(level[:rows], whole[:wrong])


def test_a_level_shorter_than_the_visual_columns_is_not_read_behind_its_end() -> None:
    *arguments, _ = call(63)
    room = torch.full((len(arguments[6][0]), 8), float("nan"))
    room[:3] = 1.0
    arguments[6] = [room[:3]]
    assert compact_triton(*arguments, 3)[3].isfinite().all()


def test_embeddings_without_columns_still_have_positions_and_flags() -> None:
    *arguments, rows = call(63)
    arguments[0] = arguments[0][..., :0]
    found, expected = (run(*arguments[:6], [], 0) for run in (compact_triton, compact_reference))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.usefixtures("kernels")
def test_all_is_copied_in_one_launch() -> None:
    arguments = call(63)
    with recorded() as plain:
        compact_triton(*arguments[:6], [], 0)
    with recorded() as deep:
        compact_triton(*arguments)
    made = [[one.kernel.name for one in each if one.config is one.kernel.configs[0]] for each in (plain, deep)]
    assert made == [["_payload"], ["_visual_rows", "_payload"]]


def test_rows_that_lie_more_than_two_to_the_31_elements_apart() -> None:
    room = torch.empty(2**32 + 64, dtype=torch.uint8)  # mapped where it is touched
    far = room.as_strided((2, 3, 8), (2**32 - 2**30, 2**29, 1))
    values = torch.randint(1, 255, (2, 3, 8), dtype=torch.uint8)
    far.copy_(values)
    index = torch.tensor([[2, 0], [1, 2]])
    assert torch.equal(take_columns_triton(far, index), take_columns_reference(values, index))
    keep = torch.tensor([[True, False, True]] * 2)
    index, valid, _ = compaction_index_reference(keep, 2, True)
    positions = room.as_strided((2, 2, 3), (2**32 - 2**29, 2**28, 1))
    positions.copy_(values[..., :3][:, :2])
    level = room.as_strided((6, 8), (2**29 + 2**28, 1), 32)
    level.copy_(values.flatten(0, 1))
    visual = torch.ones_like(keep)
    arguments = [far, index, valid, keep, positions, visual, [level], 4]
    expected = step_by_step(far.clone(), *arguments[1:4], positions.clone(), visual, [level.clone()], 4)
    assert all(torch.equal(*pair) for pair in zip(compact_triton(*arguments), expected, strict=True))
    flags = room.view(torch.bool).as_strided((2, 3), (2**32, 1))
    flags.copy_(keep)
    found = compaction_index_triton(flags, 2, True)
    assert all(torch.equal(*pair) for pair in zip(found, compaction_index_reference(keep, 2, True), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(3, 2, dtype=torch.int32)}, "index must be one of int64, got torch.int32"),
        ({2: torch.zeros(3, 2)}, "valid must be one of bool"),
        ({3: torch.zeros(3, 9, dtype=torch.uint8)}, "keep must be one of bool"),
        ({3: torch.zeros(3, 8, dtype=torch.bool)}, r"keep must have shape \[3, 9\]"),
        ({4: torch.zeros(3, 9)}, r"positions must have shape \[any, 3, 9\]"),
        ({5: torch.zeros(3, 9)}, "visual must be one of bool"),
        ({6: [torch.zeros(4, 8), torch.zeros(4, 9)]}, r"deepstack\[1\] must have shape \[4, 8\]"),
        ({6: [torch.zeros(4, 8), torch.zeros(4, 8).half()]}, r"deepstack\[1\] must be one of float32"),
        ({6: [torch.zeros(8)]}, r"deepstack\[0\] must have shape \[any, any\]"),
        ({6: [torch.zeros(26, 8)]}, "deepstack keeps 27 rows: pass visual= and levels with as many"),
        ({7: 28}, "deepstack keeps 28 rows"),
        ({7: -1}, "deepstack keeps -1 rows"),
        ({0: torch.zeros(3, 9)}, r"embeds must have shape \[any, any, any\]"),
        ({4: torch.zeros(1, 3, 9, device="meta")}, "all tensors must live on one device, .*positions on meta"),
    ],
)
@pytest.mark.parametrize("run", [compact_reference, compact_triton])
def test_a_call_that_does_not_fit_together(run: Callable[..., Any], change: dict[int, Any], message: str) -> None:
    arguments = [torch.zeros(3, 9, 8), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)]
    flags = torch.ones(3, 9, dtype=torch.bool)
    arguments += [flags, None, flags, [torch.zeros(27, 8)], 27]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(KernelInputError, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("values", "index", "message"),
    [
        (torch.zeros(2, 7, 3), torch.zeros(2, 5), "index must be one of int64, got torch.float32"),
        (torch.zeros(2, 7), torch.zeros(2, 5, dtype=torch.long), r"values must have shape \[any, any, any\]"),
        (torch.zeros(2, 7, 3), torch.zeros(3, 5, dtype=torch.long), r"index must have shape \[2, any\]"),
        (torch.zeros(2, 3, 7).mT, torch.zeros(2, 5, dtype=torch.long), "values must be contiguous along its last"),
        (torch.zeros(2, 7, 3), torch.zeros(2, 5, dtype=torch.long, device="meta"), "index on meta"),
        (torch.zeros(2, 7, 3).cfloat(), torch.zeros(2, 5, dtype=torch.long), "cannot copy elements of torch.complex64"),
        (torch.zeros(2, 7, 3).cdouble(), torch.zeros(2, 5, dtype=torch.long), "cannot copy elements of torch.complex1"),
        (torch.zeros(2, 7, 3), torch.zeros(2, 1, dtype=torch.long).expand(-1, 2**30), "slots must lie between 0 and"),
        (
            torch.empty(1, 1, 2**31, device="meta"),
            torch.empty(1, 1, dtype=torch.long, device="meta"),
            "width must lie between 0 and",
        ),
    ],
)
def test_columns_that_cannot_be_taken(values: torch.Tensor, index: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        take_columns_triton(values, index)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_columns_cannot_be_taken() -> None:
    values = torch.quantize_per_tensor(torch.rand(2, 7, 3), 0.1, 0, torch.quint8)
    with pytest.raises(KernelInputError, match="cannot copy elements of torch.quint8"):
        take_columns_triton(values, torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_operations_refuse_what_does_not_fit(name: Any) -> None:
    keep, index = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.long)
    with ops.use(name):
        for slots in (-1, 8):
            with pytest.raises(
                KernelInputError, match=f"slots must lie between 0 and the 7 columns of a row, got {slots}"
            ):
                ops.compaction_index(keep, slots, True)
        for flags in (keep[0], keep.long()):
            with pytest.raises(KernelInputError, match=r"keep must be \[B, L\] bool"):
                ops.compaction_index(flags, 1, True)
        with pytest.raises(KernelInputError, match=r"index must be \[B, K\] for values \[B, L, ...\]"):
            ops.take_columns(torch.zeros(3, 7), index)
        with pytest.raises(KernelInputError, match="pass visual="):
            ops.compact(torch.zeros(2, 7, 3), index, index.bool(), keep, deepstack=[torch.zeros(4, 3)])


def test_strided_flags_and_sizes_beyond_32_bits() -> None:
    with pytest.raises(KernelInputError, match="keep must be contiguous along its last dimension"):
        compaction_index_triton(torch.ones(7, 2, dtype=torch.bool).T, 3, True)
    with pytest.raises(KernelInputError, match="length must lie between 0 and 2147483647"):
        compaction_index_triton(torch.empty(1, 2**31, dtype=torch.bool, device="meta"), 3, True)
    with pytest.raises(KernelUnavailableError, match="_index runs on"):
        compaction_index_triton(torch.empty(1, 8, dtype=torch.bool, device="meta"), 3, True)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_gradients_flow_through(name: Any) -> None:
    _, index, valid, keep, positions, visual, deepstack, rows = call(9)
    _, _, source = compaction_index_reference(keep, index.shape[1], False)
    embeds = torch.randn(3, 9, 2, dtype=torch.double, requires_grad=True)
    levels = [torch.randn(len(level), 2, dtype=torch.double, requires_grad=True) for level in deepstack]

    def taken(embeds: torch.Tensor, *levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = ops.compact(embeds, index, valid, keep, positions, visual, levels, rows)
        return found.embeds, *found.deepstack

    def grown(embeds: torch.Tensor) -> torch.Tensor:
        return ops.take_columns(ops.take_columns(embeds, index), source)

    with ops.use(name):
        assert torch.autograd.gradcheck(taken, (embeds, *levels), fast_mode=True)
        assert torch.autograd.gradcheck(grown, (embeds,), fast_mode=True)
        alone = ops.compact(embeds, index, valid, keep).embeds
        assert torch.equal(*(torch.autograd.grad(each.sum(), embeds)[0] for each in (alone, taken(embeds, *levels)[0])))


def test_gradients_have_the_bits_of_plain_indexing() -> None:
    arguments = call(111)
    leaves = [arguments[0], *arguments[6]]
    gradients = []
    for run in (step_by_step, lambda *given: ops.compact(*given)):
        fresh = [leaf.detach().nan_to_num().requires_grad_() for leaf in leaves]
        found = run(fresh[0], *arguments[1:6], fresh[1:], arguments[7])
        outputs = [found[0], *(found[3] if isinstance(found, ops.Compacted) else found[3:])]
        sum((output * torch.arange(output.numel()).view_as(output).sin()).sum() for output in outputs).backward()
        gradients.append([leaf.grad for leaf in fresh])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_operators_are_what_torch_expects() -> None:
    arguments, operators = call(9), torch.ops.vlm_budget
    arguments[0] = torch.randn_like(arguments[0])
    arguments[6] = [torch.randn_like(level) for level in arguments[6]]
    torch.library.opcheck(operators.compact.default, tuple(arguments))
    torch.library.opcheck(operators.take_columns.default, (arguments[0], arguments[1]))
    torch.library.opcheck(operators.compaction_index.default, (arguments[3], 9, False))
