"""Tokens of every head gathered in another order, and scattered back.

Rows are copied as they are, whatever their element type. Queries, keys and values of a call go in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from vlm_budget.errors import KernelInputError

from ._heads import group_strides, require_launchable, require_shared, require_tokens
from ._launch import (
    FLOATS,
    Config,
    blocks,
    device_function,
    kernel,
    power_of_two,
    require_dtype,
    require_same_device,
    require_shape,
    tl,
)

AT_ONCE = 3
"""Tensors of one launch."""
_BITS = {2: torch.int16, 4: torch.int32}
"""Whole numbers by bytes, so that one kernel copies all element types of a size."""


def permute_tokens_reference(tensors: Sequence[torch.Tensor], orders: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What is right; see :func:`vlm_budget.ops.permute_tokens`."""
    return [_gathered(tensor, order) for tensor, order in zip(tensors, orders, strict=True)]


def _gathered(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    batch, heads, length, width = tensor.shape
    group = torch.arange(batch * heads, device=tensor.device).view(batch, heads, 1)
    rows = (order + group * length).flatten()
    # Whole rows are copied: several times faster on a CPU than gather, which copies channel by channel.
    return tensor.reshape(-1, width).index_select(0, rows).view(tensor.shape)


def unpermute_tokens_reference(out: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """What is right; see :func:`vlm_budget.ops.unpermute_tokens`."""
    batch, heads, length, width = out.shape
    result = out.new_empty(batch, length, heads, width)
    sample = torch.arange(batch, device=out.device).view(batch, 1, 1)
    head = torch.arange(heads, device=out.device).view(1, heads, 1)
    rows = ((order + sample * length) * heads + head).flatten()
    result.view(-1, width).index_copy_(0, rows, out.reshape(-1, width))
    return result.transpose(1, 2)


def require_orders(tensors: Sequence[torch.Tensor], orders: Sequence[torch.Tensor]) -> None:
    """Refuse what neither half can put into order.

    Raises:
        KernelInputError: Numbers, shapes, element types or devices.
    """
    if not tensors or len(tensors) != len(orders):
        raise KernelInputError(f"need one order for every tensor, got {len(tensors)} tensors, {len(orders)} orders")
    named = {f"tensors[{place}]": tensor for place, tensor in enumerate(tensors)}
    named_orders = {f"orders[{place}]": order for place, order in enumerate(orders)}
    require_same_device(**named, **named_orders)
    require_tokens(**named)
    for (name, tensor), (order_name, order) in zip(named.items(), named_orders.items(), strict=True):
        require_shape(tensors[0].shape, **{name: tensor})
        require_dtype((tensors[0].dtype,), **{name: tensor})
        batch, heads, length = tensor.shape[:3]
        require_shared(batch, heads, length, **{order_name: order})


# fmt: off
@device_function
def _copy(
    source, target, order, sample, head, length, width, sample_stride, head_stride, row_stride,
    target_sample, target_head, target_row, order_sample, order_head,
    BACK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    # fmt: on
    """Copy one tile of rows: to the places of the tile, or back from them."""
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = place < length
    token = tl.load(order + sample * order_sample + head * order_head + place, mask=inside, other=0).to(tl.int64)
    taken = place if BACK else token
    given = token if BACK else place
    source += sample * sample_stride + head * head_stride
    target += sample * target_sample + head * target_head
    cells = inside[:, None] & (channel < width)[None, :]
    row = tl.load(source + taken[:, None] * row_stride + channel[None, :], mask=cells)
    tl.store(target + given[:, None] * target_row + channel[None, :], row, mask=cells)


# fmt: off
@kernel(
    *(Config(warps=warps, meta={"ROWS": rows}) for warps, rows in ((4, 64), (4, 32), (8, 128))),
    key=("width",), sizes=("length", "heads"),
)
def _rows(
    source0, source1, source2, target0, target1, target2, order0, order1, order2, length, heads, width,
    sample0, head0, row0, sample1, head1, row1, sample2, head2, row2, target_sample, target_head, target_row,
    order_sample0, order_head0, order_sample1, order_head1, order_sample2, order_head2,
    BACK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """One tile of places of one head of one of the tensors."""
    group = tl.program_id(1).to(tl.int64)
    sample = group // heads
    head = group % heads
    if tl.program_id(2) == 0:
        _copy(source0, target0, order0, sample, head, length, width, sample0, head0, row0,
              target_sample, target_head, target_row, order_sample0, order_head0, BACK, ROWS, WIDTH)
    if source1 is not None:
        if tl.program_id(2) == 1:
            _copy(source1, target1, order1, sample, head, length, width, sample1, head1, row1,
                  target_sample, target_head, target_row, order_sample1, order_head1, BACK, ROWS, WIDTH)
    if source2 is not None:
        if tl.program_id(2) == 2:
            _copy(source2, target2, order2, sample, head, length, width, sample2, head2, row2,
                  target_sample, target_head, target_row, order_sample2, order_head2, BACK, ROWS, WIDTH)
# fmt: on


def permute_tokens_triton(tensors: Sequence[torch.Tensor], orders: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The kernel; see :func:`vlm_budget.ops.permute_tokens`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_orders(tensors, orders)
    taken = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
    for start in range(0, len(tensors), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        _launched(tensors[part], taken[part], orders[part], False)
    return taken


def unpermute_tokens_triton(out: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The kernel; see :func:`vlm_budget.ops.unpermute_tokens`.

    Raises:
        KernelInputError: Element types, devices, strides or sizes that it cannot work on.
        KernelUnavailableError: It cannot run here.
    """
    require_orders([out], [order])
    batch, heads, length, width = out.shape
    result = torch.empty(batch, length, heads, width, dtype=out.dtype, device=out.device).transpose(1, 2)
    _launched([out], [result], [order], True)
    return result


def _launched(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], orders: Sequence[torch.Tensor], back: bool
) -> None:
    """One launch for up to three tensors, whose targets lie alike."""
    for source, order in zip(sources, orders, strict=True):
        require_dtype(FLOATS, tensor=source)
        require_launchable(source, order=order)
    batch, heads, length, width = sources[0].shape
    if not sources[0].numel():
        return
    kind, unused = _BITS[sources[0].element_size()], AT_ONCE - len(sources)
    strides = [source.stride()[:3] for source in sources] + [(0, 0, 0)] * unused
    order_strides = [group_strides(order) for order in orders] + [(0, 0)] * unused
    _rows.launch(
        lambda meta: (blocks(length, meta["ROWS"]), batch * heads, len(sources)),
        *(*(source.view(kind) for source in sources), *[None] * unused),
        *(*(target.view(kind) for target in targets), *[None] * unused),
        *(*orders, *[None] * unused, length, heads, width),
        *(stride for three in strides for stride in three),
        *targets[0].stride()[:3],
        *(stride for two in order_strides for stride in two),
        BACK=back,
        WIDTH=power_of_two(width, 16),
    )


def specimens() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls that make every shipped launch, for ``make kernels-compile``."""
    order = torch.zeros(1, 2, 300, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (16, 64, 128):
            given = torch.zeros(1, 300, 2, width, dtype=dtype).transpose(1, 2)
            for count in (1, AT_ONCE):
                label = f"{count} times {width} wide, {dtype}"
                yield label, partial(permute_tokens_triton, [given] * count, [order] * count)
            yield f"back, {width} wide, {dtype}", partial(unpermute_tokens_triton, given, order)
