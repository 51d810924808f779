"""Greedy choices: whatever is asked for, the kernels compiled for it are among those that ``specimens()`` show."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from vlm_budget.triton_kernels import greedy_diversity, greedy_dpp
from vlm_budget.triton_kernels._launch import FLOATS, Launch, recorded
from vlm_budget.triton_kernels.greedy_diversity import MOST, MOST_DIMENSIONS, greedy_diversity_triton
from vlm_budget.triton_kernels.greedy_dpp import greedy_dpp_triton

META = torch.device("meta")  # nothing is computed where nothing is launched


def compiled_for(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for."""

    def kind(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.storage_offset() % 16 == 0  # torch's memory begins at multiples of 16 bytes
        if value is None or name.isupper():
            return value
        if isinstance(value, float):
            return float
        assert name in launch.kernel.sizes, f"values of {name} would be compiled in"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    named = ((name, kind(name, value)) for name, value in sorted(launch.arguments.items()))
    return launch.kernel.name, launch.config.warps, launch.config.stages, *named


def made(call: Callable[[], object]) -> set[tuple[Any, ...]]:
    with recorded() as launches:
        call()
    assert launches
    return {compiled_for(launch) for launch in launches}


def shown(module: Any) -> set[tuple[Any, ...]]:
    return set().union(*(made(call) for _, call in module.specimens()))


def test_every_launch_of_max_min_diversity_is_a_specimen() -> None:
    known = shown(greedy_diversity)
    assert len(known) == 15
    for n in (1, 577, 1024, 1025, 2048, 2049, 4096, 4097, 8192, 8193, MOST):
        seeds = [torch.empty(4, dtype=dtype, device=META)[1:3] for dtype in (torch.int64, torch.int32)]
        points = [torch.empty(2, n, 9, device=META)[..., 2 : 2 + d + 1] for d in range(MOST_DIMENSIONS)]
        points.append(torch.empty(2, n, 3, dtype=torch.bfloat16, device=META))
        for dtype in (*FLOATS, None):
            features = None if dtype is None else torch.empty(2, n, 25, dtype=dtype, device=META)[..., 1:]
            for seed, xyz in product((None, *seeds), (None, *points)):
                if (seed is None and xyz is not None) or (features is None and xyz is None):
                    continue
                for k, weight in ((1, 1.0), (n, 0.25)):
                    assert made(partial(greedy_diversity_triton, features, xyz, seed, k, weight)) <= known


@pytest.mark.parametrize("n", [1, 1024, 1025, 2881, 46340, 46341])
def test_every_launch_of_greedy_determinants_is_a_specimen(n: int) -> None:
    known = shown(greedy_dpp)
    assert len(known) == 3
    for dtype, level in product(FLOATS, FLOATS):
        features = torch.empty(2, n, 25, dtype=dtype, device=META)[..., 1:]
        quality = torch.empty(n, 5, dtype=level, device=META)[:, 1:3].T
        for k in {1, min(n, 40)}:
            assert made(partial(greedy_dpp_triton, features, quality, k)) <= known
