"""What every test relies on: one thread, a fixed seed, no network, and a reason for each skipped GPU test."""

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of a hub client: no test may wait for a network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any import of Triton: kernels then run on the CPU

torch.set_num_threads(1)  # xdist workers would otherwise fight for the cores


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python and torch before each test, so that a test alone equals the test in the suite."""
    value = 0
    random.seed(value)
    torch.manual_seed(value)
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    reason = f"needs a CUDA device and torch {torch.__version__} sees none; `make gpu` runs it where there is one"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
