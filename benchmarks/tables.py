"""Writes the figures of recorded benchmarks into the pages that show them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vlm_budget.budget import in_words
from vlm_budget.eval.device import MOST
from vlm_budget.eval.large import FAMILIES
from vlm_budget.eval.markdown import replace_section, table
from vlm_budget.eval.op_cases import CASES, LENGTHS
from vlm_budget.eval.passes import VARIANTS

NOT_YET = "not measured yet"


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


def vit(data: dict[str, Any]) -> str:
    """The tables of ``benchmarks/vit.py``."""
    found, place = data["accuracy"], data["environment"]
    accuracy = table(
        ["method", "ratio", "patch tokens", "operations", "accuracy", "minus unpatched"],
        [
            ["all tokens", "1", str(found["rows"][0]["tokens"]), "100%", plus_minus(found["full"], "{:.3f}"), ""],
            *(
                [
                    row["method"],
                    f"{row['ratio']:g}",
                    str(row["kept_tokens"]),
                    f"{row['flops']:.0%}",
                    plus_minus(row["accuracy"], "{:.3f}"),
                    plus_minus(row["minus_full"], "{:+.3f}"),
                ]
                for row in found["rows"]
            ),
        ],
    )
    shipped, small = data["speed"]["shipped"], data["speed"]["small"]
    speed = table(
        ["method", "ratio", "shipped model: operations", "times faster", "ViT-S/16 size: operations", "times faster"],
        [
            [a["method"], f"{a['ratio']:g}", f"{a['flops']:.0%}", faster(a), f"{b['flops']:.0%}", faster(b)]
            for a, b in zip(shipped["rows"], small["rows"], strict=True)
        ],
    )
    accuracy_note = (
        f"Accuracy of the shipped model on {found['pages']} test pages (seed {found['test_seed']}), ± one standard "
        f"error; the difference is paired per page. Chance is {found['chance']:.3f}, one of the page's digits "
        f"at random {found['a_digit_of_the_page']:.3f}. Operations are measured, matching and mixing included."
    )
    speed_note = (
        "Speed against the unpatched model in the same round, median (least to most) of "
        f"{shipped['rounds']} rounds: the shipped model with a batch of {shipped['batch']}, and a model of ViT-S/16's "
        f"proportions at 224 pixels with random weights and a batch of {small['batch']}."
    )
    where = (
        f"{place['dtype']}, {place['threads']} thread(s), {place['device']}, torch "
        f"{place['versions']['torch']}, commit `{(place['git'] or 'unknown')[:12]}`."
    )
    return "\n\n".join([accuracy_note, accuracy, speed_note, speed, where])


def plus_minus(value: dict[str, float], form: str) -> str:
    """Mean and standard error."""
    return f"{form.format(value['mean'])} ± {value['se']:.3f}"


def faster(row: dict[str, Any]) -> str:
    """Median speed with its spread."""
    times = row["times_faster"]
    return f"{times['median']:.2f} x ({times['min']:.2f} to {times['max']:.2f})"


def greedy(data: dict[str, Any]) -> str:
    """The table of ``benchmarks/greedy.py``."""
    rows = [
        [
            result["selection"],
            form,
            f"{result['ms']['ours']['median']:.1f} ms",
            f"{result['ms'][form]['median']:.0f} ms",
            f"{times:.0f} x",
        ]
        for result in data["results"]
        for form, times in result["speedup"].items()
    ]
    header = ["selection", "naive form", "ours", "naive", "naive over ours"]
    place = data["environment"]
    note = (
        f"{data['keep']} of {data['tokens']} tokens; the similarities that all start from took "
        f"{data['similarity_ms']['median']:.0f} ms more. Medians of {data['results'][0]['runs']} runs in turn, "
        f"{place['dtype']}, threads: {place['threads']}, {place['device']}, torch "
        f"{place['versions']['torch']}, commit `{(place['git'] or 'unknown')[:12]}`. What the naive forms do is "
        "said in `benchmarks/greedy.py`, which times nothing before all choose the same tokens in the same order."
    )
    return f"{table(header, rows, left=2)}\n\n{note}"


def budgets(data: dict[str, Any]) -> str:
    """The table of ``benchmarks/budgets.py``."""
    rows = [
        [
            row["method"],
            row["budget"],
            f"{row['mean_tokens_per_layer']:.0f} of {row['visual_tokens']}",
            in_words(row["promised"], row["unit"]),
            in_words(row["achieved"], row["unit"]),
            f"{row['achieved_of_promised']:.3f}",
            f"{row['of_unpatched_share']:.3f}" if "of_unpatched_share" in row else "",
        ]
        for row in data["results"]
    ]
    header = [
        "method",
        "budget",
        "visual tokens per layer",
        "promised",
        "achieved",
        "achieved over promised",
        "over the share of the unpatched time",
    ]
    place, timed = data["environment"], [row for row in data["results"] if row["unit"] == "ms"]
    note = (
        f"A prompt of {data['prompt_tokens']} tokens. Milliseconds are medians of {timed[0]['runs']} runs in turn with "
        "the unpatched model, promised from a calibration right before (worst error of its fit "
        f"{data['calibration']['worst']:.1%}); FLOPs are counted by torch, bytes read off the cache. {place['dtype']}, "
        f"{data['attention']} attention, threads: {place['threads']}, {place['device']}, torch "
        f"{place['versions']['torch']}, transformers {place['versions']['transformers']}, commit "
        f"`{(place['git'] or 'unknown')[:12]}`."
    )
    return f"{table(header, rows, left=2)}\n\n{note}"


def evaluation(data: dict[str, Any]) -> str:
    """The sentences on ``benchmarks/evaluation.py``."""
    sweep, one, two = data["sweep"], data["pairs"]["1"], data["pairs"]["2"]
    place, ratios = data["environment"], data["second_process"]["ratios"]
    share = sweep["answered"] / sweep["answers"]
    spread = f"median of {len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}"
    starts = f"{one[0]['seconds']:.0f} s and {two[0]['seconds']:.0f} s with the start"
    return (
        f"On nano, {place['device']}, two processes of one thread each, commit `{(place['git'] or 'unknown')[:12]}`: "
        f"every registered method at budgets {data['budgets'].replace(',', ', ')} on all four tasks with "
        f"{data['samples_per_task']} samples each ({sweep['cells']} columns, {sweep['answers']:,} answers, of them "
        f"{share:.0%} within reach of their budget on a model of four layers) took {sweep['seconds'] / 60:.1f} "
        f"minutes. A smaller run answered {data['second_process']['median']:.2f} times as many samples per second on "
        f"two processes as on one ({spread}; {one[0]['answers']:,} answers, {starts}), with "
        f"{'the same' if data['equal_answers'] else 'OTHER'} answers. `python benchmarks/evaluation.py` measures this."
    )


def tstar(data: dict[str, Any]) -> str:
    """The tables of ``benchmarks/tstar.py``."""

    def row_of(cell: dict[str, Any], method: str, budget: float) -> dict[str, Any]:
        return next(row for row in cell["rows"] if (row["method"], row["budget"]) == (method, budget))

    def pair(cell: dict[str, Any], method: str, budget: float) -> str:
        row = row_of(cell, method, budget)
        return f"{row['recall']:.0%} / {row['shown']:.0%}"

    ways = ("search", "percentile sampler", "equal distances")
    needles = table(
        ["needles", *(f"95% recall: {way}" for way in ways), "visited by default", *ways, "all frames"],
        [
            [
                str(cell["needles"]),
                *("not reached" if share is None else f"{share:.1%}" for share in least.values()),
                f"{row_of(cell, 'search', 0.15)['visited']:.1%}",
                *(pair(cell, way, 0.15) for way in ways),
                pair(cell, "equal distances", 1.0),
            ]
            for cell in data["needles"]
            for least in [cell["visited_for_95_percent_recall"]]
        ],
    )
    budgets = (0.05, 0.1, 0.15)
    widths = table(
        ["shoulder", *(f"{way}, {budget:.0%}" for budget in budgets for way in (ways[0], ways[2])), "all frames"],
        [
            [
                f"{cell['shoulder_s']:g} s" if cell["shoulder_s"] else "single frames",
                *(pair(cell, way, budget) for budget in budgets for way in (ways[0], ways[2])),
                pair(cell, "equal distances", 1.0),
            ]
            for cell in data["shoulders"]
        ],
    )
    note = (
        f"{data['needles'][0]['curves']} curves a row, {data['frames']:,} frames each, {data['keep']} kept. Found / "
        f"shown at a budget of 15%, or as said; commit `{(data['environment']['git'] or 'unknown')[:12]}`."
    )
    return f"{needles}\n\n{widths}\n\n{note}"


def gpu(data: dict[str, Any] | None) -> str:
    """The tables of ``benchmarks/gpu.py``; what has not been measured, all of it without a record, says so."""
    data = data or {"operations": [], "models": [], "machine": None}
    ways = {
        (row["family"], row["tiles"], row["batch"], each["method"], each["budget"]): each
        for row in data["models"]
        for each in row["variants"]
    }
    header = ["run", "vision tower", "selection", "prefill", "first token", "times faster", "per decoded token"]
    header += ["tokens per second", "peak memory"]
    parts = [gpu_place(data), "What the kernels are for, the worst of what was measured:"]
    parts += [table(["goal", "at most or least", "measured"], gpu_goals(data, ways)), "Operations:"]
    parts += [gpu_operations(data["operations"]), "Models, prompts of five tiles, milliseconds (selection also as a "]
    parts[-1] += "share of the unpatched prefill; prefill with selection also over the native one, and over the native "
    parts[-1] += "one with launches issued ahead):"
    for family in FAMILIES:
        for batch in (1, 8):
            rows = [(variant, ways.get((family, 5, batch, variant.method, variant.budget))) for variant in VARIANTS]
            measured = [[str(variant), *gpu_way(row)] for variant, row in rows if any(found for _, found in rows)]
            text = f"\n\n{table(header, measured)}" if measured else f" {NOT_YET}."
            parts.append(f"{family}, batch {batch}:{text}")
    return "\n\n".join(parts)


def gpu_place(data: dict[str, Any]) -> str:
    """Where it was measured, and the machine's ceilings."""
    if data["machine"] is None:
        return f"Machine, copy rate and matrix rate: {NOT_YET}."
    place, machine = data["environment"], data["machine"]
    versions = ", ".join(f"{name} {place['versions'].get(name)}" for name in ("torch", "triton", "transformers"))
    attention = ", ".join(sorted({shape["attention"] for shape in data["shapes"].values()})) or NOT_YET
    return (
        f"{place['device']}, driver {place.get('driver')}, {versions}, {place['dtype']}, attention: {attention}, "
        f"commit `{(place['git'] or 'unknown')[:12]}`. A copy moves "
        f"{machine['copy']['bytes_per_second'] / 1e12:.2f} TB/s (read and written), a matrix product "
        f"{machine['matrix']['flops_per_second'] / 1e12:.0f} TFLOP/s. Times are medians; quartiles are in the record."
    )


