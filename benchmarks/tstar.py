"""How many frames temporal search visits before it has found what there is to find, on score curves that are known.

No scorer runs: curves stand in for one. A curve is what a CLIP-like scorer gives on a video: a floor that differs from
scene to scene, noise from frame to frame, distractors (bumps that stay below the threshold), and the needles: events of
some seconds at full height whose score falls off to both sides over a *shoulder*, since what surrounds an event looks
like it. Adversarial curves have no shoulders: every needle is one frame, and nothing near it tells of it.

A needle is found when one of the kept frames lies within five seconds of its event (temporal recall, tau = 5 s) and on
the event's own bump, so that a lucky frame of the floor does not count; it is *shown* when one lies in the event, up to
half a second beside it. Eight frames are kept, in the same way, of what was visited by: the search; the search with the
paper's sampler (``explore="percentile"``); frames at equal distances; all frames. A search may stop before its budget
is spent; with the paper's sampler it may not, since it would settle before it has found anything.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_budget.eval.record import environment, write_json
from vlm_budget.video.frames.tstar import Found, TStar, search

FRAMES = 10_000
KEEP = 8
SHARES = {
    "search": (0.025, 0.05, 0.075, 0.1, 0.125, 0.15),
    "percentile sampler": (0.05, 0.15, 0.3),
    "equal distances": (0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.3),
}
SHOULDERS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)  # 0: the adversarial curves
FIRST_SEED = 10_000


@dataclass(frozen=True)
class Curve:
    """A score curve at one frame per second.

    Attributes:
        scores: [N] float32 in [0, 1].
        needles: Per needle the middle of its event, half the event's length and the width of its shoulder, in seconds.
    """

    scores: torch.Tensor
    needles: tuple[tuple[float, float, float], ...]

    def recall(self, kept: tuple[int, ...], within: float = 5.0) -> float:
        """Share of the needles of which a frame was kept: within seconds of its event, and on its own bump."""
        hits = [
            any(abs(frame - middle) <= half + min(within, 2 * shoulder) for frame in kept)
            for middle, half, shoulder in self.needles
        ]
        return sum(hits) / len(hits)


def curve(seed: int, needles: int, shoulder: float | None = None, frames: int = FRAMES) -> Curve:
    """A random curve.

    Args:
        seed: Of everything random in it.
        needles: How many events; at least 40 s between their middles.
        shoulder: Standard deviation, in seconds, of the half Gaussians to both sides of an event; drawn from 2 to 8
            per event by default. 0: needles are single frames without shoulders.
        frames: Length in seconds.
    """
    random = np.random.default_rng(seed)
    seconds = np.arange(frames)
    floor = np.zeros(frames)
    start = 0
    while start < frames:
        length = int(random.integers(5, 90))
        floor[start : start + length] = random.uniform(0.1, 0.3)
        start += length
    scores = floor + random.normal(0, 0.03, frames)
    for _ in range(frames // 250):
        bump = _bump(seconds, random.uniform(0, frames), random.uniform(0.5, 2), random.uniform(2, 8))
        scores = np.maximum(scores, bump * random.uniform(0.3, 0.5) + random.normal(0, 0.03, frames))
    middles: list[float] = []
    while len(middles) < needles:
        middle = float(random.integers(5, frames - 5))
        if all(abs(middle - other) >= 40 for other in middles):
            middles.append(middle)
    events = []
    for middle in middles:
        half = 0.0 if shoulder == 0 else random.uniform(0.5, 2)
        wide = random.uniform(2, 8) if shoulder is None else shoulder
        height = random.uniform(0.65, 0.95)
        bump = floor + (height - floor) * _bump(seconds, middle, half, wide)
        scores = np.where(bump > floor + 0.01, np.maximum(scores, bump + random.normal(0, 0.03, frames)), scores)
        events.append((middle, half, wide))
    return Curve(torch.from_numpy(scores.clip(0, 1)).float(), tuple(events))


def _bump(seconds: np.ndarray, middle: float, half: float, shoulder: float) -> np.ndarray:
    """1 within an event, falling off as a Gaussian outside."""
    outside = np.maximum(np.abs(seconds - middle) - half, 0)
    return np.exp(-0.5 * (outside / shoulder) ** 2) if shoulder else (outside == 0).astype(float)


def run(drawn: Curve, settings: TStar) -> Found:
    """A search on a curve."""
    scores = drawn.scores[:, None]
    return search(lambda frames: scores[list(frames)], len(scores), targets=1, keep=KEEP, settings=settings)


def settings_of(method: str, share: float, frames: int = FRAMES) -> TStar:
    """How a method of the comparison visits a share of the frames."""
    budget = round(share * frames)
    if method == "search":
        return TStar(budget=budget)
    if method == "percentile sampler":
        return TStar(budget=budget, explore="percentile", patience=frames)
    if method == "search, until verified":
        return TStar(budget=budget, stop="verified")
    return TStar(budget=budget, batch=budget, explore="percentile")  # one round, at equal distances


def judge(curves: list[Curve], method: str, share: float) -> dict[str, Any]:
    """A method on some curves: means, and the standard error of the recall."""
    found = [run(drawn, settings_of(method, share, len(drawn.scores))) for drawn in curves]
    recalls = [drawn.recall(one.kept) for drawn, one in zip(curves, found, strict=True)]
    visited = [len(one.visited) / len(drawn.scores) for drawn, one in zip(curves, found, strict=True)]
    return {
        "method": method,
        "budget": share,
        "visited": statistics.mean(visited),
        "most_visited": max(visited),
        "recall": statistics.mean(recalls),
        "recall_se": statistics.stdev(recalls) / len(recalls) ** 0.5,
        "shown": statistics.mean(d.recall(one.kept, 0.5) for d, one in zip(curves, found, strict=True)),
        "rounds": statistics.mean(one.rounds for one in found),
    }


def least_share(rows: list[dict[str, Any]], wanted: float = 0.95) -> float | None:
    """Frames visited, as a share of all, with the smallest budget whose recall is as wanted."""
    enough = [row for row in rows if row["recall"] >= wanted]
    return min(enough, key=lambda row: row["budget"])["visited"] if enough else None


def by_needles(count: int, needles: int) -> dict[str, Any]:
    """Curves with some needles: every method at every budget."""
    curves = [curve(FIRST_SEED + 100 * needles + number, needles) for number in range(count)]
    rows = [judge(curves, method, share) for method in SHARES for share in SHARES[method]]
    rows += [judge(curves, "search, until verified", 0.15), judge(curves, "equal distances", 1.0)]
    least = {method: least_share([row for row in rows if row["method"] == method]) for method in SHARES}
    return {"needles": needles, "curves": count, "visited_for_95_percent_recall": least, "rows": rows}


def by_shoulder(count: int, shoulder: float) -> dict[str, Any]:
    """Curves with three needles of one width."""
    curves = [curve(FIRST_SEED + number, 3, shoulder) for number in range(count)]
    rows = [judge(curves, method, share) for method in ("search", "equal distances") for share in (0.05, 0.1, 0.15)]
    rows.append(judge(curves, "equal distances", 1.0))
    return {"shoulder_s": shoulder, "needles": 3, "curves": count, "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--curves", type=int, default=12, help="per number of needles, and per width")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    needles = []
    for number in range(1, 6):
        needles.append(by_needles(arguments.curves, number))
        print(number, "needles:", needles[-1]["visited_for_95_percent_recall"], flush=True)
    widths = []
    for shoulder in SHOULDERS:
        widths.append(by_shoulder(arguments.curves, shoulder))
        for row in widths[-1]["rows"]:
            print(shoulder, "s:", row["method"], row["budget"], round(row["recall"], 3), flush=True)
    write_json(
        arguments.out / "tstar_synthetic.json",
        {
            "environment": environment(),
            "frames": FRAMES,
            "keep": KEEP,
            "settings": str(TStar()),
            "needles": needles,
            "shoulders": widths,
        },
    )


if __name__ == "__main__":
    main()
