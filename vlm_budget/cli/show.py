"""Comparisons as tables, and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import OptionError
from .compare import FULL, Comparison, Setting, Side, ratio

if TYPE_CHECKING:
    from PIL import Image

    from ..report import KeptItem

_LONG = 48  # an answer above this length gets lines of its own


def comparison_table(comparison: Comparison, setting: Setting) -> Table:
    """Answers, tokens, times and cache of both sides, with ratios."""
    full, pruned = comparison.full, comparison.pruned
    table = _table(setting.title, setting.name)
    if max(len(full.answer), len(pruned.answer)) <= _LONG:
        same = "same" if full.answer == pruned.answer else "differs"
        table.add_row(Text("answer", "bold"), Text(full.answer), Text(pruned.answer), same)
        table.add_section()
    for row in _rows(full, pruned):
        table.add_row(*row)
    return table


def times_table(full: Side, pruned: Side, title: str, name: str) -> Table:
    """Tokens, times and cache of two sides; the second column has the name."""
    table = _table(title, name)
    for row in _rows(full, pruned):
        table.add_row(*row)
    return table


def _table(title: str, pruned: str) -> Table:
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    table.add_column("")
    for name in (FULL, pruned if pruned != FULL else f"{FULL} again", "ratio"):
        table.add_column(name, justify="right", overflow="fold")
    return table


def _rows(full: Side, pruned: Side) -> list[tuple[str, str, str, str]]:
    rows = [("time to first token", *_numbers(full, pruned, "first_token_ms"))]
    if full.visual_tokens:
        inside = ("  mean over the decoder layers", *_numbers(full, pruned, "mean_tokens", "{:,.4g}"))
        rows = [
            ("visual tokens", *_numbers(full, pruned, "visual_tokens", "{:,.0f}")),
            *[inside] * (pruned.mean_tokens != pruned.visual_tokens),
            *rows,
            ("  vision tower", *_numbers(full, pruned, "encode_ms")),
            ("  selection", "-", f"{pruned.selection_ms:.2f} ms", ""),
            ("  compaction", "-", f"{pruned.compact_ms:.2f} ms", ""),
        ]
    else:
        rows.insert(0, ("visual tokens", "none", "none", ""))
    rows.append(("  prefill", *_numbers(full, pruned, "prefill_ms")))
    if full.decode_ms_per_token is not None and pruned.decode_ms_per_token is not None:
        rows.append(("decode per token", *_numbers(full, pruned, "decode_ms_per_token")))
    if pruned.kv_bytes:
        cells = _bytes(full.kv_bytes), _bytes(pruned.kv_bytes), _ratio(full.kv_bytes, pruned.kv_bytes)
        rows.append(("KV cache of the prompt", *cells))
    return rows


def print_comparison(console: Console, comparison: Comparison, setting: Setting) -> None:
    """Answers, where they are long, and the table."""
    full, pruned = comparison.full, comparison.pruned
    if max(len(full.answer), len(pruned.answer)) > _LONG:
        for name, side in ((FULL, full), (setting.name, pruned)):
            console.print(Text.assemble((f"{name}: ", "bold"), side.answer))
            console.print()
    console.print(comparison_table(comparison, setting))
    if comparison.promise is not None:
        console.print(Text(f"{setting.name}: {comparison.promise}"))
    for warning in comparison.warnings:
        console.print(Text(warning, "yellow"))
    if comparison.text_only:
        console.print(
            "[yellow]The prompt has no picture: there was nothing to prune, and the model ran unpruned.[/yellow]"
        )


def save_kept(
    path: Path, pictures: Sequence[Image.Image], kept: Sequence[KeptItem], title: str, names: Sequence[str]
) -> None:
    """Draw what was kept and write it; where tokens are dropped inside, what the last layers with any of them see.

    Raises:
        OptionError: The file cannot be written.
    """
    from ..picture import draw_kept

    common = set.intersection(*({layer for layer, left in entry.steps if left} for entry in kept)) if kept else set()
    last = max(common, default=0)
    left = [replace(entry, positions=dict(entry.steps).get(last, entry.positions)) for entry in kept]
    try:
        draw_kept(pictures, left, f"{title}, decoder layers from {last} on" if last else title, names).save(path)
    except OSError as error:
        raise OptionError(f"--out {str(path)!r} cannot be written: {error.strerror or error}") from error


def _numbers(full: Side, pruned: Side, name: str, form: str = "{:.2f} ms") -> tuple[str, str, str]:
    one, other = getattr(full, name), getattr(pruned, name)
    return form.format(one), form.format(other), _ratio(one, other)


def _ratio(full: float, pruned: float) -> str:
    value = ratio(full, pruned)
    return "" if value is None else f"{value:.2f}x"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.4g} GB"
