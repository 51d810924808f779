"""Ways to launch the attention kernel, timed one by one, so that one session tells which should be the default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from vlm_budget.triton_kernels import block_sparse_attention as attention
from vlm_budget.triton_kernels._launch import Config

CONFIGS: dict[tuple[int, int], tuple[Config, ...]] = {
    (128, 64): tuple(Config(warps=8, stages=stages) for stages in (3, 2, 4)),
    (64, 64): tuple(Config(warps=4, stages=stages) for stages in (3, 2, 4)),
    (128, 128): tuple(Config(warps=8, stages=stages) for stages in (2, 3)),
    (128, 32): tuple(Config(warps=8, stages=stages) for stages in (4, 3)),
}
"""By rows and keys of a tile. Compiled for compute capability 9.0 with heads of 128, tiles of 128 rows spill 300 bytes
a thread and more with four warps; tiles of 64 rows with four leave registers for two programs at a time."""
WAYS = tuple((tma, *tile) for tile in CONFIGS for tma in (False, True))
"""Whether descriptors read the keys, rows, and keys of a tile."""


@contextmanager
def configured(dtype: torch.dtype, rows: int, keys: int, config: Config) -> Iterator[None]:
    """The attention kernel has tiles of so many rows and keys, and is launched in one way, meanwhile."""
    kernel = attention.KERNELS["single" if dtype == torch.float32 else "half"]
    with (
        mock.patch.object(attention, "tile_of", lambda dtype, head: (rows, keys)),
        mock.patch.multiple(kernel, configs=(config,), tunes=False),
    ):
        yield


def launched(
    call: Callable[..., Any], dtype: torch.dtype, way: tuple[bool, int, int], time: Callable[[Callable[[], Any]], Any]
) -> Iterator[dict[str, Any]]:
    """One row per configuration.

    Args:
        call: Runs the kernel; takes ``tma``.
        dtype: Of the queries.
        way: One of :data:`WAYS`.
        time: Judges and times a call; what it returns goes into the row.
    """
    tma, rows, keys = way
    for config in CONFIGS[rows, keys]:
        row = {"tma": tma, "rows": rows, "keys": keys, "warps": config.warps, "stages": config.stages}
        with configured(dtype, rows, keys, config):
            try:
                yield {**row, **time(lambda: call(tma=tma))}
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # Triton's, which need not be installed
                    raise
                yield {**row, "ms": None, "why": str(error).split("\n")[0][:200]}
