"""Tables and the picture of nano's accuracy, made from the recorded results.

``python -m vlm_budget.eval.nano.report`` rewrites the generated part of ``docs/nano.md`` and
``docs/images/nano_accuracy.png`` from ``benchmarks/results/nano_accuracy.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_budget.budget import Budget
from vlm_budget.eval.markdown import replace_section, table

GROUPS = ("all", "retrieval", "place", "count", "existence", "hard")
_NAMES = {"keep_all": "newlines kept", "drop": "newlines dropped"}


def cell(value: dict[str, float]) -> str:
    """Mean and standard error."""
    return f"{value['mean']:.3f} ± {value['se']:.3f}"


def signed(value: dict[str, float]) -> str:
    """A paired difference, in bold where it exceeds three standard errors."""
    text = f"{value['mean']:+.3f} ± {value['se']:.3f}"
    return f"**{text}**" if abs(value["mean"]) > 3 * value["se"] else text


def checkpoint_tables(measured: dict[str, Any], prior: dict[str, float]) -> str:
    """All tables of one checkpoint."""
    parts = [f"### {measured['checkpoint']}\n"]
    full = measured["full"]
    rows = [["all tokens", *(cell(full[g]) for g in GROUPS)], ["prior", *(f"{prior[g]:.3f}" for g in GROUPS)]]
    parts.append(f"All {measured['visual_tokens']} visual tokens, and the accuracy of the most frequent answer:\n")
    parts.append(table(["", *GROUPS], rows) + "\n")
    for positions in ("packed", "original"):
        for newline in ("keep_all", "drop"):
            chosen = [r for r in before(measured) if (r["newline"], r["positions"]) == (newline, positions)]
            parts.append(f"{_NAMES[newline].capitalize()} (inside the budget), {positions} positions:\n")
            parts.append(_accuracy_table(chosen) + "\n")
            parts.append("Minus random, paired per question:\n")
            parts.append(_difference_table(chosen) + "\n")
    parts.append(losers(measured))
    if "full_inside" in measured:
        parts.append(inside_tables(measured))
    return "\n".join(parts)


def before(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of methods that act before the language model, with the tokens they keep."""
    total = measured["visual_tokens"]
    rows = [row for row in measured["rows"] if row.get("place", "before") == "before"]
    return [{**row, "tokens": Budget(row["budget"]).tokens(total)} for row in rows]


def losers(measured: dict[str, Any]) -> str:
    """Which methods lose to random over all questions, by more than three standard errors, and where."""
    lost: dict[str, list[str]] = {}
    for row in before(measured):
        difference = row["minus_random"]["all"]
        if difference["mean"] < -3 * difference["se"]:
            policy = f"{row['budget']:.0%} {_NAMES[row['newline']].split()[1]}/{row['positions']}"
            lost.setdefault(row["method"], []).append(f"{policy} ({difference['mean']:+.3f})")
    lines = [f"* `{method}`: {', '.join(places)}" for method, places in sorted(lost.items())]
    head = "Losing to random over all questions by more than three standard errors (budget, newlines/positions):\n"
    return head + "\n" + "\n".join(lines or ["* none"]) + "\n"


def inside_tables(measured: dict[str, Any]) -> str:
    """Rows of methods inside the language model, alone and behind one before it."""
    rows = [row for row in measured["rows"] if row.get("place", "before") != "before"]
    pages = rows[0]["pages"]
    parts = [
        f"Inside the language model, on the first {pages} pages, at the same mean of visual tokens per layer (all "
        f"tokens: {cell(measured['full_inside']['all'])}); newlines kept and original positions before it:\n",
        table(["budget", "method", *GROUPS], [_inside_row(row, "accuracy", cell) for row in _by_budget(rows)]) + "\n",
        "Minus random dropping before the language model at the same mean, paired per question:\n",
        table(["budget", "method", *GROUPS], [_inside_row(row, "minus_random", signed) for row in _by_budget(rows)])
        + "\n",
        "A dash: with four layers this method cannot get down to the budget.\n",
    ]
    if any(row.get("configured") == "GSearch()" for row in rows):
        parts.append(
            "`gsearch` stands here with its default schedule, which nobody searched: the curve of `psigmoid`, whose "
            "row it therefore repeats. What a search finds for a model is another schedule; see [search](search.md).\n"
        )
    return "\n".join(parts)