def gpu_operations(measured: list[dict[str, Any]]) -> str:
    """One row per operation and number of tokens."""
    known = {(row["op"], row["what"], row["tokens"]): row for row in measured}
    rows = []
    for case in CASES:
        if not any((case.op, case.what, tokens) in known for tokens in LENGTHS):
            rows.append([f"`{case.op}`", case.what, "all", NOT_YET, *[""] * 4])
            continue
        for tokens in LENGTHS:
            row = known.get((case.op, case.what, tokens))
            cells, note = [NOT_YET] * 5, ""
            if row is not None:
                note = "" if row["auto"] == "kernel" else f" (`auto` takes the {row['auto']})"
                ms, share = row["ms"], row[f"share_of_{'matrix' if case.bound == 'matrix' else 'copy'}_rate"]
                replayed = ms["replayed"]
                cells = [
                    gpu_us(ms["cold"], 1),
                    gpu_us(replayed, 1) if replayed else "no graph",
                    gpu_us(ms["reference"], 0),
                    f"{row['times_faster']:.1f} x",
                    "bound by neither" if case.bound == "latency" else f"{share:.0%} of the {case.bound} rate",
                ]
            rows.append([f"`{case.op}`", case.what, f"{tokens:,}{note}", *cells])
    header = [
        "operation",
        "on",
        "tokens",
        "one call, cold",
        "in a graph",
        "reference",
        "times faster",
        "of the ceiling",
    ]
    return table(header, rows, left=2)


