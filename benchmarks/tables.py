"""Writes the figures of recorded benchmarks into the pages that show them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_budget.eval.markdown import replace_section, table


def prefill(data: dict[str, Any]) -> str:
    """The table of ``benchmarks/prefill.py``."""
    rows = [
        [
            result["method"],
            f"{result['kept_tokens']} of {result['visual_tokens']}",
            f"{result['ratios']['speedup_prefill']:.2f} x",
            f"{result['ratios']['speedup_forward']:.2f} x",
            f"{result['ratios']['overhead']:.2%}",
            f"{result['ratios']['against_native']:.3f} x",
        ]
        for result in data["results"]
    ]
    header = [
        "method",
        "visual tokens",
        "prefill, times faster",
        "with the vision tower",
        "scores, selection and compaction, of the unpatched prefill",
        "prefill against the same model natively fed as many tokens",
    ]
    place = data["environment"]
    note = (
        f"Medians of {data['results'][0]['runs']} runs in turn, batch {data['batch']}, {place['dtype']}, "
        f"{data['attention']} attention, {place['threads']} threads, {place['device']}, torch "
        f"{place['versions']['torch']}, transformers {place['versions']['transformers']}, commit "
        f"`{(place['git'] or 'unknown')[:12]}`."
    )
    return f"{table(header, rows)}\n\n{note}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/prefill_cpu_real.json"))
    parser.add_argument("--page", type=Path, default=Path("README.md"))
    arguments = parser.parse_args()
    replace_section(arguments.page, "prefill", prefill(json.loads(arguments.results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
