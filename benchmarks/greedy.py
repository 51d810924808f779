"""Greedy selection against naive loops: is the token-by-token choice of DivPrune, CDPruner and MMTok fast enough?

One item of 2,880 tokens (LLaVA-NeXT, five partitions of 576), of which 640 stay. Every selection runs beside naive
forms of itself, turn by turn:

* max-min (DivPrune): ``candidates`` visits every candidate in Python and keeps its running minimum; ``reindexed``
  takes the rows of the chosen and the columns of the other tokens out of the distance matrix anew for every token.
* determinantal point process (CDPruner): ``candidates`` visits every candidate in Python and extends its Cholesky row
  by one dot product; ``refactored`` factors the chosen tokens' kernel and solves for all candidates anew for every
  token.
* maximum coverage (MMTok): ``whole table`` computes every gain from the whole table anew for every token.

All start from the same similarities, whose time is given apart. Before anything is timed, every naive form must choose
the same tokens in the same order (in float64 for the determinants, where sums in another order do not swap tokens that
are all but equal): if one does not, nothing is reported. Times are medians; their ratios are what carries over.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlm_budget.eval.record import environment, write_json
from vlm_budget.greedy import CosineRows, map_dpp, max_coverage, max_min

Choice = Callable[[], list[int]]


def max_min_candidates(distance: list[list[float]], k: int) -> list[int]:
    """A Python loop over the candidates in every step, with running minima."""
    tokens = range(len(distance))
    nearest = [min(row[:token] + row[token + 1 :]) for token, row in zip(tokens, distance, strict=True)]
    chosen = [max(tokens, key=lambda token: nearest[token])]
    running = list(distance[chosen[0]])
    taken = set(chosen)
    while len(chosen) < k:
        best, best_token = -1.0, -1
        for token in tokens:
            if token not in taken and running[token] > best:
                best, best_token = running[token], token
        chosen.append(best_token)
        taken.add(best_token)
        row = distance[best_token]
        for token in tokens:
            if row[token] < running[token]:
                running[token] = row[token]
    return chosen


def max_min_reindexed(distance: torch.Tensor, k: int) -> list[int]:
    """The distance matrix indexed anew in every step, as the released code of DivPrune is said to do."""
    apart = distance.clone().fill_diagonal_(float("inf"))
    chosen = [int(apart.amin(1).argmax())]
    left = torch.ones(len(distance), dtype=torch.bool)
    left[chosen[0]] = False
    while len(chosen) < k:
        others = left.nonzero().flatten()
        best = int(others[distance[torch.tensor(chosen)][:, others].amin(0).argmax()])
        chosen.append(best)
        left[best] = False
    return chosen


def dpp_candidates(kernel: torch.Tensor, k: int) -> list[int]:
    """A Python loop over the candidates in every step, with an incremental Cholesky row for each."""
    count = len(kernel)
    gain = kernel.diagonal().tolist()
    rows = kernel.new_zeros(count, k)
    chosen: list[int] = []
    taken: set[int] = set()
    while len(chosen) < k:
        best = max((token for token in range(count) if token not in taken), key=lambda token: gain[token])
        size, scale = len(chosen), gain[best] ** 0.5
        own, similar = rows[best, :size], kernel[best].tolist()
        chosen.append(best)
        taken.add(best)
        for token in range(count):
            if token not in taken:
                entry = (similar[token] - float(own @ rows[token, :size])) / scale
                rows[token, size] = entry
                gain[token] -= entry * entry
    return chosen


def dpp_refactored(kernel: torch.Tensor, k: int) -> list[int]:
    """The chosen tokens' kernel factored anew in every step, and solved for all candidates at once."""
    diagonal = kernel.diagonal()
    chosen = [int(diagonal.argmax())]
    while len(chosen) < k:
        index = torch.tensor(chosen)
        lower = torch.linalg.cholesky(kernel[index][:, index])
        solved = torch.linalg.solve_triangular(lower, kernel[index], upper=False)
        gain = diagonal - solved.square().sum(0)
        gain[index] = float("-inf")
        chosen.append(int(gain.argmax()))
    return chosen


