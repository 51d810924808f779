"""``vlm-budget calibrate``: measured, shown, kept, and found by the verb that spends milliseconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Cli = Callable[..., Any]

QUICK = ("--longest", 256, "--repeats", 1)


def test_a_calibration_is_shown_and_kept(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    result = cli("calibrate", tiny_model, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    for text in ("measured", "predicted", "16", "256", "Worst error", "decoding step", "float32", "sdpa", "threads"):
        assert text in result.stdout
    (file,) = (tmp_path / "cache").rglob("*.json")
    assert str(file) in result.stdout


def test_json_holds_setting_model_of_time_and_file(cli: Cli, tiny_model: Path) -> None:
    facts = json.loads(cli("calibrate", tiny_model, "--json", *QUICK).stdout)
    assert facts["command"] == "calibrate" and facts["model"]["class"] == "LlavaNextForConditionalGeneration"
    assert facts["setting"]["model"] == "LlamaModel"
    assert [n for n, _ in facts["latency"]["samples"]] == [16, 32, 64, 128, 256]
    kept = json.loads(Path(facts["file"]).read_text())
    assert (kept["setting"], kept["latency"]) == (facts["setting"], facts["latency"])


def test_the_next_run_may_spend_milliseconds(cli: Cli, tiny_model: Path, poster: Path) -> None:
    assert cli("calibrate", tiny_model, *QUICK).exit_code == 0
    arguments = ("run", poster, "--model", tiny_model, "--repeats", 1, "--max-new-tokens", 2, "--json")
    result = cli(*arguments, "--budget", "1 s")
    assert result.exit_code == 0, result.stderr
    promise = json.loads(result.stdout)["promise"]
    assert promise["unit"] == "ms" and promise["allowed"] == 1000 and 0 < promise["planned"] < 1000
    assert promise["achieved"] > 0


def test_arguments_that_cannot_be_used_are_one_line(cli: Cli, tiny_model: Path) -> None:
    for arguments, message in (
        (("gone/",), "there is no model folder"),
        ((tiny_model, "--longest", 5), "longest must be a whole number of at least 64, got 5"),
        ((tiny_model, "--repeats", 0), "repeats must be a whole number of at least 1, got 0"),
    ):
        result = cli("calibrate", *arguments)
        assert result.exit_code == 1 and result.stdout == ""
        assert result.stderr.startswith("error: ") and message in result.stderr
