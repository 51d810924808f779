"""How a run's account reads."""

import json
from dataclasses import replace

from rich.console import Console

from vlm_budget.video.dit.quality import Quality
from vlm_budget.video.dit.report import DenseCalls, VideoReport, ranges

REPORT = VideoReport(
    method="svg2[x]",
    model="WanTransformer3DModel",
    grid="2x3x4",
    tokens=24,
    text=0,
    budget="30% flops",
    steps=3,
    layers=2,
    calls=6,
    sparse_calls=4,
    density=0.5,
    sparse_density=0.25,
    promised=0.3,
    densities=((1.0, 1.0), (0.2, 0.3), (0.2, 0.3)),
    dense=(DenseCalls("warm-up steps", 2, (0,), (0, 1)),),
    error=0.2,
    recall=0.6,
    errors=((0, 0.1), (1, 0.3)),
    sampled_rows=16,
    warnings=("a warning",),
    quality=Quality((30.0, 34.0), (0.9, 0.95), (1.0, 1.0), "frames"),
)


def test_the_text_tells_density_promise_reasons_error_and_quality() -> None:
    text = str(REPORT)
    for told in (
        "svg2[x] at 30% flops on WanTransformer3DModel",
        "50.00%",
        "25.00%, promised at most 30.00% (4 of 6)",
        "2 calls (warm-up steps): steps 0, layers 0-1",
        "0.200 relative, worst 0.300 in layer 1",
        "60.0%, on 16 sampled rows",
        "32.00 dB, 30.00 to 34.00 (frames of 2 clips)",
        "0.9250",
        "warning: a warning",
    ):
        assert told in text, told


def test_recall_never_stands_without_the_error() -> None:
    assert "recall" not in str(replace(REPORT, error=None))


def test_the_table_shows_brackets_as_they_are() -> None:
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(REPORT.table())
    assert "svg2[x]" in console.export_text()


def test_the_dictionary_is_json_and_holds_the_means() -> None:
    found = json.loads(json.dumps(REPORT.to_dict()))
    assert found["layer_densities"] == [1.4 / 3, 1.6 / 3]
    assert found["step_densities"] == [1.0, 0.25, 0.25]
    assert found["quality"]["mean_psnr"] == 32.0
    assert found["dense"][0]["why"] == "warm-up steps"


def test_an_infinite_psnr_is_null_in_json() -> None:
    found = replace(REPORT, quality=Quality((float("inf"),), None, (1.0,), "latents")).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False))["quality"]["psnr"] == [None]


def test_numbers_are_told_in_ranges() -> None:
    assert ranges(()) == ""
    assert ranges((3,)) == "3"
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"


def test_many_layers_are_told_in_twelve_stretches() -> None:
    layers = 60
    row = tuple(layer / 100 for layer in range(layers))
    text = str(replace(REPORT, layers=layers, densities=(row,)))
    (line,) = [line for line in text.splitlines() if "by layer" in line]
    assert line.count("%") == 12
    assert "0-4: 2.0%" in line
