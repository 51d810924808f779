"""What :func:`vlm_budget.autotune` found: every measured point, and the ones that no other beats."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import MissingExtraError, OptionError
from ..recipe import CalibrationFacts, ModelFacts, Recipe
from .judge import Score

if TYPE_CHECKING:
    from rich.table import Table

CostName = Literal["ms", "flops", "kv_bytes"]
_INDEX, _PICTURE = "front.json", "front.png"
_LABELS = {
    "ms": "time of the prompt behind the encoder, share of unpruned",
    "flops": "FLOPs of the language model over the prompt, share of unpruned",
    "kv_bytes": "KV cache of the prompt, share of unpruned",
}


@dataclass(frozen=True)
class Point:
    """One method at one budget.

    Attributes:
        spec: ``(name, options)`` per method.
        budget: As text; None where the options say the schedule.
        quality: The metric over the calibration prompts; higher is better.
        se: Its standard error over the prompts.
        cost: Means per prompt, each with its ``…_full`` of the unpruned model: ``"ms"`` (measured: language model over
            the prompt, and all that choosing tokens took), ``"flops"``, ``"kv_bytes"`` (predicted); and ``"share"``, of
            the visual tokens per layer.
        infeasible: Why the method cannot do this; everything else is then empty.
    """

    spec: tuple[tuple[str, Mapping[str, Any]], ...]
    budget: str | None
    quality: float = float("nan")
    se: float = float("nan")
    cost: Mapping[str, float] = field(default_factory=dict)
    infeasible: str | None = None

    @property
    def name(self) -> str:
        """The methods' names."""
        return " + ".join(name for name, _ in self.spec)

    def share(self, cost: CostName) -> float:
        """A cost as a share of the unpruned model's, measured side by side."""
        return self.cost[cost] / self.cost[f"{cost}_full"]


