"""What a harness's questions cost: tokens and milliseconds, summed over all batches."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_budget.errors import RunError

if TYPE_CHECKING:
    from vlm_budget.report import Report

STAGES = ("encode", "select", "compact", "prefill", "decode")


@dataclass
class Meter:
    """Sums over prompts.

    Attributes:
        sums: ``prompts``, ``visual``, ``kept`` (visual tokens that entered the language model), ``mean_kept`` (over its
            layers), ``new`` tokens, and milliseconds as ``total_ms`` and by stage.
    """

    sums: Counter[str] = field(default_factory=Counter)

    def add(self, prompts: int, visual: int, new: int, ms: float, layers: int, report: Report | None) -> None:
        """Count a batch.

        Args:
            prompts: Its size.
            visual: Visual tokens before pruning.
            new: New tokens.
            ms: Milliseconds from the model's inputs to the last token.
            layers: Decoder layers.
            report: The patched model's account; None for the unpatched model.
        """
        found: dict[str, Any] = {"prompts": prompts, "visual": visual, "new": new, "total_ms": ms}
        found["kept"] = visual if report is None else report.kept_tokens
        found["mean_kept"] = visual if report is None else report.plan.mean_tokens(layers)
        if report is not None:
            found |= {f"{stage}_ms": getattr(report, f"{stage}_ms") for stage in STAGES if stage != "decode"}
            found["decode_ms"] = (report.decode_ms_per_token or 0.0) * report.decode_steps
        self.sums.update(found)

    def merge(self, others: Iterable[Mapping[str, Any]]) -> Meter:
        """The sums of several processes."""
        whole: Counter[str] = Counter()
        for other in others:
            whole.update(dict(other))
        return Meter(whole)

    def summary(self) -> dict[str, Any]:
        """Means per prompt; None where no prompt ran."""
        prompts = int(self.sums["prompts"])

        def mean(name: str) -> float | None:
            return self.sums[name] / prompts if prompts else None

        stages = [name for name in ("total", *STAGES) if f"{name}_ms" in self.sums]
        return {
            "prompts": prompts,
            "visual_tokens": mean("visual"),
            "kept_tokens": mean("kept"),
            "kept_tokens_over_layers": mean("mean_kept"),
            "new_tokens": mean("new"),
            "ms": {name: mean(f"{name}_ms") for name in stages},
        }

    def line(self) -> str:
        """The summary in words."""
        found = self.summary()
        if not found["prompts"]:
            return "no prompt ran"
        share = f" ({found['kept_tokens'] / found['visual_tokens']:.1%})" if found["visual_tokens"] else ""
        stages = ", ".join(f"{name} {ms:.2f}" for name, ms in found["ms"].items())
        return (
            f"{found['prompts']} prompts; visual tokens {found['visual_tokens']:.1f}, kept {found['kept_tokens']:.1f}"
            f"{share}, over all layers {found['kept_tokens_over_layers']:.1f}; ms per prompt: {stages}"
        )


def write_report(path: str | Path, facts: Mapping[str, Any]) -> None:
    """A report as a JSON file, whole or not at all.

    Raises:
        RunError: It cannot be written.
    """
    target = Path(path).expanduser()
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise RunError(f"cannot write report {str(path)!r}: {error.strerror or error}") from error


def check_report(path: str | Path | None) -> None:
    """Refuse, before a model is loaded, a place where no report can be written.

    Raises:
        RunError: The folder is missing or read-only, or the place is a folder.
    """
    if path is None:
        return
    target = Path(path).expanduser()
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise RunError(f"cannot write report {str(path)!r}: name a file in a folder that is there and may be written")
