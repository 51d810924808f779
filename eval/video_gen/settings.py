"""The settings whose clips are measured, and those that are compared pair by pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD = Path("benchmarks/results/video_gen_quality.json")
DENSITIES = (0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_FEW = (0.15, 0.2, 0.3)
NO_WARMUP: dict[str, Any] = {"warmup": 0.0, "dense_layers": 0.0}


@dataclass(frozen=True)
class Setting:
    """One method at one setting.

    Attributes:
        curve: The line of the picture that it belongs to.
        method: Registered name.
        options: Fields of the method, warm-up and dense layers among them.
        nominal: The density that was asked for; None where top-p decides.
    """

    curve: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    nominal: float | None = None

    @property
    def key(self) -> str:
        """What tells settings apart."""
        fields = ",".join(f"{name}={value}" for name, value in sorted({**NO_WARMUP, **self.options}.items()))
        return f"{self.method}({fields})"


def settings() -> list[Setting]:
    """All settings, the most telling ones first: time may not do for all."""
    return list({setting.key: setting for setting in (*_curves(_FEW), *_options(), *_curves(DENSITIES))}.values())


SMALL: dict[str, dict[str, Any]] = {
    "block_topk": {"extent": (3, 2, 2)},
    "svg1": {"block_size": 20},
    "radial": {"block_size": 20},
    "sliding_tile": {"extent": (2, 2, 2)},
}
"""Blocks of about the size of a cluster of keys here: those of released models would be too coarse for 1,200 tokens."""


def _curves(densities: Iterable[float]) -> Iterator[Setting]:
    """Masks over densities."""
    for density in densities:
        at = {"density": density}
        cubes, drawn = {**at, **SMALL["block_topk"]}, {"choose": "random"}
        yield Setting("svg2, corrected", "svg2", {**at, "correction": True}, density)
        yield Setting("svg2", "svg2", {**at, "correction": False}, density)
        yield Setting("oracle", "oracle", {**at, "correction": False}, density)
        yield Setting("oracle, corrected", "oracle", {**at, "correction": True}, density)
        yield Setting("block_topk, corrected", "block_topk", {**cubes, "correction": True}, density)
        yield Setting("block_topk", "block_topk", {**cubes, "correction": False}, density)
        yield Setting("random blocks, corrected", "block_topk", {**cubes, **drawn, "correction": True}, density)
        yield Setting("random blocks", "block_topk", {**cubes, **drawn, "correction": False}, density)
        for name in ("svg1", "radial", "sliding_tile"):
            yield Setting(name, name, {**at, **SMALL[name]}, density)
    for top_p in (0.5, 0.7, 0.8, 0.9):
        yield Setting("svg2, top-p", "svg2", {"top_p": top_p, "correction": False})
        yield Setting("svg2, top-p, corrected", "svg2", {"top_p": top_p, "correction": True})


OPTIONS: dict[str, dict[str, Any]] = {
    "warm-up 10 %": {"warmup": 0.1},
    "labels of every step": {"reuse": 1},
    "labels kept 4 steps": {"reuse": 4},
    "labels kept 20 steps": {"reuse": 20},
    "2 iterations a step": {"iterations": 2},
    "2 first iterations": {"init_iterations": 2},
    "half of the tokens clustered": {"sample": 0.5},
    "a quarter of the tokens clustered": {"sample": 0.25},
    "fixed blocks of 16, chain": {"cut": "fixed", "block_size": 16, "order": "chain"},
    "fixed blocks of 16, axis": {"cut": "fixed", "block_size": 16, "order": "axis"},
    "fixed blocks of 16, index": {"cut": "fixed", "block_size": 16, "order": "index"},
    "fixed blocks of 32, chain": {"cut": "fixed", "block_size": 32, "order": "chain"},
    "40 clusters of queries": {"query_clusters": 40},
    "10 clusters of queries": {"query_clusters": 10},
    "40 clusters of keys": {"key_clusters": 40},
    "another seed": {"seed": 1},
}
"""Changes of SVG2 with correction, each by itself."""


def _options() -> Iterator[Setting]:
    """What each option of SVG2 does."""
    for density in (0.2, 0.3):
        for name, changed in OPTIONS.items():
            options = {"density": density, "correction": True, **changed}
            yield Setting(f"svg2, corrected, {name}", "svg2", options, density)
        options = {"density": density, "correction": False, "warmup": 0.1}
        yield Setting("svg2, warm-up 10 %", "svg2", options, density)
    floor = {"top_p": 0.7, "floor": 0.25}
    yield Setting("svg2, top-p, floor 0.25", "svg2", {**floor, "correction": False})
    yield Setting("svg2, top-p, floor 0.25, corrected", "svg2", {**floor, "correction": True})
    for extent in ((4, 4, 4), (2, 3, 3), (6, 2, 2), (12, 1, 1)):
        options = {"density": 0.3, "correction": True, "extent": extent}
        yield Setting(f"block_topk, cubes of {extent}, corrected", "block_topk", options, 0.3)


PAIRS: tuple[tuple[str, str], ...] = (
    ("svg2, corrected", "svg2"),
    ("oracle, corrected", "oracle"),
    ("block_topk, corrected", "block_topk"),
    ("svg2", "block_topk"),
    ("svg2, corrected", "block_topk, corrected"),
    ("block_topk", "random blocks"),
    ("block_topk, corrected", "random blocks, corrected"),
    ("oracle", "svg2"),
    ("oracle, corrected", "svg2, corrected"),
    ("svg2", "svg1"),
    ("svg2", "radial"),
    ("svg2", "sliding_tile"),
)
"""Curves whose clips are compared pair by pair, where both were asked for one density."""
