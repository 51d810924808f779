"""The generated part of nano's page says what its rows are."""

import json
from pathlib import Path

from vlm_budget.eval.nano.report import inside_tables

ROOT = Path(__file__).resolve().parents[3]
SENTENCE = "`gsearch` stands here with its default schedule, which nobody searched"


def test_an_unsearched_schedule_is_told_as_one() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "nano_accuracy.json").read_text(encoding="utf-8"))
    for measured in results["checkpoints"]:
        if "full_inside" in measured:
            rows = [row for row in measured["rows"] if row.get("configured") != "GSearch()"]
            assert SENTENCE in inside_tables(measured)
            assert SENTENCE not in inside_tables({**measured, "rows": rows})
    page = (ROOT / "docs" / "nano.md").read_text(encoding="utf-8")
    assert page.count(SENTENCE) == sum("full_inside" in measured for measured in results["checkpoints"]), (
        "run `make docs`"
    )
