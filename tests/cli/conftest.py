"""A tiny model on disk, a poster, and the command line in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from vlm_budget.cli import app
from vlm_budget.eval.nano import export, modeling
from vlm_budget.eval.nano.data import test_set as posters

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def library_noise() -> Iterator[None]:
    """The verbs silence transformers, as a program may; the tests of others want it as it was."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's architecture with random weights, as a hub folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = modeling.NanoConfig(vision_width=32, vision_layers=3, text_width=32, text_layers=2)
    export.save(modeling.build_model(config).eval(), folder)
    return folder


@pytest.fixture(scope="session")
def poster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 192 visual tokens to nano's architecture: thumbnail, 2 x 2 crops, 12 row ends."""
    file = tmp_path_factory.mktemp("poster") / "poster.png"
    posters(1)[0].image.save(file)
    return file


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a verb in an empty folder, with no calibrations but its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_BUDGET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: object) -> Any:
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return run
