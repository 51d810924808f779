"""Text of unknown origin made safe to show, and numbers for people.

Questions, answers, names and paths come from datasets and models. Every text of a report goes through :func:`clean`,
and then through the escape of its format, whatever it is.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata

from vlm_budget.eval.cells import FIXED, Cell
from vlm_budget.eval.statistics import Comparison, Estimate

NONE = "–"
_MINUS = "\u2212"
_JOINERS = "\u200c\u200d"  # words of some scripts and many emoji need them
_MARKDOWN = re.compile(r"[\\`*{}\[\]#|~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=:)//|(?<=[Ww])\.")
_FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
_VOID = frozenset(("meta", "img", "br"))


class Html(str):
    """Markup that is written as it is."""

    __slots__ = ()


def clean(text: object, most: int | None = None, lines: bool = False) -> str:
    """Text without characters that hide, reorder or break: they are shown as ``[U+202E]``.

    Args:
        text: Anything.
        most: Longest text; of a longer one the beginning is kept and the rest is counted.
        lines: Keep line ends; otherwise all white space becomes single spaces.
    """
    whole = str(text)
    cut = whole if most is None else whole[:most]
    shown = "".join(map(_visible, cut.replace("\r\n", "\n")))
    shown = shown if lines else " ".join(shown.split())
    return shown if len(cut) == len(whole) else f"{shown}… ({len(whole) - len(cut):,} more characters)"


def _visible(letter: str) -> str:
    code = ord(letter)
    if 32 <= code < 127 or letter in "\n\t" or letter in _JOINERS:
        return letter
    hidden = unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return f"[U+{code:04X}]" if hidden or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF else letter


def escape_html(text: object, lines: bool = False) -> Html:
    """For text and attribute values."""
    return text if isinstance(text, Html) else Html(html.escape(clean(text, lines=lines), quote=True))


def element(tag: str, *parts: object, **attributes: object) -> Html:
    """An element; whatever is no :class:`Html` is escaped.

    Args:
        tag: Its name.
        parts: Its content.
        attributes: ``class_`` is ``class``, ``stroke_width`` is ``stroke-width``; those that are None are left out.
    """
    words = [tag]
    for name, value in attributes.items():
        if value is not None:
            words.append(f'{name.rstrip("_").replace("_", "-")}="{escape_html(value)}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if tag in _VOID else f"{opened}{''.join(map(escape_html, parts))}</{tag}>")


def escape_markdown(text: object) -> str:
    """For running text and cells of tables: no markup, no tag, no link, no second line."""
    safe = _MARKDOWN.sub(lambda found: f"\\{found[0]}", clean(text))
    return safe.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")


def escape_csv(text: object) -> str:
    """For a field of text: what a spreadsheet would take for a formula gets a quote in front."""
    shown = clean(text, lines=True)
    return f"'{shown}" if shown[:1] in tuple(_FORMULA) or shown.lstrip()[:1] in tuple(_FORMULA) else shown


def number(value: float | None) -> str:
    """A score: three decimals, or four digits where it is large."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return text.replace("-", _MINUS)


def signed(value: float) -> str:
    """A difference."""
    return number(value) if not value > 0 else f"+{number(value)}"


def mean(value: Estimate) -> str:
    """A mean with its standard error."""
    return number(value.mean) if not math.isfinite(value.se) else f"{number(value.mean)} ± {number(value.se)}"


def interval(value: Comparison) -> str:
    """A difference with its 95 % interval."""
    return f"{signed(value.difference)} [{signed(value.low)}, {signed(value.high)}]"


def percent(share: float) -> str:
    """A share."""
    return f"{100 * share:.0f} %"


def cost(name: str, value: float) -> str:
    """A cost with its unit."""
    if name == "flops":
        return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))
    if name.endswith("_bytes"):
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    if name.endswith("_ms"):
        return f"{_digits(value)} ms"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:,.1f}"


def budget(cell: Cell) -> str:
    """A cell's budget for people."""
    return NONE if cell.unpatched else "own schedule" if cell.budget == FIXED else cell.budget


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < step:
            return f"{_digits(value)} {unit}"
        value /= step
    return f"{_digits(value)} {units[-1]}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
