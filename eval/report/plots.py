"""Pareto pictures as inline SVG: a task's metric against what it costs, colours and shapes from the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vlm_budget.eval.cells import UNPATCHED
from vlm_budget.eval.report import words
from vlm_budget.eval.report.words import Html, element
from vlm_budget.eval.statistics import Comparison
from vlm_budget.eval.summary import COSTS, Result, Summary
from vlm_budget.eval.task import Task

PLAIN = ("random", "uniform")
WIDTH, HEIGHT = 440, 292
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 26, 46
_COLOURS, _TICKS, _LONGEST = 8, 5, 34
_SHORT = {
    "mean_kept": "visual tokens",
    "flops": "FLOPs of the prompt",
    "kv_bytes": "KV cache",
    "prefill_ms": "measured prefill",
}
_SHAPES = (
    "M-4.4 0A4.4 4.4 0 1 0 4.4 0A4.4 4.4 0 1 0 -4.4 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5.4L5.4 0L0 5.4L-5.4 0Z",
    "M0 -5.2L5 4H-5Z",
    "M0 5.2L5 -4H-5Z",
    "M-5.2 0L-2.6 -4.6H2.6L5.2 0L2.6 4.6H-2.6Z",
    "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
)


@dataclass(frozen=True)
class Point:
    """One cell in a picture.

    Attributes:
        x: Share of the unpatched model's cost.
        result: What it scored.
    """

    x: float
    result: Result

    @property
    def y(self) -> float:
        """Its score."""
        return self.result.main.mean

    @property
    def error(self) -> float:
        """Its standard error; 0 where there is none."""
        return self.result.main.se if math.isfinite(self.result.main.se) else 0.0


@dataclass(frozen=True)
class _Frame:
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * value / self.right

    def y(self, value: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (self.high - value) / (self.high - self.low)


def classes(summary: Summary) -> dict[str, str]:
    """Per method, the classes that give it colour and identity."""
    names = list(dict.fromkeys(cell.methods for cell in summary.cells))
    found, coloured = {}, 0
    for index, name in enumerate(names):
        if name == UNPATCHED or name in PLAIN:
            found[name] = f"s m{index} {'full' if name == UNPATCHED else 'base'}"
        else:
            found[name] = f"s m{index} c{coloured % _COLOURS}"
            coloured += 1
    return found


def shapes(summary: Summary) -> dict[str, str]:
    """Per method, the outline of its marks."""
    return {name: _SHAPES[index % len(_SHAPES)] for index, name in enumerate(classes(summary))}


def key(summary: Summary) -> Html:
    """What the marks mean."""
    outlines = shapes(summary)
    entries = [
        element(
            "li",
            element("svg", element("path", d=outlines[name]), viewBox="-8 -8 16 16", aria_hidden="true"),
            element("bdi", words.clean(name, 80)),
            class_=kind,
        )
        for name, kind in classes(summary).items()
    ]
    front = element("svg", element("path", d="M-8 4H0V-4H8"), viewBox="-8 -8 16 16", aria_hidden="true")
    return element("ul", *entries, element("li", front, "nothing cheaper is better", class_="front"), class_="key")


def costs_of(summary: Summary, task: Task, times: bool) -> list[str]:
    """Costs that can be drawn for a task, measured time first."""
    order = ("prefill_ms", "flops", "mean_kept", "kv_bytes")
    return [name for name in order if (times or name != "prefill_ms") and _points(summary, task, name)]


def pareto(summary: Summary, task: Task, cost: str) -> Html:
    """The metric against one cost."""
    points = _points(summary, task, cost)
    low, high = min(one.y - one.error for one in points), max(one.y + one.error for one in points)
    pad = 0.06 * (high - low) or 0.05 * max(abs(high), 0.1)
    frame = _Frame(1.04 * max(1.0, *(one.x for one in points)), low - pad, high + pad)
    kinds, outlines = classes(summary), shapes(summary)
    by_method: dict[str, list[Point]] = {}
    for one in points:
        by_method.setdefault(one.result.cell.methods, []).append(one)
    order = sorted(by_method, key=lambda name: (name not in PLAIN, name == UNPATCHED))
    series = [_series(by_method[name], frame, kinds[name], outlines[name], cost) for name in order]
    label = f"{task.name}: {task.metric} against {COSTS[cost]}; the figures stand in the tables below"
    return element(
        "svg",
        *_axes(frame, words.clean(task.metric, _LONGEST), f"{_SHORT[cost]}, share of unpatched"),
        _front(points, frame),
        *series,
        class_="plot",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
    )


def whisker(found: Comparison, bound: float) -> Html:
    """An interval beside the line of no difference.

    Args:
        found: The difference.
        bound: What the ends of the picture stand for.
    """
    low, high, middle = (56 * value / bound for value in (found.low, found.high, found.difference))
    kind = "down" if found.high < 0 else "up" if found.low > 0 else "quiet"
    return element(
        "svg",
        element("path", d="M0 -8V8", class_="zero"),
        element("path", d=f"M{low:.1f} 0H{high:.1f}", class_="span"),
        element("path", d=f"M{middle:.1f} -4V4", class_="middle"),
        class_=f"whisker {kind}",
        viewBox="-60 -8 120 16",
        aria_hidden="true",
    )


def front(points: Sequence[Point]) -> list[Point]:
    """Those points that score more than everything that costs no more, by rising cost."""
    found: list[Point] = []
    for one in sorted(points, key=lambda one: (one.x, -one.y)):
        if not found or one.y > found[-1].y:
            found.append(one)
    return found


def highlights(summary: Summary) -> str:
    """Style that dims the other methods while the pointer is on one."""
    names = [kind.split()[1] for kind in classes(summary).values()]
    return "".join(f".pareto:has(.{name}:hover) .s:not(.{name}){{opacity:.14}}" for name in names)


def _points(summary: Summary, task: Task, cost: str) -> list[Point]:
    mine = [one for one in summary.results if one.task == task.name and one.main.n and math.isfinite(one.main.mean)]
    return [Point(one.share[cost], one) for one in mine if math.isfinite(one.share.get(cost, math.nan))]


def _series(points: Sequence[Point], frame: _Frame, kind: str, outline: str, cost: str) -> Html:
    ordered = sorted(points, key=lambda one: one.x)
    places = [(frame.x(one.x), frame.y(one.y)) for one in ordered]
    parts: list[Html] = []
    if len(places) > 1:
        parts.append(element("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), class_="way"))
    for one, (x, y) in zip(ordered, places, strict=True):
        result = one.result
        if one.error:
            ends = f"M{x:.1f} {frame.y(one.y - one.error):.1f}V{frame.y(one.y + one.error):.1f}"
            parts.append(element("path", d=ends, class_="error"))
        spent = f"{words.cost(cost, result.cost[cost])}, {words.percent(one.x)} of unpatched"
        said = f"{words.clean(str(result.cell), 80)}: {words.mean(result.main)}; {spent}"
        mark = element(
            "path", element("title", said), d=outline, transform=f"translate({x:.1f} {y:.1f})", class_="mark"
        )
        parts.append(mark)
    return element("g", *parts, class_=kind)


def _front(points: Sequence[Point], frame: _Frame) -> Html:
    steps = front(points)
    path = f"M{frame.x(steps[0].x):.1f} {frame.y(steps[0].y):.1f}"
    path += "".join(f"H{frame.x(one.x):.1f}V{frame.y(one.y):.1f}" for one in steps[1:])
    return element("path", d=path + f"H{WIDTH - _RIGHT}", class_="front")


def _axes(frame: _Frame, metric: str, cost: str) -> Iterator[Html]:
    bottom, middle = HEIGHT - _BOTTOM, (_LEFT + WIDTH - _RIGHT) / 2
    for value in _ticks(frame.low, frame.high):
        y = frame.y(value)
        yield element("path", d=f"M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}", class_="grid")
        yield element("text", f"{value:.6g}".replace("-", "\u2212"), x=_LEFT - 8, y=f"{y + 4:.1f}", text_anchor="end")
    for value in _ticks(0, frame.right):
        text = words.percent(value)
        yield element("text", text, x=f"{frame.x(value):.1f}", y=bottom + 18, text_anchor="middle")
    yield element("path", d=f"M{_LEFT} {bottom}H{WIDTH - _RIGHT}", class_="axis")
    yield element("path", d=f"M{frame.x(1):.1f} {_TOP}V{bottom}", class_="whole")
    yield element("text", metric, x=8, y=14, class_="label")
    yield element("text", cost, x=f"{middle:.1f}", y=HEIGHT - 8, text_anchor="middle", class_="label")


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / _TICKS
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * one for one in (1, 2, 2.5, 5, 10) if scale * one >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def bound(found: Sequence[Comparison | None]) -> float:
    """What the ends of all whiskers of a column stand for."""
    ends = [abs(end) for one in found if one is not None for end in (one.low, one.high)]
    return max([0.02, *filter(math.isfinite, ends)])
