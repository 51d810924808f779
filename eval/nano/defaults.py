"""The default methods of ``patch(model, budget=…)``, chosen from the recorded accuracy table.

``python -m vlm_budget.eval.nano.defaults`` rewrites ``vlm_budget/defaults.json``. The rule was fixed before the table
of all methods was
measured: of the methods that act before the language model, the one with the highest accuracy over all
questions, averaged over the recorded budgets and both published checkpoints, each method with the newline and position
policies that suit it best; M-RoPE has original positions only. For towers without a class token only methods that ask
for none are considered; for nano, which has one, nothing else can be measured, and the reason says so.

One thing was added after the table was seen: the best few differ by less than their errors, so of those within
``TIE`` of the best, methods that read neither the question nor the projector's inputs come first, since they work on
any prompt and cost least.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from vlm_budget.defaults import key
from vlm_budget.pruner import Tower
from vlm_budget.registry import PRUNERS

NANO_TOWER = Tower(layers=5, feature_layer=3, has_cls=True)
PUBLISHED = ("nano", "nano-robust")
TIE = 0.01


def asks_for_cls(name: str) -> bool:
    """The method, as measured on nano, ranks by the class token."""
    return any(need.kind in ("cls", "joint_cls") for need in PRUNERS.get(name)().all_needs(NANO_TOWER))


Setting = tuple[str, str, str]


def averages(data: dict[str, Any]) -> dict[Setting, float]:
    """Method, newlines, positions to accuracy over all questions, averaged over budgets and published checkpoints."""
    found: dict[Setting, list[float]] = {}
    for measured in data["checkpoints"]:
        if measured["checkpoint"] in PUBLISHED:
            for row in measured["rows"]:
                if row.get("place", "before") == "before" and row["method"] in PRUNERS:
                    setting = (row["method"], row["newline"], row["positions"])
                    found.setdefault(setting, []).append(row["accuracy"]["all"]["mean"])
    return {name: mean(values) for name, values in found.items()}


def choose(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All choices, as ``defaults.json`` holds them."""
    return {key(cls, mrope): _choice(data, cls, mrope) for cls in (True, False) for mrope in (False, True)}


def _choice(data: dict[str, Any], has_cls: bool, mrope: bool) -> dict[str, Any]:
    known = {setting: value for setting, value in averages(data).items() if not mrope or setting[2] == "original"}
    able = {setting: value for setting, value in known.items() if has_cls or not asks_for_cls(setting[0])}
    top = max(able.values())
    close = {setting: value for setting, value in able.items() if value >= top - TIE}
    simple = {setting: value for setting, value in close.items() if _is_simple(setting[0])}
    (method, newline, positions), best = max((simple or close).items(), key=lambda pair: (pair[1], pair[0]))
    random = max(value for setting, value in known.items() if setting[0] == "random")
    among = "of all methods" if has_cls else "of the methods that need no class token"
    figures = f"{best:.3f} of the questions right on average, random {random:.3f}"
    reason = (
        f"best {among}, or within {TIE} of it and simpler, on the embedded nano checkpoints (LLaVA-NeXT, "
        f"{_budgets(data)} of the tokens): {figures}. Nothing larger has been measured yet"
    )
    usual = PRUNERS.get(method)()
    options = {
        name: value
        for name, value in (("newline", newline), ("positions", positions))
        if value != getattr(usual, name) and not (mrope and name == "positions")
    }
    return {"method": method, "options": options, "reason": reason}


def _is_simple(name: str) -> bool:
    method = PRUNERS.get(name)()
    return not (method.reads_text or method.wants_hidden)


def _budgets(data: dict[str, Any]) -> str:
    shares: Iterable[float] = sorted(
        {row["budget"] for m in data["checkpoints"] for row in m["rows"] if row.get("place", "before") == "before"}
    )
    return ", ".join(f"{share:.0%}" for share in shares)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/nano_accuracy.json"))
    parser.add_argument("--out", type=Path, default=Path("vlm_budget/defaults.json"))
    arguments = parser.parse_args()
    chosen = choose(json.loads(arguments.results.read_text(encoding="utf-8")))
    arguments.out.write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