def coverage_whole_table(rows: torch.Tensor, k: int) -> list[int]:
    """Every gain computed from the whole table in every step."""
    covered = rows.new_zeros(len(rows), 1)
    left = torch.ones(rows.shape[1], dtype=torch.bool)
    chosen: list[int] = []
    while len(chosen) < k:
        gain = (rows - covered).clamp_min_(0).sum(0, dtype=torch.float64).masked_fill_(~left, -1)
        best = int(gain.argmax())
        chosen.append(best)
        left[best] = False
        covered = torch.maximum(covered, rows[:, best : best + 1])
    return chosen


def picture(count: int, width: int, seed: int) -> torch.Tensor:
    """[n, C] tokens that resemble each other in groups, as those of a picture do."""
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(count // 20, width, generator=generator)
    which = torch.randint(len(things), (count,), generator=generator)
    return things[which] + 0.7 * torch.randn(count, width, generator=generator)


def contenders(features: torch.Tensor, k: int) -> dict[str, tuple[Choice, dict[str, Choice]]]:
    """Per selection, ours and its naive forms, all on the same similarities."""
    rows = CosineRows(features)
    assert rows.whole is not None
    similar = rows.whole
    distance = 1 - similar
    listed = distance.tolist()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    quality = torch.linspace(0.05, 1, len(features)).to(similar)[order]
    kernel = quality[:, None] * similar * quality
    table = (similar / 0.2).softmax(1) / len(similar)
    return {
        "max-min": (
            lambda: max_min(rows, k).tolist(),
            {
                "candidates": lambda: max_min_candidates(listed, k),
                "reindexed": lambda: max_min_reindexed(distance, k),
            },
        ),
        "determinantal": (
            lambda: map_dpp(rows, quality.log(), k).tolist(),
            {"candidates": lambda: dpp_candidates(kernel, k), "refactored": lambda: dpp_refactored(kernel, k)},
        ),
        "coverage": (
            lambda: max_coverage(table, k).tolist(),
            {"whole table": lambda: coverage_whole_table(table, k)},
        ),
    }


def check(features: torch.Tensor, k: int) -> None:
    """Every naive form chooses what ours chooses, in the same order.

    Raises:
        RuntimeError: One does not: nothing may be timed.
    """
    for name, (ours, naive) in contenders(features, k).items():
        expected = ours()
        for form, choose in naive.items():
            if (found := choose()) != expected:
                step = next(i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1])
                raise RuntimeError(f"{name}: {form} chooses another token at step {step}: nothing was timed")


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(features: torch.Tensor, k: int, runs: int) -> list[dict[str, Any]]:
    """Ours and the naive forms in turn, round after round; the first round of ours warms up."""
    results = []
    for name, (ours, naive) in contenders(features, k).items():
        ours()
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            for form, choose in {"ours": ours, **naive}.items():
                times.setdefault(form, []).append(timed(choose))
        ms = {form: spread(values) for form, values in times.items()}
        speedup = {form: ms[form]["median"] / ms["ours"]["median"] for form in naive}
        results.append({"selection": name, "runs": runs, "ms": ms, "speedup": speedup})
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=2880)
    parser.add_argument("--keep", type=int, default=640)
    parser.add_argument("--width", type=int, default=896, help="of a token: 896 in a 0.5B-class language model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    features = picture(arguments.tokens, arguments.width, arguments.seed)
    check(features.double(), arguments.keep)
    print("all forms choose the same tokens", flush=True)
    similarity = [timed(lambda: CosineRows(features).whole) for _ in range(arguments.runs + 1)][1:]
    results = measure(features, arguments.keep, arguments.runs)
    for result in results:
        own = result["ms"]["ours"]["median"]
        for form, times in result["speedup"].items():
            print(f"{result['selection']}: {own:.1f} ms, {form} {times:.1f} x as long", flush=True)
    write_json(
        arguments.out / "greedy_cpu.json",
        {
            "environment": environment("cpu", "float32"),
            "tokens": arguments.tokens,
            "keep": arguments.keep,
            "width": arguments.width,
            "similarity_ms": spread(similarity),
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