def _inside_row(row: dict[str, Any], what: str, write: Callable[[dict[str, float]], str]) -> list[str]:
    cells = ["–"] * len(GROUPS) if "infeasible" in row else [write(row[what][group]) for group in GROUPS]
    return [f"{row['budget']:.0%}", row["method"], *cells]


def _by_budget(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["budget"])


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (-row["budget"], row["method"]))


def _accuracy_table(rows: list[dict[str, Any]]) -> str:
    return table(
        ["budget", "tokens", "method", *GROUPS],
        [
            [f"{r['budget']:.0%}", str(r["tokens"]), r["method"], *(cell(r["accuracy"][g]) for g in GROUPS)]
            for r in _ordered(rows)
        ],
    )


def _difference_table(rows: list[dict[str, Any]]) -> str:
    return table(
        ["budget", "tokens", "method", *GROUPS],
        [
            [f"{r['budget']:.0%}", str(r["tokens"]), r["method"], *(signed(r["minus_random"][g]) for g in GROUPS)]
            for r in _ordered(rows)
            if r["method"] != "random"
        ],
    )


def seeds_table(data: dict[str, Any]) -> str:
    """HiRED minus random on retrieval and over all, for every training that was measured."""
    rows = []
    for measured in data["checkpoints"]:
        for r in _ordered(before(measured)):
            if r["method"] == "hired" and r["budget"] == 0.2:
                differences = [signed(r["minus_random"][g]) for g in ("all", "retrieval", "hard")]
                rows.append([measured["checkpoint"], _NAMES[r["newline"]], r["positions"], *differences])
    return table(["training", "newlines", "positions", "all", "retrieval", "hard"], rows)


def draw(data: dict[str, Any], path: Path) -> None:
    """Accuracy against budget, a row of panels per published checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [m for m in data["checkpoints"] if m["checkpoint"] in ("nano", "nano-robust")]
    figure, axes = pyplot.subplots(len(shown), len(GROUPS), figsize=(3 * len(GROUPS), 2.7 * len(shown)), sharey=True)
    for measured, line in zip(shown, axes, strict=True):
        for group, panel in zip(GROUPS, line, strict=True):
            _panel(panel, measured, group, data["prior"][group])
        line[0].set_ylabel(f"{measured['checkpoint']}\naccuracy")
    for panel, group in zip(axes[0], GROUPS, strict=True):
        panel.set_title(group)
    axes[0][-1].legend(fontsize=6, ncols=2, loc="lower right")
    figure.supxlabel("visual tokens kept, newlines kept inside the budget, original positions", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, measured: dict[str, Any], group: str, prior: float) -> None:
    chosen = [r for r in before(measured) if (r["newline"], r["positions"]) == ("keep_all", "original")]
    from matplotlib import pyplot

    panel.set_prop_cycle(color=[pyplot.get_cmap("tab20")(index) for index in range(20)])
    for method in sorted({r["method"] for r in chosen if " + " not in r["method"]}):
        points = [(1.0, measured["full"][group])]
        points += [(r["budget"], r["accuracy"][group]) for r in _ordered(chosen) if r["method"] == method]
        xs = [x for x, _ in points]
        panel.errorbar(xs, [p["mean"] for _, p in points], [p["se"] for _, p in points], marker="o", ms=3, label=method)
    panel.axhline(prior, color="grey", lw=0.8, ls=":")
    panel.set_xscale("log")
    panel.set_xticks([0.1, 0.2, 0.3, 0.5, 1.0], ["10%", "20%", "30%", "50%", "100%"], fontsize=7)
    panel.minorticks_off()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/nano_accuracy.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/nano.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/nano_accuracy.png"))
    arguments = parser.parse_args()
    data = json.loads(arguments.results.read_text(encoding="utf-8"))
    intro = (
        f"{data['questions']} questions on {data['images']} pages (seed {data['test_seed']}); mean ± standard error "
        f"clustered by page; random is the mean of {data['random_draws']} draws. Measured at commit "
        f"`{(data['checkpoints'][0]['environment']['git'] or 'unknown')[:12]}`.\n"
    )
    shown = [m for m in data["checkpoints"] if m["checkpoint"] in ("nano", "nano-robust")]
    seeds = "### HiRED minus random at 20 %, every training\n\n" + seeds_table(data)
    tables = [checkpoint_tables(measured, data["prior"]) for measured in shown]
    replace_section(arguments.page, "accuracy", "\n".join([intro, seeds + "\n", *tables]))
    draw(data, arguments.picture)


if __name__ == "__main__":
    main()
