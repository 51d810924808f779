"""Collects what one prompt pass does, for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..layout import Modality, VisualLayout
from ..plan import Plan
from ..report import KeptItem, Report
from .cache import cache_state
from .clock import Interval, total_ms

STAGES = ("encode", "probe", "select", "compact", "prefill", "decode", "translate")


@dataclass(eq=False)
class Account:
    """Running account of one pass.

    Attributes:
        plan: Set once counts are known.
        layout: Set with it: the items the counts are for.
        keep: Set with it: per modality, [R, V] bool over a prompt's visual tokens of that modality in order.
        stages: Measured intervals per stage.
        kv: Bytes of one cache column of the whole batch, physical and virtual columns after the prompt.
    """

    plan: Plan | None = None
    layout: VisualLayout | None = None
    keep: dict[Modality, torch.Tensor] = field(default_factory=dict)
    stages: dict[str, list[Interval]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    kv: tuple[int, int, int] = (0, 0, 0)

    def note_cache(self, cache: Any, virtual: int) -> None:
        """Remember the cache's size after the prompt, ``virtual`` columns long in the caller's eyes."""
        state = cache_state(cache)
        self.kv = (column_bytes(cache), virtual - (state.delta if state else 0), virtual)

    def kept(self) -> tuple[KeptItem, ...]:
        """Kept positions per item, in plan order. Reads the selection off the device."""
        found: list[KeptItem] = []
        flags = {modality: table.cpu() for modality, table in self.keep.items()}
        for row, items in enumerate(self.layout.rows if self.layout else ()):
            start: dict[Modality, int] = dict.fromkeys(flags, 0)
            for item in items:
                begin = start[item.modality]
                start[item.modality] = stop = begin + item.size
                kept = flags[item.modality][row, begin:stop].nonzero().flatten()
                found.append(KeptItem(row, item, tuple(kept.tolist())))
        return tuple(found)

    def report(self, method: str, budget: str, positions: str) -> Report:
        """The account as a report. Waits for the device if it is still at work."""
        ms = {stage: total_ms(intervals) for stage, intervals in self.stages.items()}
        steps = len(self.stages["decode"])
        column, physical, virtual = self.kv
        return Report(
            method=method,
            budget=budget,
            positions=positions,
            plan=self.plan or Plan(method, budget, (), 0),
            encode_ms=ms["encode"],
            probe_ms=ms["probe"],
            select_ms=ms["select"],
            compact_ms=ms["compact"],
            prefill_ms=ms["prefill"],
            decode_steps=steps,
            decode_ms_per_token=(ms["decode"] + ms["translate"]) / steps if steps else None,
            kv_bytes=column * physical,
            kv_bytes_unpruned=column * virtual,
        )


def column_bytes(cache: Any) -> int:
    """Bytes one column takes over all layers and batch rows, read off the tensors a cache holds."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if tensor is not None and tensor.ndim == 4:
                total += tensor.shape[0] * tensor.shape[1] * tensor.shape[3] * tensor.element_size()
    return total
