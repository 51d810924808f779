import json
from pathlib import Path

import pytest
import torch

import vlm_budget
from vlm_budget.eval import vit
from vlm_budget.eval.vit.modeling import WEIGHTS, predict
from vlm_budget.eval.vit.pages import images, labels, pages
from vlm_budget.eval.vit.publish import render

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
FRESH_SEED = 31_338  # neither training, validation nor test
PAGES = 200
MAX_BYTES = 3_000_000


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return vit.load()


@pytest.fixture(scope="module")
def fresh() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = pages(PAGES, FRESH_SEED)
    return images(drawn), labels(drawn)


def is_as_recorded(model: torch.nn.Module, fresh: tuple[torch.Tensor, torch.Tensor], recorded: float) -> bool:
    """The accuracy on fresh pages lies within four standard errors of the recorded one."""
    found = float((predict(model, fresh[0]) == fresh[1]).double().mean())
    return abs(found - recorded) < 4 * (recorded * (1 - recorded) / PAGES) ** 0.5


def test_fresh_pages_are_classified_as_well_as_promised(model, fresh) -> None:
    record = json.loads((RESULTS / "vit_training.json").read_text())
    assert is_as_recorded(model, fresh, record["runs"][str(record["shipped_seed"])]["test"]["accuracy"])


@pytest.mark.parametrize("method", ["tome", "token_transforming"])
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_methods_lose_what_the_table_says(model, fresh, method: str, ratio: float) -> None:
    rows = json.loads((RESULTS / "vit_cpu.json").read_text())["accuracy"]["rows"]
    (row,) = [row for row in rows if (row["method"], row["ratio"]) == (method, ratio)]
    with vlm_budget.patch(model, method, ratio=ratio) as handle:
        assert is_as_recorded(model, fresh, row["accuracy"]["mean"])
        report = handle.report()
    assert report.kept_tokens == row["kept_tokens"]
    assert report.flops / report.flops_unpatched == pytest.approx(row["flops"])


def test_weights_are_small_and_the_card_is_the_recorded_one() -> None:
    record = json.loads((RESULTS / "vit_training.json").read_text())
    assert (vit.folder() / WEIGHTS).stat().st_size == record["bytes"] <= MAX_BYTES
    assert (vit.folder() / "README.md").read_text() == render(record)
