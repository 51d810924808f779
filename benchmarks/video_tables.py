"""Writes the figures of sparse video attention on a GPU into the page that shows them.

``make gpu SUITE=video`` records them. What has not been measured, all of it without a record, says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_budget.eval.markdown import replace_section, table
from vlm_budget.eval.video_models import LATENTS
from vlm_budget.eval.video_ops import LENGTHS, VIDEO_CASES
from vlm_budget.eval.video_passes import CALLS, EMPTY, SHIPPED
from vlm_budget.eval.video_shapes import SHAPES

NOT_YET = "not measured yet"
NAMES = [shape.name for shape in SHAPES["real"]]


def page(data: dict[str, Any] | None) -> str:
    """All tables."""
    data = {**EMPTY, "operations": [], "machine": None, **(data or {})}
    parts = [place(data), goals(data)]
    for title, rows in (
        ("Dense attention, every back end of torch", dense(data)),
        ("The kernel alone, a quarter of the video's pairs kept", kernel(data)),
        ("Whole calls of SVG2 at a density of 0.25, per step of a run of 50", calls(data)),
        ("Where a call's time goes, per step, as shipped", spent(data)),
        ("Length from which sparse attention is faster, 24 heads of 128", break_even(data)),
        ("One step of whole transformers with random weights", models(data)),
        ("Ways to launch the kernel, the fastest first", configurations(data)),
        ("Operations", operations(data)),
    ):
        parts.append(f"{title}:\n\n{rows}" if rows else f"{title}: {NOT_YET}.")
    return "\n\n".join(parts)


def place(data: dict[str, Any]) -> str:
    """Where it was measured."""
    if data["machine"] is None:
        return f"Machine: {NOT_YET}."
    where, machine = data["environment"], data["machine"]
    versions = ", ".join(f"{name} {where['versions'].get(name)}" for name in ("torch", "triton"))
    return (
        f"{where['device']}, driver {where.get('driver')}, {versions}, {where['dtype']}, commit "
        f"`{(where['git'] or 'unknown')[:12]}`; a matrix product runs at "
        f"{machine['matrix']['flops_per_second'] / 1e12:.0f} TFLOP/s. Times are medians; quartiles are in the record."
    )


def goals(data: dict[str, Any]) -> str:
    """What was promised beside what was measured."""

    def worst(rows: list[dict[str, Any]], name: str, pick: Any, form: str) -> list[str]:
        found = [[row[name] for row in rows if row["shape"] == shape and row[name] is not None] for shape in NAMES]
        return [form.format(pick(values)) if values else NOT_YET for values in found]

    shipped = [row for row in data["calls"] if row["what"] == SHIPPED]
    own = [row for row in data["kernel"] if row["backend"] == "auto"]
    megabytes = [{**row, "mb": (row["workspace_bytes"] or 0) / 2**20} for row in own]
    rows = [
        ["a call at a quarter of the pairs, times faster than the fastest dense back end", "at least 1.8 x, goal 2.2 x"]
        + worst(shipped, "speedup", min, "{:.2f} x"),
        ["kernel alone, of its share of pairs in the dense time, the worst map and blocks", "at least 75%"]
        + worst(own, "share_of_ideal", min, "{:.0%}"),
        ["overhead of a call, of the dense time", "at most 5%"] + worst(shipped, "overhead_of_dense", max, "{:.1%}"),
        ["memory of the kernel beside inputs and outputs", "at most 64 MiB"]
        + worst(megabytes, "mb", max, "{:.0f} MiB"),
    ]
    return table(["goal", "", *NAMES], rows, left=2)


def dense(data: dict[str, Any]) -> str:
    """One row per shape and back end."""
    rows = []
    for row in data["dense"]:
        name = f"{row['backend']}{' with a mask' if row['masked'] else ''}"
        cells = ["cannot run", ""] if row["ms"] is None else [ms(row["ms"]["median"]), rate(row["flops_per_second"])]
        rows.append([row["shape"], name, *cells])
    return shown(["shape", "back end", "ms", "TFLOP/s"], rows, left=2)


def kernel(data: dict[str, Any]) -> str:
    """One row per shape, map and kind of blocks."""
    rows = [
        [
            row["shape"],
            row["map"],
            f"of {row['tile']}" if row["tile"] else "uneven",
            "counted by means" if row["corrected"] else "dropped",
            "ours" if row["backend"] == "auto" else row["backend"],
            f"{row['pairs']:.1%}",
            ms(row["ms"]["median"]),
            rate(row["flops_per_second"]),
            f"{row['share_of_ideal']:.0%}",
        ]
        for row in data["kernel"]
    ]
    header = ["shape", "map", "blocks", "other pairs", "kernel", "pairs computed", "ms", "TFLOP/s", "of the ideal"]
    return shown(header, rows, left=5)


def calls(data: dict[str, Any]) -> str:
    """One row per shape and options."""
    known = {(row["shape"], row["what"]): row for row in data["calls"]}
    rows = [
        [
            shape,
            what,
            f"{row['pairs']:.1%}",
            ms(row["first_ms"]),
            ms(row["ms"]),
            ms(row["dense_ms"]),
            f"{row['speedup']:.2f} x",
            f"{row['overhead_of_dense']:.1%}",
            f"{row['output_error']:.3f}",
        ]
        for shape in NAMES
        for what in CALLS
        if (row := known.get((shape, what)))
    ]
    header = ["shape", "options", "pairs computed", "first step, ms", "ms", "dense, ms", "times faster"]
    return shown([*header, "overhead, of dense", "error on planted inputs"], rows, left=2)


def spent(data: dict[str, Any]) -> str:
    """One row per operation, beside its share of the dense time."""
    shipped = {row["shape"]: row for row in data["calls"] if row["what"] == SHIPPED}
    names = sorted({name for row in shipped.values() for name in row["parts_ms"]})

    def cells(times: dict[str, float | None]) -> list[str]:
        return [
            NOT_YET
            if times.get(shape) is None
            else f"{ms(times[shape])} ({times[shape] / shipped[shape]['dense_ms']:.1%})"
            for shape in NAMES
        ]

    rows = [
        [f"`{name}`" if name != "other" else "all else"]
        + cells({shape: row["parts_ms"].get(name, 0.0) for shape, row in shipped.items()})
        for name in names
    ]
    listed = cells({shape: row["tile_list_ms"] for shape, row in shipped.items()})
    rows += [["lists of tiles (in the attention)", *listed]] * bool(rows)
    return shown(["ms, and of the dense time", *NAMES], rows)


def break_even(data: dict[str, Any]) -> str:
    """One row per length, and the verdict."""
    found = data["break_even"]
    if found is None:
        return ""
    rows = [
        [
            f"{row['tokens']:,}",
            ms(row["dense_ms"]),
            row["backend"].lower(),
            ms(row["sparse_ms"]),
            f"{row['speedup']:.2f} x",
        ]
        for row in found["timings"]
    ]
    verdict = "beyond the longest" if found["tokens"] is None else f"{found['tokens']:,} tokens"
    header = ["tokens", "dense, ms", "back end", "sparse, ms", "times faster"]
    return f"{table(header, rows)}\n\nBreak-even: {verdict}."


def models(data: dict[str, Any]) -> str:
    """One row per model and video."""
    known = {(row["family"], row["video"], row["way"]): row for row in data["models"]}
    rows = []
    for family, video in [(family, video) for family, videos in LATENTS.items() for video in videos]:
        plain, sparse = (known.get((family, video, way)) for way in ("dense", "svg2"))
        if plain is None and sparse is None:
            continue
        both = plain["mean_ms"] / sparse["mean_ms"] if plain and sparse else None
        steps = [f"{row['mean_ms'] / 1000:.2f}" if row else NOT_YET for row in (plain, sparse)]
        peaks = [f"{row['peak_bytes'] / 1e9:.0f}" if row and row["peak_bytes"] else NOT_YET for row in (plain, sparse)]
        rows.append([family, video, *steps, f"{both:.2f} x" if both else NOT_YET, " / ".join(peaks)])
    header = ["model", "video", "dense, s", "svg2 at 0.25, s", "times faster", "peak memory, GB, dense / svg2"]
    return shown(header, rows, left=2)


def configurations(data: dict[str, Any]) -> str:
    """One row per way to launch the kernel."""
    timed = sorted((row for row in data["configurations"] if row["ms"]), key=lambda row: row["ms"]["median"])
    rows = [
        [
            row["shape"],
            f"{row['rows']} x {row['keys']}",
            "descriptors" if row["tma"] else "pointers",
            str(row["warps"]),
            str(row["stages"]),
            ms(row["ms"]["median"]),
        ]
        for row in timed
    ]
    return shown(["shape", "tile", "keys by", "warps", "stages", "ms"], rows, left=3)


def operations(data: dict[str, Any]) -> str:
    """One row per operation and number of tokens."""
    known = {(row["op"], row["what"], row["tokens"]): row for row in data["operations"]}
    rows = []
    for case in VIDEO_CASES:
        for tokens in LENGTHS:
            if row := known.get((case.op, case.what, tokens)):
                share = row[f"share_of_{'matrix' if case.bound == 'matrix' else 'copy'}_rate"]
                limit = "bound by neither" if case.bound == "latency" else f"{share:.0%} of the {case.bound} rate"
                cells = [ms(row["ms"]["cold"]["median"]), ms(row["ms"]["reference"]["median"]), limit]
                rows.append([f"`{case.op}`", case.what, f"{tokens:,}", *cells])
    return shown(["operation", "on", "tokens", "ms", "reference, ms", "of the ceiling"], rows, left=2)


def shown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table; nothing without rows."""
    return table(header, rows, left) if rows else ""


def ms(value: float) -> str:
    """Milliseconds, three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(value: float) -> str:
    """TFLOP/s."""
    return f"{value / 1e12:.0f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/gpu_video.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/kernels.md"))
    arguments = parser.parse_args()
    data = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else None
    replace_section(arguments.page, "gpu-video", page(data))


if __name__ == "__main__":
    main()
