"""A nano that is loaded once, and configurations over a folder of posters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from poster_task import TASKS, write_posters
from vlm_budget.cli.loading import Loaded, load
from vlm_budget.eval import runner
from vlm_budget.eval.config import EvalConfig
from vlm_budget.eval.store import Run

PAGES = 3


@pytest.fixture(scope="session")
def nano() -> Loaded:
    threads = torch.get_num_threads()
    loaded = load("nano-robust", "cpu", "float32", lambda name: None)
    torch.set_num_threads(threads)
    return loaded


@pytest.fixture
def posters(tmp_path: Path) -> Path:
    """A dataset of eighteen questions."""
    write_posters(tmp_path / "posters", PAGES)
    return tmp_path / "posters"


def asked(posters: Path, **changes: Any) -> EvalConfig:
    """A small run over the posters."""
    given = {
        "model": "nano-robust",
        "tasks": ["posters"],
        "methods": ["hired"],
        "budgets": ["0.4"],
        "data": {"posters": str(posters)},
        "task_folders": [str(TASKS)],
        "device": "cpu",
        "pictures": 0,
    }
    return EvalConfig.of({**given, **changes})


def ran(config: EvalConfig, out: Path, loaded: Loaded) -> Run:
    """Run it."""
    return runner.run(config, out, loaded=loaded)