def gpu_us(times: dict[str, float], digits: int) -> str:
    """A median in microseconds, and of how many runs it is where they are fewer than usual."""
    runs = int(times["runs"])
    few = f" ({runs} {'run' if runs == 1 else 'runs'})" if runs < MOST else ""
    return f"{1000 * times['median']:.{digits}f} us{few}"


def gpu_way(row: dict[str, Any] | None) -> list[str]:
    """The figures of one way to run a model."""
    row = row or {"ms": {}, "ratios": {}, "method": ""}
    full, native = row["method"] == "full", row["method"] == "native"

    def stage(name: str, applies: bool = True, ratio: str = "", form: str = "") -> str:
        more = f" ({form.format(row['ratios'][ratio])})" if ratio in row["ratios"] else ""
        return "" if not applies else f"{row['ms'][name]['median']:.2f}{more}" if name in row["ms"] else NOT_YET

    decode, speedup = row.get("decode"), row["ratios"].get("ttft_speedup")
    cells = [stage("vision_tower", not native), stage("selection", not (full or native), "overhead", "{:.2%}")]
    ahead, alone = row["ratios"].get("against_native_ahead"), row["ms"].get("prefill_ahead")
    against = "{:.3f} x" if ahead is None else f"{{:.3f}} x, {ahead:.3f} x"
    cells += [stage("prefill", True, "against_native", against)]
    cells[-1] += f" ({alone['median']:.2f} issued ahead)" if alone else ""
    cells += [stage("ttft", not native), f"{speedup:.2f} x" if speedup else "" if full or native else NOT_YET]
    cells += [f"{decode['ms_per_token']['median']:.2f}" if decode else "" if native else NOT_YET]
    rate = (decode or {}).get("tokens_per_second")
    cells += [f"{rate:.0f}" if rate else "" if native else NOT_YET]
    peak = row.get("peak_bytes")
    return [*cells, f"{peak / 1e9:.1f} GB" if peak else NOT_YET]


