"""What a patched model did with its last prompt."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .budget import in_words
from .plan import FIXED, ItemPlan, Plan

if TYPE_CHECKING:
    from rich.table import Table

    from .layout import VisualItem
    from .payoff import Forecast


@dataclass(frozen=True, eq=False)
class KeptItem:
    """Which tokens of one image or video the language model saw.

    Attributes:
        row: Batch row.
        item: Where every token of the item stands in the picture.
        positions: Positions of the kept tokens among the item's tokens, ascending.
        steps: ``(layer, positions)`` pairs, layers ascending: what was left from that decoder layer on.
    """

    row: int
    item: VisualItem
    positions: tuple[int, ...]
    steps: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Report:
    """The account of one prompt pass: a forward, or a ``generate`` from prefill to last token.

    Attributes:
        method: ``str()`` of the method.
        budget: The budget as text.
        positions: ``"packed"`` or ``"original"``, as used.
        plan: Counts per image and video; empty for a text-only prompt.
        encode_ms: Vision tower and projector, score probes included.
        probe_ms: The probes' part of it: computing attention rows.
        select_ms: Choosing the tokens.
        compact_ms: Gathering the prompt's embeddings, positions and masks, and growing the output back.
        prefill_ms: Language model over the prompt (all chunks).
        drop_ms: The part of it that choosing and gathering at decoder layers took.
        decode_steps: Language model calls after the prompt.
        decode_ms_per_token: Mean time of these calls, translating masks and positions included; None without any.
        kv_bytes: Cache held by the kept prompt; 0 without a cache.
        kv_bytes_unpruned: What the unpruned prompt would hold.
        forecast: FLOPs, the predicted saving, and what a budget in real units promised; None for a text-only prompt and
            for a further turn on a filled cache.
        warnings: Why pruning is predicted not to pay, or that a budget in milliseconds was missed; empty otherwise.
    """

    method: str
    budget: str
    positions: str
    plan: Plan
    encode_ms: float
    probe_ms: float
    select_ms: float
    compact_ms: float
    prefill_ms: float
    drop_ms: float
    decode_steps: int
    decode_ms_per_token: float | None
    kv_bytes: int
    kv_bytes_unpruned: int
    forecast: Forecast | None = None
    warnings: tuple[str, ...] = ()

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the prompt before pruning."""
        return self.plan.total

    @property
    def kept_tokens(self) -> int:
        """Visual tokens the language model saw."""
        return self.plan.keep

    @property
    def text_only(self) -> bool:
        """The prompt brought no visual tokens of its own, so nothing was dropped from it."""
        return not self.plan.items

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            **asdict(self),
            "visual_tokens": self.visual_tokens,
            "kept_tokens": self.kept_tokens,
            "text_only": self.text_only,
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
        if self.plan.items and self.plan.method != self.method:
            return f"{self.method} with {titled_plan(self.plan)}"
        return f"{self.method}, a fixed schedule" if self.budget == FIXED else f"{self.method} at {self.budget}"

    def _rows(self) -> list[tuple[str, str]]:
        pruned_before = self.kv_bytes != self.kv_bytes_unpruned
        why = (
            "none new: a text-only turn on a pruned cache" if pruned_before else "none: text-only prompt, ran unpruned"
        )
        rows = [("visual tokens", why)] if self.text_only else []
        rows += _shared(self.plan) if self.plan.joint else _each(self.plan)
        decode = "-" if self.decode_ms_per_token is None else f"{self.decode_ms_per_token:.2f} ms per token"
        return [
            *rows,
            ("positions", self.positions),
            ("encode", f"{self.encode_ms:.2f} ms, of it probes {self.probe_ms:.2f} ms"),
            ("select", f"{self.select_ms:.2f} ms"),
            ("compact", f"{self.compact_ms:.2f} ms"),
            ("prefill", f"{self.prefill_ms:.2f} ms" + (f", of it drops {self.drop_ms:.2f} ms" if self.drop_ms else "")),
            ("decode", f"{decode} ({self.decode_steps} steps)"),
            ("KV cache of the prompt", f"{self.kv_bytes:,} of {self.kv_bytes_unpruned:,} bytes"),
            *(self._forecast_rows(self.forecast) if self.forecast is not None else ()),
            *(("warning", warning) for warning in self.warnings),
        ]

    def _forecast_rows(self, found: Forecast) -> list[tuple[str, str]]:
        flops, full = in_words(found.prefill_flops, "flops"), in_words(found.prefill_flops_unpruned, "flops")
        by = "calibrated times" if found.calibrated else "FLOPs"
        saved = f"{found.saved_ms:.2f} ms, {found.saved_share:.1%} of the unpruned call, by {by}"
        rows = [
            ("FLOPs of the prefill", f"{flops} of {full}, and {in_words(found.encoder_flops, 'flops')} of the encoder"),
            ("predicted saving", saved),
        ]
        return rows if found.promise is None else [*rows, ("promise", str(found.promise))]

    def __str__(self) -> str:
        """The rows as plain text."""
        return "\n".join([self._title, *(f"  {name}: {value}" for name, value in self._rows())])


def titled_plan(plan: Plan) -> str:
    """Whose counts a plan holds: a plan may be replayed with another method than it was made for."""
    return f"the counts of {plan.method}" + ("" if plan.budget == FIXED else f" at {plan.budget}")


def _each(plan: Plan) -> list[tuple[str, str]]:
    return [
        (f"prompt {item.row}, {item.modality}", f"{item.keep} of {item.total} tokens{_inside(item)}")
        for item in plan.items
    ]


def _shared(plan: Plan) -> list[tuple[str, str]]:
    """A row per prompt: which item got how many is for :meth:`vlm_budget.PatchHandle.kept` to say."""
    rows = []
    for row in dict.fromkeys(item.row for item in plan.items):
        mine = [item for item in plan.items if item.row == row]
        kinds = [item.modality for item in mine]
        counts = {kind: kinds.count(kind) for kind in kinds}
        what = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items())
        steps = [(layer, sum(item.steps[place][1] for item in mine)) for place, (layer, _) in enumerate(mine[0].steps)]
        whole = ItemPlan(row, kinds[0], sum(i.total for i in mine), sum(i.keep for i in mine), tuple(steps))
        rows.append((f"prompt {row}, {what} together", f"{whole.keep} of {whole.total} tokens{_inside(whole)}"))
    return rows


def _inside(item: ItemPlan) -> str:
    """What is left of an item inside the language model."""
    if len(item.steps) > _FEW_STEPS:
        return f", {item.steps[-1][1]} after {len(item.steps)} drops inside the language model"
    return "".join(f", {count} from layer {layer} on" for layer, count in item.steps)


_FEW_STEPS = 3
