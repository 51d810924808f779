"""The tables of ``docs/video_generation.md``, and the picture beside them, made from the record.

``python -m vlm_budget.eval.video_gen.report``; needs neither the model nor diffusers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_budget.eval.markdown import replace_section, table

from .settings import OPTIONS, RECORD

_PAGE = Path("docs/video_generation.md")
_PICTURE = Path("docs/images/video_gen_quality.svg")
_GOAL_DB, _GOAL_DENSITY = 30.0, 0.3
_DRAWN = (
    "svg2, corrected",
    "svg2",
    "svg2, top-p, corrected",
    "oracle, corrected",
    "oracle",
    "block_topk, corrected",
    "block_topk",
    "random blocks",
    "svg1",
    "radial",
    "sliding_tile",
)


def scales_section(data: dict[str, Any]) -> str:
    """What was run, and how large PSNR is for other changes."""
    needed = data["keys_needed"]
    clips = len(data["prompts"])
    intro = (
        f"{clips} clips of held-out words and noise, {data['steps']} steps, {data['tokens']:,} tokens, no guidance; "
        "each is compared with the dense clip of the same noise. A row of attention needs "
        f"{needed['0.9']:.1%} of the keys for 0.9 of its mass ({needed['0.95']:.1%} for 0.95), mean over rows, heads, "
        "layers and noise levels. What other changes of the dense run do to the same clips:"
    )
    lines = [
        [name, *_spread(found["psnr"]), _number(found["ssim"]["mean"], 3)] for name, found in data["scales"].items()
    ]
    return intro + "\n\n" + table(["", "PSNR, dB", "sd", "least", "SSIM"], lines)


def curves_section(data: dict[str, Any]) -> str:
    """A row for every setting of every mask."""
    options = {f"svg2, corrected, {name}" for name in OPTIONS}
    rows = [row for row in data["rows"] if row["curve"] not in options]
    head = ["mask", "asked for", "density", "PSNR, dB", "sd", "least", "SSIM", "error of a call", "recall"]
    order = list(dict.fromkeys([*_DRAWN, *(row["curve"] for row in rows)]))
    rows = sorted(rows, key=lambda row: (order.index(row["curve"]), row["density"]))
    parts = [table(head, [_line(row) for row in rows], left=1), _verdict(data)]
    if len(data["rows"]) < data["settings"]:
        parts.append(f"{data['settings'] - len(data['rows'])} of {data['settings']} settings are not measured yet.")
    return "\n\n".join(parts)


def _line(row: dict[str, Any]) -> list[str]:
    asked = f"{row['nominal']:.0%}" if row["nominal"] is not None else f"top-p {row['options']['top_p']:g}"
    error = "" if row["error"] is None else f"{row['error']:.3f}"
    recall = "" if row["recall"] is None else f"{row['recall']:.3f}"
    psnr = _spread(row["psnr"])
    return [row["curve"], asked, f"{row['density']:.1%}", *psnr, _number(row["ssim"]["mean"], 3), error, recall]


def _verdict(data: dict[str, Any]) -> str:
    """Which settings reach the goal."""
    sparse = [row for row in data["rows"] if row["method"] != "oracle"]
    reached = [row for row in sparse if row["density"] <= _GOAL_DENSITY and (row["psnr"]["mean"] or 0) >= _GOAL_DB]
    if not reached:
        return f"No setting reaches {_GOAL_DB:g} dB at a density of {_GOAL_DENSITY:.0%} or less."
    best = sorted(reached, key=lambda row: row["density"])
    told = "; ".join(
        f"{row['curve']} at {row['density']:.1%}: {row['psnr']['mean']:.1f} dB (least {row['psnr']['min']:.1f})"
        for row in best[:6]
    )
    return (
        f"{_GOAL_DB:g} dB and more at a density of {_GOAL_DENSITY:.0%} or less, mean over the clips, the oracle left "
        f"aside: {told}{f', and {len(best) - 6} more' if len(best) > 6 else ''}."
    )


def pairs_section(data: dict[str, Any]) -> str:
    """Differences clip by clip, and whether they are larger than their spread."""
    head = ["this", "minus this", "at", "dB", "sd", "least", "greatest", "clips above 0", "larger than its spread"]
    lines = []
    order = list(dict.fromkeys((pair["curve"], pair["minus"]) for pair in data["pairs"]))
    place = {names: turn for turn, names in enumerate(order)}
    for pair in sorted(data["pairs"], key=lambda one: (place[one["curve"], one["minus"]], one["nominal"])):
        psnr = pair["psnr"]
        if psnr["mean"] is None:
            continue
        clear = psnr["sd"] is not None and abs(psnr["mean"]) > psnr["sd"]
        figures = [f"{psnr['mean']:+.2f}", _number(psnr["sd"]), f"{psnr['min']:+.2f}", f"{psnr['max']:+.2f}"]
        above = f"{psnr['above']} of {len([value for value in psnr['clips'] if value is not None])}"
        lines.append(
            [pair["curve"], pair["minus"], f"{pair['nominal']:.0%}", *figures, above, "yes" if clear else "no"]
        )
    note = (
        "Differences of PSNR, clip by clip, at one promised density. The spread is the standard deviation of the "
        "differences over the clips. One model of one training; k-means of another seed is a row of its own."
    )
    return note + "\n\n" + table(head, lines, left=2)


def picture(data: dict[str, Any], path: Path) -> None:
    """PSNR over density, a line per mask with the standard deviation over the clips."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vlm-budget"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.2))
    for place, curve in enumerate(_DRAWN):
        rows = sorted((row for row in data["rows"] if row["curve"] == curve), key=lambda row: row["density"])
        if not rows:
            continue
        values = [row["psnr"]["mean"] for row in rows]
        spread = [row["psnr"]["sd"] or 0 for row in rows]
        style = "--" if curve.startswith("oracle") else ":" if curve == "random blocks" else "-"
        axes.errorbar(
            [row["density"] * 100 for row in rows],
            values,
            yerr=spread,
            label=curve,
            linestyle=style,
            color=pyplot.cm.tab20(place % 20),
            marker="o",
            markersize=3,
            linewidth=1.5,
            elinewidth=0.6,
            capsize=2,
        )
    half = data["scales"]["half of the steps"]["psnr"]["mean"]
    axes.axhline(half, color="grey", linewidth=0.8, linestyle=(0, (1, 3)))
    axes.text(axes.get_xlim()[1], half, "half of the steps ", ha="right", va="bottom", fontsize=8, color="grey")
    axes.axhline(_GOAL_DB, color="grey", linewidth=0.6)
    axes.set_xlabel("density of the run, % of all pairs (corrections counted)")
    axes.set_ylabel("PSNR against the dense clip, dB")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _spread(found: dict[str, Any]) -> list[str]:
    return [_number(found["mean"]), _number(found["sd"]), _number(found["min"])]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


SECTIONS = {"scales": scales_section, "curves": curves_section, "pairs": pairs_section}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/video_generation.md from the record.")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--page", type=Path, default=_PAGE)
    parser.add_argument("--picture", type=Path, default=_PICTURE)
    arguments = parser.parse_args(argv)
    data = json.loads(arguments.record.read_text(encoding="utf-8"))
    for name, section in SECTIONS.items():
        replace_section(arguments.page, name, section(data))
    try:
        picture(data, arguments.picture)
    except ImportError:  # matplotlib comes with the extra "eval"; the tables stand without it
        print("the picture was left as it is: matplotlib is not installed")


if __name__ == "__main__":
    main()
