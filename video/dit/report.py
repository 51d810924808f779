"""What sparse attention did with the last run of a video pipeline."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from .quality import Quality


@dataclass(frozen=True)
class DenseCalls:
    """Self-attention calls that stayed dense for one reason.

    Attributes:
        why: The reason.
        calls: How many.
        steps: In which steps, ascending.
        layers: In which layers, ascending.
    """

    why: str
    calls: int
    steps: tuple[int, ...]
    layers: tuple[int, ...]

    def __str__(self) -> str:
        """``80 calls (warm-up steps): steps 0-1, layers 0-39``."""
        return f"{self.calls} calls ({self.why}): steps {ranges(self.steps)}, layers {ranges(self.layers)}"


@dataclass(frozen=True)
class VideoReport:
    """The account of one run: all denoising steps of one call of a pipeline.

    A density is the share of all pairs of query and key that were computed, those of text, which are dense, among them,
    and padding left aside; a correction for dropped blocks counts a pair per row and block. Means are over calls,
    which are of one size in a run.

    Attributes:
        method: ``str()`` of the method.
        model: Class of the transformer.
        grid: Tokens of the video as frames x rows x columns.
        tokens: Tokens of the video.
        text: Text tokens beside them, padding included.
        budget: The budget as text, where one was given.
        steps: Denoising steps of the run, where known.
        layers: Layers of the transformer.
        calls: Self-attention calls.
        sparse_calls: Those that ran sparse.
        density: Of all calls, dense ones counted as 1: what the run as a whole computed.
        sparse_density: Of the sparse calls; None where none ran.
        promised: What sparse calls may reach at most; None where the method promises nothing.
        densities: A row per step and a column per layer, mean over branches of guidance; None where nothing ran.
        dense: Which calls stayed dense, and why.
        error: Relative error of the output of sparse calls, ``|sparse - dense| / |dense|``, on sampled rows: what one
            call loses, given the run's own queries, keys and values. None where nothing was sampled.
        recall: Share of the attention mass on computed keys, on the same rows. It ranks methods badly; read it beside
            ``error`` only.
        errors: ``(layer, error)`` of every sampled layer.
        sampled_rows: Rows that ``error`` and ``recall`` are made of, over all samples of a batch alike.
        warnings: Why sparse attention did not run or is expected not to pay, and promises that were missed.
        quality: PSNR and SSIM against the dense run, of :meth:`VideoHandle.compare`.
    """

    method: str
    model: str
    grid: str
    tokens: int
    text: int
    budget: str | None
    steps: int | None
    layers: int
    calls: int
    sparse_calls: int
    density: float
    sparse_density: float | None
    promised: float | None
    densities: tuple[tuple[float | None, ...], ...]
    dense: tuple[DenseCalls, ...]
    error: float | None
    recall: float | None
    errors: tuple[tuple[int, float], ...]
    sampled_rows: int
    warnings: tuple[str, ...] = ()
    quality: Quality | None = None

    @property
    def layer_densities(self) -> tuple[float | None, ...]:
        """Mean density of each layer over the steps."""
        return tuple(_mean(column) for column in zip(*self.densities, strict=True))

    @property
    def step_densities(self) -> tuple[float | None, ...]:
        """Mean density of each step over the layers."""
        return tuple(_mean(row) for row in self.densities)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            **asdict(self),
            "layer_densities": list(self.layer_densities),
            "step_densities": list(self.step_densities),
            "quality": None if self.quality is None else self.quality.to_dict(),
        }

    def table(self) -> Table:
        """The report as a rich table: ``rich.print(report.table())``."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self._title), show_header=False)  # Text: brackets are no markup
        for name, value in self._rows():
            table.add_row(Text(name), Text(value))
        return table

    @property
    def _title(self) -> str:
        at = "" if self.budget is None else f" at {self.budget}"
        return f"{self.method}{at} on {self.model}"

    def _rows(self) -> list[tuple[str, str]]:
        text = f", {self.text} text tokens" if self.text else ""
        rows = [
            ("tokens", f"{self.tokens:,} ({self.grid}){text}"),
            ("density of the run", f"{self.density:.2%} of all pairs, dense calls counted as all"),
        ]
        if self.sparse_density is not None:
            promise = "" if self.promised is None else f", promised at most {self.promised:.2%}"
            rows.append(
                ("density of sparse calls", f"{self.sparse_density:.2%}{promise} ({self.sparse_calls} of {self.calls})")
            )
            rows += [
                ("  by step", _spark(self.step_densities)),
                ("  by layer", _spark(self.layer_densities)),
            ]
        rows += [("dense", str(entry)) for entry in self.dense]
        if self.error is not None and self.recall is not None:
            worst = max(self.errors, key=lambda entry: entry[1])
            rows += [
                ("output error of a call", f"{self.error:.3f} relative, worst {worst[1]:.3f} in layer {worst[0]}"),
                ("  its attention recall", f"{self.recall:.1%}, on {self.sampled_rows} sampled rows"),
            ]
        if self.quality is not None:
            rows += self.quality.rows()
        return [*rows, *(("warning", warning) for warning in self.warnings)]

    def __str__(self) -> str:
        """The rows as plain text."""
        return "\n".join([self._title, *(f"  {name}: {value}" for name, value in self._rows())])


def ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers in few words: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


_MANY = 12


def _spark(values: tuple[float | None, ...]) -> str:
    """Densities in a line; of many, the mean of each of twelve stretches."""
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    if len(known) <= _MANY:
        return ", ".join(f"{place}: {value:.1%}" for place, value in known)
    cuts = [round(len(known) * part / _MANY) for part in range(_MANY + 1)]
    stretches = [known[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    return ", ".join(
        f"{ranges(tuple(place for place, _ in part))}: {sum(value for _, value in part) / len(part):.1%}"
        for part in stretches
    )


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
