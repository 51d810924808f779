"""The tables of ``docs/views.md``, made from the recorded results: ``python -m vlm_budget.eval.views.report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_budget.eval.markdown import replace_section, table
from vlm_budget.eval.nano.report import cell, signed
from vlm_budget.eval.views import clips, rooms

_RESULTS = Path("benchmarks/results")
_OURS = "segpruner, scene"
_RIVALS = ("saliency only, scene", "diversity only, scene", "vispruner", "random")
_CONTROLS = ("same frames, fewer tokens each", "more frames, fewer tokens each", "half of the frames")
_CLEAR = 3


def rooms_section(data: dict[str, Any]) -> str:
    """Rooms: a table per budget and position ids, and what they say of the claims."""
    groups = ("all", *rooms.TASKS)
    full = data["full"]
    head = ["", *groups, "minus all tokens", f"{_OURS} minus this"]
    parts = [
        f"{data['rooms']} held-out rooms of {rooms.QUESTIONS_PER_ROOM} questions, {data['visual_tokens']} visual "
        f"tokens each. Always giving a form's most frequent answer is right {data['prior']['all']:.0%} of the time.",
    ]
    for budget, positions in dict.fromkeys((row["budget"], row["positions"]) for row in data["rows"]):
        own = [row for row in data["rows"] if (row["budget"], row["positions"]) == (budget, positions)]
        lines = [["all tokens", *(cell(full[group]) for group in groups), "", ""]]
        for row in own:
            figures = [cell(row["accuracy"][group]) for group in groups]
            ahead = "" if row["method"] == _OURS else signed(row["segpruner_minus"]["all"])
            lines.append([row["method"], *figures, signed(row["minus_full"]["all"]), ahead])
        parts += [f"{budget:.0%} of the tokens, {positions} positions:", table(head, lines), _verdict(own, full)]
    return "\n\n".join(parts)


def _verdict(rows: list[dict[str, Any]], full: dict[str, Any]) -> str:
    """What shows of SeGPruner's claims, and what does not."""
    ours = next(row for row in rows if row["method"] == _OURS)
    kept = ours["accuracy"]["all"]["mean"] / full["all"]["mean"]
    told = [f"SeGPruner keeps {kept:.1%} of the accuracy of all tokens."]
    for name in _RIVALS:
        ahead = next(row for row in rows if row["method"] == name)["segpruner_minus"]["all"]
        if ahead["mean"] > _CLEAR * ahead["se"]:
            word = "ahead of"
        elif ahead["mean"] < -_CLEAR * ahead["se"]:
            word = "behind"
        else:
            word = "not clearly different from"
        told.append(f"It is {word} {name} ({ahead['mean']:+.3f} ± {ahead['se']:.3f}).")
    return " ".join(told)


def haystack_section(data: dict[str, Any]) -> str:
    """Clips: every row with its tokens, frames and times."""
    groups = ("all", *clips.TASKS)
    full = data["full"]
    head = ["", "frames", "tokens", *groups, "minus all tokens", "model, relative", "scorer, relative"]
    base = full["model_ms"]
    lines = [
        ["all tokens", str(data["frames"]), str(data["tokens"]), *(cell(full[g]) for g in groups), "", "1.00", "0.00"]
    ]
    for row in data["rows"]:
        figures = [cell(row["accuracy"][group]) for group in groups]
        times = [f"{row[name] / base:.2f}" for name in ("model_ms", "scorer_ms")]
        counts = [str(row["frames"]), str(row["tokens"])]
        lines.append([row["method"], *counts, *figures, signed(row["minus_full"]["all"]), *times])
    parts = [
        f"{data['clips']} held-out clips of {clips.QUESTIONS_PER_CLIP} questions. Times are wall clock per question "
        "in units of the unpatched model with all tokens, vision tower included, in one run on one CPU thread; with "
        "models of this size the scorer and the tower are what takes time, so they say nothing of large ones.",
        table(head, lines, left=1),
        _haystack_verdict(data),
    ]
    return "\n\n".join(parts)


def _haystack_verdict(data: dict[str, Any]) -> str:
    told = []
    for tokens in dict.fromkeys(row["tokens"] for row in data["rows"] if row["method"] == "quota, entities"):
        own = [row for row in data["rows"] if abs(row["tokens"] - tokens) <= 1]
        best = {row["frames"]: row["accuracy"]["all"] for row in own if row["method"] == "quota, entities"}
        rivals = [row for row in own if row["method"] in _CONTROLS]
        ours = max(best.values(), key=lambda value: value["mean"])
        full = data["full"]["all"]["mean"]
        line = f"At {tokens} tokens QuoTA reaches {ours['mean']:.3f} (all {data['tokens']}: {full:.3f})"
        if rivals:
            rival = max(rivals, key=lambda row: row["accuracy"]["all"]["mean"])
            line += f", the best control without a scorer {rival['accuracy']['all']['mean']:.3f} ({rival['method']})"
        told.append(line + ".")
    return " ".join(told)


def search_section(data: dict[str, Any]) -> str:
    """T* beside frames spread evenly."""
    lines = [
        [name, *(f"{data[key][measure]:.3f}" for measure in ("precision", "recall", "f1"))]
        for name, key in ((f"T*, looking at {data['visited_share']:.0%} of the frames", "tstar"), ("evenly", "uniform"))
    ]
    intro = (
        f"{data['questions']} questions about held-out clips of {clips.FRAMES} s, {data['kept']} frames kept, within "
        "5 s of the middle of an event that the question is about:"
    )
    return intro + "\n\n" + table(["", "precision", "recall", "F1"], lines)


SECTIONS = {"rooms": rooms_section, "haystack": haystack_section, "search": search_section}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/views.md from recorded results.")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--page", type=Path, default=Path("docs/views.md"))
    arguments = parser.parse_args(argv)
    for name, section in SECTIONS.items():
        data = json.loads((arguments.results / f"views_{name}.json").read_text(encoding="utf-8"))
        replace_section(arguments.page, name, section(data))


if __name__ == "__main__":
    main()
