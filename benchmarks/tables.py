"""Writes the figures of recorded benchmarks into the pages that show them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vlm_budget.budget import in_words
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
    arguments = parser.parse_args()
    for results, page, name, write in (
        (arguments.results, arguments.page, "prefill", prefill),
        (arguments.greedy_results, arguments.greedy_page, "greedy", greedy),
        (arguments.budgets_results, arguments.budgets_page, "budgets", budgets),
        (arguments.vit_results, arguments.vit_page, "vit", vit),
        (arguments.evaluation_results, arguments.evaluation_page, "evaluation", evaluation),
    ):
        if results.exists():
            replace_section(page, name, write(json.loads(results.read_text(encoding="utf-8"))))
        else:
            print(f"{results} is not recorded yet: {page} keeps what it says", file=sys.stderr)


if __name__ == "__main__":
    main()