def gpu_goals(data: dict[str, Any], ways: dict[tuple[Any, ...], dict[str, Any]]) -> list[list[str]]:
    """What was promised beside what was measured: the worst over everything that counts."""
    memory = [row["share_of_copy_rate"] for row in data["operations"] if row["bound"] == "memory"]
    greedy = [row for row in data["operations"] if row["op"] == "greedy_diversity" and row["tokens"] == 2880]
    patched = [each for each in ways.values() if each["method"] not in ("full", "native")]
    hired = [each["ratios"] for key, each in ways.items() if key[1] == 5 and key[3:] == ("hired", 0.2)]
    overhead = [each["ratios"]["overhead"] for each in patched if "overhead" in each["ratios"]]
    waits = [each["waits"]["ours"] for each in patched if each.get("waits")]
    faster, native, ahead = (
        [each[name] for each in hired if name in each]
        for name in ("ttft_speedup", "against_native", "against_native_ahead")
    )

    def worst(values: list[float], pick: Any, form: str) -> str:
        return form.format(pick(values)) if values else NOT_YET

    stricter = worst(ahead, max, " ({:.3f} x with native launches issued ahead)") if ahead else ""
    greedy_ms = [row["ms"]["cold"]["median"] for row in greedy]
    return [
        ["least share of the copy rate, memory-bound operations", "70%", worst(memory, min, "{:.0%}")],
        ["`greedy_diversity`, 320 of 2,880 tokens", "1 ms", worst(greedy_ms, max, "{:.2f} ms")],
        ["selection, of the unpatched prefill", "1%", worst(overhead, max, "{:.2%}")],
        ["waits for the device in a patched prompt pass, ours", "1", worst(waits, max, "{:.0f}")],
        ["HiRED at 20%, time to the first token, times faster", "2.5 x", worst(faster, min, "{:.2f} x")],
        ["HiRED at 20%, prefill against native", "1.08 x", worst(native, max, "{:.3f} x") + stricter],
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/prefill_cpu_real.json"))
    parser.add_argument("--page", type=Path, default=Path("README.md"))
    parser.add_argument("--vit-results", type=Path, default=Path("benchmarks/results/vit_cpu.json"))
    parser.add_argument("--vit-page", type=Path, default=Path("docs/vit.md"))
    parser.add_argument("--greedy-results", type=Path, default=Path("benchmarks/results/greedy_cpu.json"))
    parser.add_argument("--greedy-page", type=Path, default=Path("docs/pruners/divprune.md"))
    parser.add_argument("--budgets-results", type=Path, default=Path("benchmarks/results/budgets_cpu.json"))
    parser.add_argument("--budgets-page", type=Path, default=Path("docs/budgets.md"))
    parser.add_argument("--evaluation-results", type=Path, default=Path("benchmarks/results/evaluation_cpu.json"))
    parser.add_argument("--evaluation-page", type=Path, default=Path("docs/evaluate.md"))
    parser.add_argument("--tstar-results", type=Path, default=Path("benchmarks/results/tstar_synthetic.json"))
    parser.add_argument("--tstar-page", type=Path, default=Path("docs/video_search.md"))
    parser.add_argument("--gpu-results", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--gpu-page", type=Path, default=Path("docs/kernels.md"))
    arguments = parser.parse_args()
    recorded = arguments.gpu_results.exists()
    replace_section(
        arguments.gpu_page, "gpu", gpu(json.loads(arguments.gpu_results.read_text("utf-8")) if recorded else None)
    )
    for results, page, name, write in (
        (arguments.results, arguments.page, "prefill", prefill),
        (arguments.greedy_results, arguments.greedy_page, "greedy", greedy),
        (arguments.budgets_results, arguments.budgets_page, "budgets", budgets),
        (arguments.vit_results, arguments.vit_page, "vit", vit),
        (arguments.evaluation_results, arguments.evaluation_page, "evaluation", evaluation),
        (arguments.tstar_results, arguments.tstar_page, "tstar", tstar),
    ):
        if results.exists():
            replace_section(page, name, write(json.loads(results.read_text(encoding="utf-8"))))
        else:
            print(f"{results} is not recorded yet: {page} keeps what it says", file=sys.stderr)


if __name__ == "__main__":
    main()
