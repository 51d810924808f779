"""What a run found, as pages for people: HTML, Markdown and CSV.

Every text in them, from method names to answers, is taken for hostile: see :mod:`vlm_budget.eval.report.words`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlm_budget.errors import OptionError, RunError
from vlm_budget.eval.report.longform import csv_text
from vlm_budget.eval.report.markdown import markdown_text
from vlm_budget.eval.report.page import html_text
from vlm_budget.eval.report.regressions import FILE, Regression, find_regressions
from vlm_budget.eval.summary import Summary

FILES: Mapping[str, str] = {"html": "report.html", "md": "report.md", "csv": "results.csv"}
_MAKERS: Mapping[str, Callable[[Summary, Sequence[Regression], bool], str]] = {
    "html": html_text,
    "md": markdown_text,
    "csv": lambda summary, _, times: csv_text(summary, times),
}


def write_report(
    summary: Summary, folder: str | Path, *, formats: Sequence[str] = ("html", "md", "csv"), times: bool = True
) -> list[Path]:
    """Write a run's report.

    Regressions and their pictures are looked for in the folder, then in the run's own.

    Args:
        summary: What :func:`vlm_budget.eval.summary.summarise` gives.
        folder: Where the files go; made if need be.
        formats: Of ``FILES``.
        times: Show measured times and dates; without them two runs of the same configuration give the same bytes.

    Returns:
        The files, in the order of the formats.

    Raises:
        OptionError: There is no such format.
        RunError: The folder cannot be written to, or its list of regressions is damaged.
    """
    if strange := [name for name in formats if name not in FILES]:
        raise OptionError(f"there is no report format {strange[0]!r}; there are {', '.join(FILES)}")
    place = Path(folder)
    regressions = find_regressions(summary, place if (place / FILE).exists() else summary.run.folder)
    texts = {FILES[name]: _MAKERS[name](summary, regressions, times) for name in formats}
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            part = place / f"{name}.part"
            part.write_bytes(text.encode("utf-8"))
            os.replace(part, place / name)
    except OSError as error:
        raise RunError(f"cannot write the report to {str(place)!r}: {error.strerror or error}") from error
    return [place / name for name in texts]