@dataclass(frozen=True)
class Front:
    """All measured points.

    Attributes:
        points: In the order they were measured; infeasible ones too.
        full: The unpruned model.
        model: The model.
        calibration: Hash and number of prompts, and the metric.
    """

    points: tuple[Point, ...]
    full: Score
    model: ModelFacts
    calibration: CalibrationFacts

    def pareto(self, cost: CostName = "ms") -> tuple[Point, ...]:
        """Points that no other beats in one of quality and cost without losing in the other, cheapest first.

        Raises:
            OptionError: Unknown cost.
        """
        if cost not in _LABELS:
            raise OptionError(f"cost must be one of {', '.join(_LABELS)}, got {cost!r}")
        feasible = [point for point in self.points if point.infeasible is None]
        front: list[Point] = []
        for point in sorted(feasible, key=lambda one: (one.share(cost), -one.quality)):
            if not front or point.quality > front[-1].quality:
                front.append(point)
        return tuple(front)

    def recipe(self, point: Point) -> Recipe:
        """A point as a recipe for ``patch(model, plan=recipe)``.

        Raises:
            OptionError: The point is infeasible.
        """
        if point.infeasible is not None:
            raise OptionError(f"{point.name} at {point.budget} is infeasible: {point.infeasible}")
        facts = self.calibration
        judged = CalibrationFacts(facts.hash, facts.size, facts.metric, None, point.quality, facts.full_quality)
        return Recipe(point.spec, point.budget, self.model, judged, point.cost)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The Pareto front in measured time, cheapest first."""
        return tuple(self.recipe(point) for point in self.pareto("ms"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        best = {cost: self.pareto(cost) for cost in ("ms", "flops")}
        rows = [
            {
                "methods": [{"name": name, "options": options} for name, options in point.spec],
                "budget": point.budget,
                **(
                    {"infeasible": point.infeasible} if point.infeasible else {"quality": point.quality, "se": point.se}
                ),
                "cost": dict(point.cost),
                "on_front": [cost for cost, front in best.items() if point in front],
            }
            for point in self.points
        ]
        return {
            "full": asdict(self.full),
            "model": asdict(self.model),
            "calibration": asdict(self.calibration),
            "points": rows,
        }

    def save(self, folder: str | Path, *, picture: bool = False) -> list[Path]:
        """Write ``front.json`` with all points, and one recipe per point of the front in measured time.

        Files that an earlier ``front.json`` in the folder names are removed: its plans would be taken for these.

        Args:
            folder: Made if missing.
            picture: Draw ``front.png`` too, where anything is feasible; see :meth:`plot`.

        Returns:
            The recipes' files, cheapest first.

        Raises:
            OptionError: The folder cannot be made, or holds a ``front.json`` of something else.
            MissingExtraError: A picture without matplotlib.
        """
        target = Path(folder)
        earlier = earlier_files(target)
        recipes = {
            target / f"{number:02}_{_stem(recipe)}.json": recipe for number, recipe in enumerate(self.recipes, 1)
        }
        drawn = [target / _PICTURE] if picture and recipes else []
        content = {**self.to_dict(), "files": [file.name for file in (*recipes, *drawn)]}
        try:
            target.mkdir(parents=True, exist_ok=True)
            for file in earlier:
                file.unlink(missing_ok=True)
            (target / _INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            for file, recipe in recipes.items():
                recipe.save(file)
        except OSError as error:
            raise OptionError(f"cannot save the front to {str(target)!r}: {error}") from error
        for file in drawn:
            self.plot(file)
        return list(recipes)

    def plot(self, path: str | Path, cost: CostName = "ms") -> None:
        """Draw quality against cost, every method in a colour and shape of its own, the front as a line.

        Raises:
            MissingExtraError: matplotlib is not installed.
            OptionError: Unknown cost, nothing feasible to draw, or a place or ending that no picture can have.
        """
        target = Path(path)
        if target.is_dir() or not target.absolute().parent.is_dir():
            raise OptionError(f"cannot draw {str(target)!r}: name a file in a folder that is there")
        front = self.pareto(cost)
        if not front:
            raise OptionError("there is nothing to draw: every point is infeasible")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("drawing the front needs matplotlib: pip install 'vlm-budget[search]'") from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        formats = figure.canvas.get_supported_filetypes()
        if target.suffix[1:].lower() not in ("", *formats):
            raise OptionError(f"matplotlib draws no {target.suffix!r} files; try .png, or one of {', '.join(formats)}")
        axes = figure.add_subplot()
        names = dict.fromkeys(point.name for point in self.points if point.infeasible is None)
        for number, name in enumerate(names):
            mine = [point for point in self.points if point.name == name and point.infeasible is None]
            x, y = [point.share(cost) for point in mine], [point.quality for point in mine]
            marker = "os^Dv"[number // 10 % 5]  # matplotlib has ten colours
            axes.errorbar(x, y, [point.se for point in mine], fmt=marker, markersize=4, capsize=2, label=name)
        axes.step([p.share(cost) for p in front], [p.quality for p in front], where="post", color="black", linewidth=1)
        axes.axhline(self.full.mean, color="grey", linestyle="--", linewidth=1, label="unpruned")
        axes.set_xlabel(_LABELS[cost])
        axes.set_ylabel(f"{self.calibration.metric} on {self.calibration.size} prompts")
        axes.legend(fontsize="small", ncols=2)
        try:
            figure.savefig(target)
        except OSError as error:
            raise OptionError(f"cannot draw {str(target)!r}: {error}") from error

    def table(self) -> Table:
        """What could be measured as a rich table, best quality first; the front in bold."""
        from rich.table import Table
        from rich.text import Text

        front = set(map(id, self.pareto("ms")))
        title = f"{self.calibration.metric} on {self.calibration.size} prompts, {self.full.mean:.4g} unpruned"
        table = Table(title=title, title_justify="left", header_style="bold")
        for column in ("method", "budget", "quality", "time", "FLOPs", "KV cache", "front"):
            table.add_column(column, overflow="fold")
        feasible = [point for point in self.points if point.infeasible is None]
        for point in sorted(feasible, key=lambda one: -one.quality):
            shares = [f"{point.share(cost):.0%}" for cost in ("ms", "flops", "kv_bytes")]
            row = [point.name, point.budget or "fixed", f"{point.quality:.4g} ± {point.se:.2g}", *shares]
            best = id(point) in front
            table.add_row(*(Text(cell, "bold" * best) for cell in [*row, "yes" * best]))
        return table

    def reasons(self) -> list[str]:
        """Why methods cannot do what was asked, one line per infeasible point."""
        return [
            f"{point.name} at {point.budget or 'its own rates'}: {point.infeasible}"
            for point in self.points
            if point.infeasible is not None
        ]


def earlier_files(folder: Path) -> list[Path]:
    """What an earlier front left in a folder, by its ``front.json``, and nothing else that lies there.

    Raises:
        OptionError: The place is no folder, or its ``front.json`` is of something else, which must not be overwritten.
    """
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not place.is_dir():
        raise OptionError(f"{str(place)!r} is a file; name a folder")
    index = folder / _INDEX
    if not index.exists():
        return []
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        if not {"full", "model", "calibration", "points"} <= set(content):
            raise ValueError("it has other fields")
        names = [str(name) for name in content.get("files", [])]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise OptionError(f"{str(index)!r} is no front of this library ({error}); save to another folder") from error
    return [folder / name for name in names if name == _PICTURE or re.fullmatch(r"\d+_[a-z0-9_.]+\.json", name)]


def _stem(recipe: Recipe) -> str:
    words = [*(name for name, _ in recipe.spec), recipe.budget or "fixed"]
    return re.sub(r"[^a-z0-9.]+", "_", " ".join(words).lower().replace("%", "pct")).strip("_")
